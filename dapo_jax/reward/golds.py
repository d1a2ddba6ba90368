"""Checks of data and verifier before training: can the ground truths be reached at all?

Responses are built from each ground truth, as it is and as a model would write it, and judged by
the verifier; so are worked solutions. A custom function is called once.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dapo_jax.config import RewardSection
from dapo_jax.reward.pool import RewardItem, remedy
from dapo_jax.types import InputError, Problem, Verdict, canonical_answer

Judge = Callable[[Sequence[RewardItem]], Sequence[Verdict]]

_JUDGED = 256  # problems at most, spread evenly, with math-verify
_EXAMPLES = 3
_MANY = 0.1  # share of the prompts that ask for another form, from which on to warn
_LONG, _SHORT = 8, 3  # words from which on a ground truth is a sentence: without, with a verb
_LABEL = re.compile(r"(?i)answer\s*:\s*")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_VERB = re.compile(r"(?i)\b(?:is|are|was|were|has|have|equals|gives)\b")
_BOXED = re.compile(r"(?s).*\\boxed\{(.*)\}")


class Share(NamedTuple):
    """How many texts the verifier judges correct; all of them should be."""

    judged: int
    correct: int
    failures: tuple[str, ...]  # a few of the others

    def __str__(self) -> str:
        return f"{self.correct:,} of {self.judged:,} ({self.correct / self.judged:.1%})"


def judge_golds(
    problems: Sequence[Problem], verifier: str, judge: Judge, imitated: bool = True
) -> dict[str, Share]:
    """Which ground truths and solutions a verifier, strict or lenient, finds correct.

    A ground truth counts if `Answer:` and the ground truth is correct, as it is and as a model
    would write it. Solutions of embedded arithmetic are left out: some are wrong on purpose.
    imitated: the model may be trained on the solutions; if not, as in evaluation sets, those
    without an answer to the verifier are left out.
    """
    if verifier == "lenient":
        problems = problems[:: max(1, -(-len(problems) // _JUDGED))]
    golds = [(p, canonical_answer(p.answer)) for p in problems]
    written = [(p, text) for p, gold in golds for text in dict.fromkeys((gold, _as_written(gold)))]
    responses = {
        "ground truths": [(p, f"Answer: {text}") for p, text in written],
        "solutions": [(p, p.solution) for p in problems if p.source != "arithmetic" and p.solution],
    }
    shares = {}
    for name, texts in responses.items():
        items = [RewardItem(problem, text, 0) for problem, text in texts]
        judged: dict[int, str] = {}  # by problem: its first failure, "" without any
        for item, verdict in zip(items, judge(items) if items else (), strict=True):
            if name == "ground truths" or imitated or verdict.answered:
                failure = "" if verdict.correct else _failure(item, verdict)
                judged[id(item.problem)] = judged.get(id(item.problem)) or failure
        if judged:
            failures = [failure for failure in judged.values() if failure]
            correct = len(judged) - len(failures)
            shares[name] = Share(len(judged), correct, tuple(failures[:_EXAMPLES]))
    return shares


def _as_written(gold: str) -> str:
    r"""As a model would write it: 4 for `\boxed{4}$.`, `$4$.`, `Answer: 4` or a whole solution."""
    boxed = _BOXED.match(gold) if gold.count(r"\boxed") == 1 else None
    text = (boxed[1] if boxed else gold).strip()
    text = _LABEL.split(text)[-1] or text
    bare = text.rstrip(" $.").lstrip(" $")
    return bare if bare and (bare[-1] in "0123456789})]" or "." not in bare) else text


def _failure(item: RewardItem, verdict: Verdict) -> str:
    text = item.text if len(item.text) < 60 else f"... {item.text[-50:]}"
    why = "is not correct" if verdict.error is None else f"gets no verdict ({verdict.error})"
    return f"{item.problem.id} with the answer {item.problem.answer[:60]!r}: {text!r} {why}"


def check_data(
    name: str, problems: Sequence[Problem], template: str, section: RewardSection, judge: Judge
) -> list[str]:
    """Findings: does the verifier suit a data set? One per line; warnings start with `warning`.

    Raises InputError if a custom function fails on a first answer, or no ground truth is correct.
    """
    if not problems:
        return []
    if section.verifier == "custom":
        _call_once(problems[0], section, judge)
        return []
    lines = []
    sampled = "sampled " if section.verifier == "lenient" and len(problems) > _JUDGED else ""
    shares = judge_golds(problems, section.verifier, judge, not name.startswith("eval.sets."))
    for what, share in shares.items():
        line = f"{name}: {share} {sampled}{what} are correct by the {section.verifier} verifier"
        if share.failures:
            line = f"warning: {line}; not, for example, {'; '.join(share.failures)}"
        if what == "ground truths" and not share.correct:
            problem = line.removeprefix("warning: ")
            raise InputError(f"{problem}; name the column of the bare answer, or another verifier")
        lines.append(line)
    lines += _sentences(name, problems)
    return lines + (_other_forms(name, problems, template) if section.verifier == "strict" else [])


def _call_once(problem: Problem, section: RewardSection, judge: Judge) -> None:
    text = f"Answer: {problem.answer}"
    [verdict] = judge([RewardItem(problem, text, 1)])
    if verdict.error is not None:
        raise InputError(
            f"reward.function: {section.function} gives no verdict on a first answer, "
            f"{text[:60]!r} to problem {problem.id} ({verdict.error}); "
            f"{remedy(verdict.error, section)}"
        )


def _sentences(name: str, problems: Sequence[Problem]) -> list[str]:
    """A warning of ground truths that are sentences, in which no verifier looks for an answer."""
    found = [p for p in problems if _is_sentence(p.answer)]
    if not found:
        return []
    return [
        f"warning: {name}: {len(found):,} of {len(problems):,} ground truths are sentences, for "
        f"example {found[0].answer[:60]!r} of {found[0].id}; an answer must repeat them, "
        "so give the bare answers"
    ]


def _is_sentence(gold: str) -> bool:
    return len(_WORD.findall(gold)) >= (_SHORT if _VERB.search(gold) else _LONG)


def _other_forms(name: str, problems: Sequence[Problem], template: str) -> list[str]:
    """A warning if many prompts ask for a form of answer that the strict verifier does not read."""
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
                f"warning: {name}: {asking:,} of {len(texts):,} prompts contain {form}, but the "
                "strict verifier reads an `Answer:` line only; set reward.verifier: lenient, or "
                "let the prompts ask for `Answer:` alone"
            ]
    return []
