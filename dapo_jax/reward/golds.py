"""Checks of data and verifier before a device works: can the ground truths be reached at all?

Answers are made from each ground truth, as it stands and as a model would write it, and judged by
the configured verifier; so are the worked solutions. A custom function, whose right answers only it
knows, is called once.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dapo_jax.config import RewardSection
from dapo_jax.reward.pool import RewardItem, remedy
from dapo_jax.types import InputError, Problem, Verdict, canonical_answer

Judge = Callable[[Sequence[RewardItem]], Sequence[Verdict]]

_JUDGED = 256  # problems at most, spread evenly, where math-verify judges
_EXAMPLES = 3
_MANY = 0.1  # share of the prompts from which on they are said to ask for another form
_LONG = 8  # words from which on a ground truth is said to be a sentence
_LABEL = re.compile(r"(?i)answer\s*:\s*")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_BOXED = re.compile(r"(?s).*\\boxed\{(.*)\}")


class Share(NamedTuple):
    """How many of some texts, all of which should be correct, the verifier finds correct."""

    judged: int
    correct: int
    failures: tuple[str, ...]  # a few of the others

    def __str__(self) -> str:
        return f"{self.correct:,} of {self.judged:,} ({self.correct / self.judged:.1%})"


def judge_golds(
    problems: Sequence[Problem], verifier: str, judge: Judge, imitated: bool = True
) -> dict[str, Share]:
    """Which ground truths and solutions the verifier, not a custom one, finds correct.

    A ground truth is if a response that ends in it is, as it stands and as a model would write it.
    Solutions of embedded arithmetic are left out: some are wrong on purpose. imitated: solutions
    may be; where not, as in evaluation sets, those in which the verifier finds no answer are left
    out.
    """
    if verifier == "lenient":
        problems = problems[:: max(1, -(-len(problems) // _JUDGED))]
    items: dict[str, list[tuple[int, RewardItem]]] = {"ground truths": [], "solutions": []}
    for n, problem in enumerate(problems):
        gold = canonical_answer(problem.answer)
        for text in dict.fromkeys((gold, _as_written(gold))):
            items["ground truths"].append((n, RewardItem(problem, f"Answer: {text}", 0)))
        if problem.solution and problem.source != "arithmetic":
            items["solutions"].append((n, RewardItem(problem, problem.solution, 0)))
    shares = {}
    for name, numbered in items.items():
        failures: dict[int, str] = {}
        unread: set[int] = set()
        if not numbered:
            continue
        for (n, item), verdict in zip(numbered, judge([i for _, i in numbered]), strict=True):
            if name == "solutions" and not (imitated or verdict.answered):
                unread.add(n)
            elif not verdict.correct:
                failures.setdefault(n, _failure(item, verdict))
        judged = len({n for n, _ in numbered} - unread)
        if not judged:
            continue
        examples = tuple(failures.values())[:_EXAMPLES]
        shares[name] = Share(judged, judged - len(failures), examples)
    return shares


def _as_written(gold: str) -> str:
    r"""The answer that a model would write for `\boxed{4}$.`, `$4$.`, `Answer: 4` or a whole
    solution: 4.
    """
    boxed = _BOXED.match(gold) if gold.count(r"\boxed") == 1 else None
    text = (boxed[1] if boxed else gold).strip()
    text = _LABEL.split(text)[-1] or text
    bare = text.rstrip(" $.").lstrip(" $")
    return bare if bare and (bare[-1] in "0123456789})]" or "." not in bare) else text


def _failure(item: RewardItem, verdict: Verdict) -> str:
    said = item.text if len(item.text) < 60 else f"... {item.text[-50:]}"
    why = "is not correct" if verdict.error is None else f"gets no verdict ({verdict.error})"
    return f"{item.problem.id} with the answer {item.problem.answer[:60]!r}: {said!r} {why}"


def check_data(
    name: str, problems: Sequence[Problem], template: str, section: RewardSection, judge: Judge
) -> list[str]:
    """Lines on a data set that the verifier may not suit; those that warn start with `warning`.

    Raises InputError if a custom function fails on a first answer, or if not one ground truth can
    be reached.
    """
    if not problems:
        return []
    if section.verifier == "custom":
        _call_once(problems[0], section, judge)
        return []
    lines = []
    for what, share in judge_golds(
        problems, section.verifier, judge, not name.startswith("eval.sets.")
    ).items():
        line = f"{name}: {share} {what} are correct by the {section.verifier} verifier"
        if share.correct == share.judged:
            lines.append(line)
            continue
        line += f"; not, for example, {'; '.join(share.failures)}"
        if what == "ground truths" and not share.correct:
            raise InputError(f"{line}; name the column of the bare answer, or another verifier")
        lines.append(f"warning: {line}")
    lines += _sentences(name, problems)
    if section.verifier == "strict":
        lines += _other_forms(name, problems, template)
    return lines


def _call_once(problem: Problem, section: RewardSection, judge: Judge) -> None:
    text = f"Answer: {problem.answer}"
    [verdict] = judge([RewardItem(problem, text, 1)])
    if verdict.error is not None:
        raise InputError(
            f"reward.function: {section.function} gives no verdict on a first answer, {text[:60]!r} "
            f"to problem {problem.id} ({verdict.error}); {remedy(verdict.error, section)}"
        )


def _sentences(name: str, problems: Sequence[Problem]) -> list[str]:
    """A warning of ground truths that are sentences: neither verifier looks for an answer in them."""
    long = [p for p in problems if len(_WORD.findall(p.answer)) >= _LONG]
    if not long:
        return []
    return [
        f"warning: {name}: {len(long):,} of {len(problems):,} ground truths have {_LONG} words or more, for example "
        f"{long[0].answer[:60]!r} of {long[0].id}; an answer must repeat them, so give the bare answers"
    ]


def _other_forms(name: str, problems: Sequence[Problem], template: str) -> list[str]:
    """A warning if many prompts ask for an answer in a form that the strict verifier does not read."""
    texts = [
        template.replace("{prompt}", p.prompt)
        if isinstance(p.prompt, str)
        else "\n".join(turn.content for turn in p.prompt)
        for p in problems
    ]
    for form in (r"\boxed", "####"):
        asking = sum(form in text for text in texts)
        if asking > _MANY * len(texts):
            return [
                f"warning: {name}: {asking:,} of {len(texts):,} prompts hold {form}, but the strict "
                "verifier reads an `Answer:` line only; set reward.verifier: lenient, or let the "
                "prompts ask for `Answer:` alone"
            ]
    return []
