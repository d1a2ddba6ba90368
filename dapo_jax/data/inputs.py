"""The prompts that a run trains on and evaluates."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dapo_jax.config import DataSection, EvalSection
from dapo_jax.data.mixture import Mixture, load_training, mix, mixture_digest
from dapo_jax.data.problems import load_problems, problems_digest
from dapo_jax.data.prompts import make_prompts, tokens_digest, without
from dapo_jax.data.rows import AS_USUAL
from dapo_jax.types import InputError, Problem, Prompt

Info = Callable[[str], None]
Encoding = tuple[Any, int]  # a tokenizer, and how many tokens the model's embedding has


class Digests(NamedTuple):
    """Digests of what a run trains on."""

    loaded: str  # data.train, with problems that are also in evaluation sets
    trained_on: str  # the problems without those, and the weights of data sets
    tokens: str  # prompts of `trained_on`
    function: str | None  # the file of reward.function

    def changes_from(self, before: "Digests") -> tuple[str, str]:
        """The difference to a checkpoint's data, and the remedy; empty texts if there is none."""
        if before.trained_on == self.trained_on:
            if before.tokens == self.tokens:
                return "", ""
            what = (
                "its tokenizer or chat template makes other prompts than when the run was started"
            )
            return f"model.folder: {what}", "the files it had"
        if before.loaded == self.loaded:
            what = "hold other prompts of data.train than when the run was started"
            remedy = "the sets that it had (python -m dapo_jax.evaluate measures any other)"
            return f"eval.sets: {what}, and what they hold is not trained on", remedy
        return "data.train: is not the data set that the run was started with", "that one"


class RunData(NamedTuple):
    prompts: list[Prompt]  # without those in evaluation sets
    eval_sets: Mapping[str, Sequence[Prompt]]
    mixture: Mixture  # of the prompts
    digests: Digests  # `function` is not set yet

    @property
    def sets(self) -> dict[str, Sequence[Prompt]]:
        """All prompts, by config key."""
        return {"data.train": self.prompts} | by_key(self.eval_sets)


def by_key(eval_sets: Mapping[str, Sequence[Prompt]]) -> dict[str, Sequence[Prompt]]:
    """Evaluation sets by config key."""
    return {f"eval.sets.{name}": prompts for name, prompts in eval_sets.items()}


def load_eval_sets(
    section: EvalSection, data: DataSection, encoding: Encoding, info: Info
) -> dict[str, list[Prompt]]:
    """The prompts of every evaluation set."""
    sets = {}
    for name, one in section.sets.items():
        columns = one.columns or AS_USUAL
        problems, report = load_problems(one.path, data.arithmetic, columns=columns, heldout=True)
        sets[name], skipped = _prompts(problems[: section.max_problems], data, encoding)
        info(f"eval/{name}: {report.summary()}; {len(sets[name])} used{skipped}")
    return sets


def load_data(
    data: DataSection, held_out: EvalSection, encoding: Encoding, needs: tuple[str, int], info: Info
) -> RunData:
    """Training prompts and evaluation sets.

    needs: what needs how many training prompts. Raises InputError if there are fewer.
    """
    problems, reports = load_training(data)
    loaded, skipped = _prompts(problems, data, encoding)
    counts = "; ".join(report.summary() for report in reports)
    info(f"problems: {counts}; {len(loaded)} prompts{skipped}")
    eval_sets = load_eval_sets(held_out, data, encoding, info)
    prompts, (what, number) = without(loaded, itertools.chain(*eval_sets.values())), needs
    if held := len(loaded) - len(prompts):
        info(f"problems: {held} of the prompts are in eval.sets too, and left out of training")
    if len(prompts) < number:
        few = f"{len(prompts)} prompts to train on"
        few += f" ({held} more are in eval.sets)" if held else ""
        raise InputError(f"data.train: {few}, but {what} needs {number}; give more problems")
    mixture = mix(data.train, [p.problem for p in prompts])
    if several := mixture.summary():
        info(f"mixture: {several}")
    trained_on = mixture_digest([p.problem for p in prompts], mixture)
    whole = problems_digest(p.problem for p in loaded)
    digests = Digests(whole, trained_on, tokens_digest(prompts), None)
    return RunData(prompts, eval_sets, mixture, digests)


def _prompts(
    problems: Sequence[Problem], data: DataSection, encoding: Encoding
) -> tuple[list[Prompt], str]:
    tokenizer, vocab_size = encoding
    prompts, skipped = make_prompts(problems, tokenizer, data, vocab_size)
    return prompts, "".join(f", {count} skipped: {reason}" for reason, count in skipped.items())
