"""A task whose answer is a number: the last number of a response is right if it is close enough to the problem's answer."""

import re

TEMPLATE = "{prompt}="

TOLERANCE = 0.02  # relative error that is still right

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def reward(problem, text, length):
    """(correct, score) of a response: `text`, of `length` tokens, to `problem`, which has prompt and answer."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return False, -1.0
    wanted = float(problem.answer)
    correct = abs(float(numbers[-1]) - wanted) <= TOLERANCE * abs(wanted)
    return correct, 1.0 if correct else -1.0
