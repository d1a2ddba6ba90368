"""A task that asks for a form and a right answer: <think>working</think><answer>42</answer>.

`correct` is about the answer alone, and decides which groups are trained on. The score is 1 or -1 for the answer, and half a point
more or less for the form, so that among right answers those in the right form are preferred.

    python configs/tasks/format_and_answer.py > runs/tagged.jsonl      the problems of format_and_answer_cpu.yaml
"""

import re

TEMPLATE = "{prompt}="  # a model that can read is told the form here: "... Reply as <think>working</think><answer>number</answer>."

_FORM = re.compile(
    r"<think>(?:(?!</?think>|</?answer>).)+</think>\s*<answer>(?:(?!</?think>|</?answer>).)+</answer>",
    re.DOTALL,
)
_ANSWER = re.compile(r"<answer>([^<]*)(?:</answer>|$)")


def reward(problem, text, length):
    """(correct, score) of a response: `text`, of `length` tokens, to `problem`, which has prompt and answer."""
    answers = _ANSWER.findall(text)
    correct = bool(answers) and answers[-1].strip() == problem.answer
    in_form = _FORM.fullmatch(text.strip()) is not None
    return correct, (1.0 if correct else -1.0) + (0.5 if in_form else -0.5)


def write_problems(count=1700, careless=0.5):
    """Prints sums as JSON lines. So many of the solutions, which the warm-up imitates, forget to close their last tag."""
    import json
    import random

    from dapo_jax.config import ArithmeticConfig
    from dapo_jax.data.arithmetic import arithmetic_problems

    rng = random.Random(0)
    for p in arithmetic_problems(
        ArithmeticConfig(count, 128, 1, 1, 30, mistake_rate=0.15), heldout=False
    ):
        working, _, answer = p.solution.rpartition("\nAnswer: ")
        solution = f"<think>{working}</think><answer>{answer}" + (
            "" if rng.random() < careless else "</answer>"
        )
        print(json.dumps({"prompt": p.prompt, "answer": p.answer, "solution": solution}))


if __name__ == "__main__":
    write_problems()
