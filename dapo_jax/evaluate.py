"""Held-out accuracy: avg@k, pass@k and cons@k with standard errors."""

import argparse
import collections
import contextlib
import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from dapo_jax import cli, restore
from dapo_jax.config import EvalSection, RewardSection
from dapo_jax.data.inputs import by_key, load_eval_sets
from dapo_jax.data.problems import problems_digest
from dapo_jax.data.prompts import decode, shown_prompt
from dapo_jax.reward.golds import check_data
from dapo_jax.reward.pool import RewardItem, RewardPool, check_errors, no_answer_fraction
from dapo_jax.reward.verify import extract_answer, function_source
from dapo_jax.rollout.engine import Engine
from dapo_jax.runtime import multihost
from dapo_jax.runtime.checkpoint import records_digest
from dapo_jax.runtime.console import Console, make_console, progress
from dapo_jax.runtime.files import check_result, run_folder, write_result
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.training import setup
from dapo_jax.training.samples import judged_row
from dapo_jax.training.setup import Policy
from dapo_jax.types import InputError, Params, Prompt, Request, Response, Verdict


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k responses is correct): 1 - C(n-c, k) / C(n, k).

    Source: arXiv 2107.03374.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 0, 4)
    (0.25, 0.5, 0.0)
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the {samples} samples, got {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def consensus(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> bool:
    """Whether the most frequent answer is correct. Ties go to the answer seen first.

    >>> consensus(["7", "8", None, "8"], [False, True, False, True])
    True
    """
    votes = collections.Counter(a for a in answers if a is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # most_common keeps first-seen order among equals
    return bool(correct[list(answers).index(winner)])


def estimates(
    correct: np.ndarray, answers: Sequence[Sequence[Hashable | None]] | None
) -> dict[str, float]:
    """avg@n, pass@n, cons@n, and `pass_at_<k>` for k = 1, 2, 4, ... and n: means over problems.

    `<key>_se` is the standard error over problems, std / √Q. correct: bool [Q, n]. answers: [Q][n],
    None where a response has none; None for no cons@n.
    """
    n = np.shape(correct)[1]
    counts = np.sum(correct, axis=1).tolist()
    values = {"avg": [c / n for c in counts], "pass": [pass_at_k(n, c, n) for c in counts]}
    if answers is not None:
        values["cons"] = [consensus(a, c) for a, c in zip(answers, correct, strict=True)]
    for k in [*(2**i for i in range((n - 1).bit_length())), n]:
        values[f"pass_at_{k}"] = [pass_at_k(n, c, k) for c in counts]
    found = {}
    for name, x in values.items():
        found[name] = float(np.mean(x))
        found[f"{name}_se"] = float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0
    return found


class Answer(NamedTuple):
    """A judged response. sample: its index among the responses to the prompt."""

    prompt: Prompt
    sample: int
    response: Response
    verdict: Verdict


class SetResult(NamedTuple):
    """Metrics, without their `eval/<set>/` prefix, and the judged responses."""

    metrics: dict[str, Any]
    answers: list[Answer]


@dataclass(frozen=True)
class Evaluator:
    """Samples responses to held-out problems and judges them.

    `guard` is reached as `eval` after each segment, and before the verdicts are used.
    """

    section: EvalSection
    reward: RewardSection
    seed: int
    policy: Policy
    engine: Engine
    pool: RewardPool
    guard: Guard

    def evaluate_sets(
        self,
        sets: Mapping[str, Sequence[Prompt]],
        params: Params,
        info: Callable[[str], None],
        bars: bool = False,
    ) -> dict[str, SetResult]:
        k, results = self.section.samples_per_problem, {}
        for name, prompts in sets.items():
            with progress(len(prompts) * k, f"eval {name}", enabled=bars) as bar:
                results[name] = self._evaluate_set(prompts, params, bar.update)
            info(f"eval {name}: {_summary(results[name], k)}")
        return results

    def _evaluate_set(
        self, prompts: Sequence[Prompt], params: Params, on_done: Callable[[int], None]
    ) -> SetResult:
        """k responses to every problem. The noise of problem i, sample j is the same at every call,
        so two evaluations differ by their weights only."""
        k = self.section.samples_per_problem
        seed = jax.random.fold_in(jax.random.key(self.seed), 1)  # not that of training rollouts
        requests = [Request(i, j, p.tokens) for i, p in enumerate(prompts) for j in range(k)]

        def after_segment(count: int) -> None:
            on_done(count)
            self.guard.reach("eval")

        responses = self.engine.generate(params, requests, seed, after_segment)
        own = multihost.share(list(zip(requests, responses, strict=True)))
        texts = [decode(self.policy.tokenizer, r.tokens, self.policy.stop) for _, r in own]
        items = [
            RewardItem(prompts[q.draw].problem, text, len(r.tokens))
            for (q, r), text in zip(own, texts, strict=True)
        ]
        pending = self.pool.submit(items)
        self.guard.wait(pending.wait, "eval")
        verdicts = multihost.gather_verdicts(pending.result(), len(responses))
        check_errors(verdicts, self.reward)
        votes = None
        if self.reward.verifier == "strict":  # other verifiers do not expose the answer they read
            answers = [extract_answer(text) for text in texts]
            answers = multihost.gather_shares(answers, len(responses))
            votes = [answers[i : i + k] for i in range(0, len(answers), k)]
        problems = sorted((prompt.problem for prompt in prompts), key=lambda problem: problem.id)
        metrics = estimates(np.array([v.correct for v in verdicts]).reshape(-1, k), votes) | {
            "response_len_mean": float(np.mean([len(r.tokens) for r in responses])),
            "truncated_fraction": float(np.mean([r.truncated for r in responses])),
            "no_verdict": sum(v.error is not None for v in verdicts),
            "no_answer_fraction": no_answer_fraction(verdicts),
            "digest": problems_digest(problems),
        }
        judged = zip(requests, responses, verdicts, strict=True)
        return SetResult(metrics, [Answer(prompts[q.draw], q.sample, r, v) for q, r, v in judged])


def _summary(result: SetResult, k: int) -> str:
    m = result.metrics
    line = f"avg@{k} {m['avg']:.3f} ± {m['avg_se']:.3f}, pass@{k} {m['pass']:.3f}, "
    line += f"cons@{k} {m['cons']:.3f}, " if "cons" in m else ""
    line += f"{m['response_len_mean']:.0f} tokens, {m['truncated_fraction']:.1%} truncated"
    if m["no_answer_fraction"] > 0.1:
        line += f", {m['no_answer_fraction']:.0%} without an answer"
    if count := m["no_verdict"]:
        line += f"; {count} of {len(result.answers)} answers got no verdict and count as incorrect"
    return line


@contextlib.contextmanager
def checked_pool(
    section: RewardSection,
    template: str,
    source: str | None,
    sets: Mapping[str, Sequence[Prompt]],
    console: Console,
) -> Iterator[RewardPool]:
    """A reward pool that has judged the sets' ground truths; InputError if none can be correct."""
    with RewardPool(section, source) as pool:

        def judge(items: Sequence[RewardItem]) -> list[Verdict]:
            return multihost.gather_verdicts(pool.judge(multihost.share(items)), len(items))

        for name, prompts in sets.items():
            problems = [prompt.problem for prompt in prompts]
            for line in check_data(name, problems, template, section, judge):
                (console.result if line.startswith("warning") else console.info)(line)
        yield pool


def answer_row(answer: Answer, policy: Policy) -> dict[str, Any]:
    """One line of `--samples`. prompt: as fed. error: why there is no verdict."""
    problem, verdict = answer.prompt.problem, answer.verdict
    row: dict[str, Any] = {"id": problem.id, "sample": answer.sample, "answer": problem.answer}
    row |= judged_row(answer.response, verdict.correct, policy)
    row["prompt"] = shown_prompt(policy.tokenizer, answer.prompt.tokens)
    return row | {"extracted": extract_answer(row["response"]), "error": verdict.error}


def _parser() -> argparse.ArgumentParser:
    run = "--run-dir runs/tiny --best --json tiny.json"
    parser = cli.parser("evaluate", main.__doc__, run, "--config C.yaml --model exported")
    add = parser.add_argument
    text = "; its `eval` section names the sets (default: that of --run-dir)"
    said = "warnings, errors and one line per set"
    cli.add_config(parser, text, "eval.samples_per_problem=8", said)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run-dir", help="run folder; its newest usable checkpoint, unless:")
    cli.add_checkpoint(parser)
    model = "model to evaluate: a folder, gs://bucket/folder, or an id of the hub"
    which.add_argument("--model", metavar="FOLDER", help=model)
    add("--json", metavar="OUT", help="also write the results to this file, for dapo_jax.compare")
    add("--samples", metavar="OUT", help="also write every response and its verdict as JSON lines")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures held-out accuracy of a run's checkpoint or of a Hugging Face model on the config's
    evaluation sets."""
    args = _parser().parse_args(argv)
    for path in (args.json, args.samples):
        check_result(path)
    run_dir = run_folder(args.run_dir) if args.run_dir else None
    asked = restore.chosen_step(run_dir, args.step, args.best)
    config = restore.config_of(args.config, run_dir, args.set)
    if not config.eval.sets:
        raise InputError(f"{args.config or run_dir}: eval.sets: is empty; name a data set")
    config = setup.with_commit(config, run_dir) if run_dir else config
    policy = setup.load_policy(config, args.model)
    multihost.initialize()
    console = make_console(main=multihost.is_main(), quiet=args.quiet)
    sets = load_eval_sets(config.eval, config.data, policy.encoding, console.info)
    named = by_key(sets)
    source = function_source(config.reward.function)
    checkpoints = records_digest(run_dir / "checkpoints") if run_dir else None
    facts: dict[str, Any] = {"the reward function": source}
    facts |= {"the digest of the checkpoints in --run-dir": checkpoints, "--step": asked}
    setup.check_same_start(config, policy, named, facts)
    mesh = make_mesh(config.mesh)
    setup.check_divides(config, mesh, slots=True)
    console.info(setup.describe(policy, mesh))
    with checked_pool(config.reward, config.data.template, source, named, console) as pool:
        where = (run_dir, asked)
        step, weights = restore.rollout_weights(config, policy, mesh, *where, console.info)
        engine = setup.make_engine(config, policy, mesh, held_out=True)
        with Guard(config.train.stall_timeout_s) as guard:
            shared = (config.eval, config.reward, config.seed, policy)
            evaluator = Evaluator(*shared, engine, pool, guard)
            found = evaluator.evaluate_sets(sets, weights, console.result, console.bars)
    if args.json and multihost.is_main():
        keys = ("samples_per_problem", "temperature", "top_p")
        results = {"step": step} | {key: getattr(config.eval, key) for key in keys}
        results |= {"verifier": config.reward.verifier, "sets": {}}
        for name, (metrics, answers) in found.items():
            ids = [prompt.problem.id for prompt in sets[name]]
            correct = np.array([answer.verdict.correct for answer in answers]).reshape(len(ids), -1)
            accuracies = dict(zip(ids, correct.mean(axis=1).tolist(), strict=True))
            results["sets"][name] = {"problems": len(ids), **metrics, "accuracies": accuracies}
        write_result(args.json, json.dumps(results, indent=2) + "\n")
    if args.samples and multihost.is_main():
        rows = [
            {"set": name} | answer_row(answer, policy)
            for name, result in found.items()
            for answer in result.answers
        ]
        write_result(args.samples, "".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
