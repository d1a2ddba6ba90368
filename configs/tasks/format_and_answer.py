"""A task with a format and an answer: <think>working</think><answer>42</answer>.

`correct` depends on the answer only, and decides which groups are informative. The score is 1 or -1
for the answer, plus or minus half a point for the format, so that well-formatted correct responses
are preferred.

    python configs/tasks/format_and_answer.py > runs/tagged.jsonl    # of format_and_answer_cpu.yaml
"""

import re

# For a pretrained model, add: "... Reply as <think>working</think><answer>number</answer>."
TEMPLATE = "{prompt}="

_TEXT = r"(?:(?!</?think>|</?answer>).)+"
_FORMAT = re.compile(rf"<think>{_TEXT}</think>\s*<answer>{_TEXT}</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>([^<]*)(?:</answer>|$)")


def reward(problem, text, length):
    """(correct, score) of the response `text`, of `length` tokens, to `problem`."""
    answers = _ANSWER.findall(text)
    correct = bool(answers) and answers[-1].strip() == problem.answer
    formatted = _FORMAT.fullmatch(text.strip()) is not None
    return correct, (1.0 if correct else -1.0) + (0.5 if formatted else -0.5)


def write_problems(count=1700, unclosed=0.5):
    """Prints sums as JSON lines; a share `unclosed` of the solutions lacks its last tag."""
    import json
    import random

    from dapo_jax.config import ArithmeticConfig
    from dapo_jax.data.arithmetic import arithmetic_problems

    rng = random.Random(0)
    config = ArithmeticConfig(count, 128, 1, 1, 30, mistake_rate=0.15)
    for p in arithmetic_problems(config, heldout=False):
        working, _, answer = p.solution.rpartition("\nAnswer: ")
        end = "" if rng.random() < unclosed else "</answer>"
        solution = f"<think>{working}</think><answer>{answer}{end}"
        print(json.dumps({"prompt": p.prompt, "answer": p.answer, "solution": solution}))


if __name__ == "__main__":
    write_problems()
