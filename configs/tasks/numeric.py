"""A numeric task: a response is correct if its last number is close to the problem's answer."""

import re

TEMPLATE = "{prompt}="

TOLERANCE = 0.02  # relative error that counts as correct

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def reward(problem, text, length):
    """(correct, score) of the response `text`, of `length` tokens, to `problem`."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return False, -1.0
    wanted = float(problem.answer)
    correct = abs(float(numbers[-1]) - wanted) <= TOLERANCE * abs(wanted)
    return correct, 1.0 if correct else -1.0
