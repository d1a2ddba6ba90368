"""Checks of data and verifier before training: can the ground truths be reached at all?

Responses are built from each ground truth, as it is and as a model would write it, and judged by
the verifier; so are worked solutions. A custom function is called once.
"""

import re
from collections.abc import Callable, Sequence

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


def check_data(
    name: str, problems: Sequence[Problem], template: str, section: RewardSection, judge: Judge
) -> list[str]:
    """Findings: does the verifier suit a data set? One per line; warnings start with `warning`.

    Solutions of embedded arithmetic are left out: some are wrong on purpose; and in evaluation
    sets, which no model imitates, those without an answer to the verifier. Raises InputError if a
    custom function fails on a first answer, or no ground truth is correct.
    """
    if not problems:
        return []
    if section.verifier == "custom":
        _call_once(problems[0], section, judge)
        return []
    lenient, lines = section.verifier == "lenient", []
    some = problems[:: max(1, -(-len(problems) // _JUDGED))] if lenient else problems
    texts: dict[str, list[tuple[Problem, str]]] = {"ground truths": [], "solutions": []}
    for p in some:
        gold = canonical_answer(p.answer)
        written = dict.fromkeys((gold, _as_written(gold)))
        texts["ground truths"] += [(p, f"Answer: {text}") for text in written]
        texts["solutions"] += [(p, p.solution)] if p.solution and p.source != "arithmetic" else []
    for what, pairs in texts.items():
        items = [RewardItem(p, text, 0) for p, text in pairs]
        unread = what == "solutions" and name.startswith("eval.sets.")
        first: dict[int, str] = {}  # failure by problem, "" without any
        for item, verdict in zip(items, judge(items) if items else (), strict=True):
            if verdict.answered or not unread:
                failure = "" if verdict.correct else _failure(item, verdict)
                first[id(item.problem)] = first.get(id(item.problem)) or failure
        if not first:
            continue
        failures = [failure for failure in first.values() if failure]
        correct = len(first) - len(failures)
        share = f"{correct:,} of {len(first):,} ({correct / len(first):.1%})"
        sampled = "sampled " if len(some) < len(problems) else ""
        line = f"{name}: {share} {sampled}{what} are correct by the {section.verifier} verifier"
        if failures:
            line += f"; not, for example, {'; '.join(failures[:_EXAMPLES])}"
        if what == "ground truths" and not correct:
            raise InputError(f"{line}; name the column of the bare answer, or another verifier")
        lines.append(f"warning: {line}" if failures else line)
    lines += _sentences(name, problems)
    return lines if lenient else lines + _other_forms(name, problems, template)


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
    found = [
        p
        for p in problems
        if len(_WORD.findall(p.answer)) >= (_SHORT if _VERB.search(p.answer) else _LONG)
    ]
    if not found:
        return []
    return [
        f"warning: {name}: {len(found):,} of {len(problems):,} ground truths are sentences, for "
        f"example {found[0].answer[:60]!r} of {found[0].id}; an answer must repeat them, "
        "so give the bare answers"
    ]


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
