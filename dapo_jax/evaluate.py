"""Held-out accuracy: avg@k, pass@k and cons@k with standard errors.

python -m dapo_jax.evaluate --config C --run-dir D          the newest checkpoint of a run
python -m dapo_jax.evaluate --config C --model FOLDER       a model as in `model.folder`
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dapo_jax.config import Config, load_config
from dapo_jax.data.problems import load_problems, problems_digest
from dapo_jax.data.prompts import decode, make_prompts, without
from dapo_jax.data.rows import AS_USUAL
from dapo_jax.reward.golds import check_data
from dapo_jax.reward.pool import (
    RewardItem,
    RewardPool,
    check_errors,
    error_counts,
    no_answer_fraction,
)
from dapo_jax.reward.verify import extract_answer, function_source
from dapo_jax.rollout.engine import Engine
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime import multihost
from dapo_jax.runtime.checkpoint import records_digest
from dapo_jax.runtime.console import Console, make_console, progress
from dapo_jax.runtime.files import run_folder, write_result
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.mesh import make_mesh, publisher
from dapo_jax.training.setup import (
    Policy,
    check_divides,
    check_started_alike,
    describe,
    load_params,
    load_policy,
    make_engine,
    restore_params,
    with_commit,
)
from dapo_jax.types import InputError, Params, Prompt, Request, Response, Verdict


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k is right) from `correct` of `samples`: 1 - C(n-c, k)
    / C(n, k) (arXiv 2107.03374).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 0, 4)
    (0.25, 0.5, 0.0)
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the {samples} samples, got {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def consensus(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> bool:
    """Is the most frequent answer right?

    Ties go to the answer seen first; responses without an answer do not vote.

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
    """avg@n, pass@n, cons@n, and pass@k for k = 1, 2, 4, ... and n, as `pass_at_<k>`; each a mean
    over problems with its standard error.

    The standard error is over problems, std of the problems' values / √Q: samples of one problem
    are no independent evidence.

    Args: correct: bool [Q, n]. answers: Q lists of n extracted answers, or of what stands for them,
      None where a response has none; None,
        and no cons@n, where nobody knows which responses give the same answer.
    """
    n = np.shape(correct)[1]
    right = np.sum(correct, axis=1).tolist()
    of_problems = {
        "avg": [c / n for c in right],
        "pass": [pass_at_k(n, c, n) for c in right],
        **(
            {}
            if answers is None
            else {"cons": [consensus(a, c) for a, c in zip(answers, correct, strict=True)]}
        ),
        **{
            f"pass_at_{k}": [pass_at_k(n, c, k) for c in right]
            for k in [*(2**i for i in range((n - 1).bit_length())), n]
        },
    }
    return {
        key: number
        for name, values in of_problems.items()
        for key, number in _mean(name, values).items()
    }


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    q = len(values)
    return {
        name: float(np.mean(values)),
        f"{name}_se": float(np.std(values, ddof=1) / math.sqrt(q)) if q > 1 else 0.0,
    }


class Answer(NamedTuple):
    """A judged response."""

    prompt: Prompt
    sample: int  # which of the responses to the prompt
    response: Response
    verdict: Verdict


def evaluate_set(
    prompts: Sequence[Prompt],
    config: Config,
    *,
    engine: Engine,
    params: Params,
    policy: Policy,
    pool: RewardPool,
    guard: Guard,
    on_done: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, Any], list[Answer]]:
    """Samples every problem k times and judges the responses.

    Votes, cons@k, are of the strict verifier only, whose answers are texts: others judge responses
    and do not say which ones agree.

    The noise of problem i, sample j is the same at every call, so that two evaluations differ by
    their weights only. `guard` is reached as `eval` after each segment, and before the verdicts are
    used.

    Returns:
      (metrics without their `eval/<set>/` prefix, the judged responses).
    """
    k = config.eval.samples_per_problem
    seed = jax.random.fold_in(jax.random.key(config.seed), 1)  # apart from training rollouts
    requests = [Request(i, j, prompt.tokens) for i, prompt in enumerate(prompts) for j in range(k)]

    def after_segment(count: int) -> None:
        on_done(count)
        guard.reach("eval")

    responses = engine.generate(params, requests, seed, after_segment)
    own = multihost.share(list(zip(requests, responses, strict=True)))
    texts = [decode(policy.tokenizer, r.tokens, policy.stop) for _, r in own]
    pending = pool.submit(
        [
            RewardItem(prompts[q.draw].problem, text, len(r.tokens))
            for (q, r), text in zip(own, texts, strict=True)
        ]
    )
    guard.wait(pending.wait, "eval")
    verdicts = multihost.gather_verdicts(pending.result(), len(responses))
    check_errors(verdicts, config.reward)
    correct = np.array([v.correct for v in verdicts]).reshape(-1, k)
    votes = None
    if config.reward.verifier == "strict":  # other verifiers read answers in ways of their own
        gathered = multihost.gather_shares(
            np.array([_vote(extract_answer(text)) for text in texts], np.int64), len(responses)
        )
        votes = [
            [vote or None for vote in of_problem] for of_problem in gathered.reshape(-1, k).tolist()
        ]
    metrics = estimates(correct, votes) | {
        "response_len_mean": float(np.mean([len(r.tokens) for r in responses])),
        "truncated_fraction": float(np.mean([r.truncated for r in responses])),
        "no_verdict": sum(error_counts(verdicts)),
        "no_answer_fraction": no_answer_fraction(verdicts),
        "digest": problems_digest(
            sorted((prompt.problem for prompt in prompts), key=lambda problem: problem.id)
        ),
    }
    return metrics, [
        Answer(prompts[q.draw], q.sample, r, v)
        for q, r, v in zip(requests, responses, verdicts, strict=True)
    ]


def _vote(answer: str | None) -> int:
    """A number that stands for an answer, so that processes can tell each other which ones are
    equal; 0 for none.
    """
    return (
        0
        if answer is None
        else int.from_bytes(
            hashlib.sha256(answer.encode("utf-8", "surrogatepass")).digest()[:8], signed=True
        )
    )


def answer_row(answer: Answer, policy: Policy) -> dict[str, Any]:
    """A response and its verdict, for people."""
    text = decode(policy.tokenizer, answer.response.tokens, policy.stop)
    return {
        "id": answer.prompt.problem.id,
        "sample": answer.sample,
        "answer": answer.prompt.problem.answer,
        "response": text,
        "extracted": extract_answer(text),
        "correct": answer.verdict.correct,
        "error": answer.verdict.error,  # why there is no verdict
        "length": len(answer.response.tokens),
        "truncated": bool(answer.response.truncated),
    }


def evaluate_sets(
    sets: Mapping[str, Sequence[Prompt]],
    config: Config,
    *,
    engine: Engine,
    params: Params,
    policy: Policy,
    pool: RewardPool,
    guard: Guard,
    info: Callable[[str], None],
    bars: bool = False,
) -> dict[str, tuple[dict[str, Any], list[Answer]]]:
    """`evaluate_set` on each set, with a line for people.

    Returns (metrics, judged responses) by set.
    """
    k, results = config.eval.samples_per_problem, {}
    for name, prompts in sets.items():
        with progress(len(prompts) * k, f"eval {name}", enabled=bars) as bar:
            m, answers = evaluate_set(
                prompts,
                config,
                engine=engine,
                params=params,
                policy=policy,
                pool=pool,
                guard=guard,
                on_done=bar.update,
            )
        cons = f"cons@{k} {m['cons']:.3f}, " if "cons" in m else ""
        unread = (
            f", {m['no_answer_fraction']:.0%} without an answer"
            if m["no_answer_fraction"] > 0.1
            else ""
        )
        info(
            f"eval {name}: avg@{k} {m['avg']:.3f} ± {m['avg_se']:.3f}, pass@{k} {m['pass']:.3f}, {cons}"
            f"{m['response_len_mean']:.0f} tokens, {m['truncated_fraction']:.1%} truncated{unread}"
            + (
                f"; {m['no_verdict']} of {len(answers)} answers got no verdict and count as incorrect"
                if m["no_verdict"]
                else ""
            )
        )
        results[name] = m, answers
    return results


def accuracies(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of right responses of each problem: what two evaluations are compared by."""
    verdicts: dict[str, list[bool]] = {}
    for answer in answers:
        verdicts.setdefault(answer.prompt.problem.id, []).append(answer.verdict.correct)
    return {problem: float(np.mean(correct)) for problem, correct in verdicts.items()}


def load_sets(
    config: Config, policy: Policy, info: Callable[[str], None]
) -> dict[str, list[Prompt]]:
    """The evaluation sets of a config, rendered to prompts."""
    sets = {}
    for name, one in config.eval.sets.items():
        columns = one.columns or AS_USUAL
        problems, report = load_problems(
            one.path, config.data.arithmetic, columns=columns, heldout=True
        )
        problems = problems[: config.eval.max_problems]
        sets[name], skipped = make_prompts(
            problems, policy.tokenizer, config.data, policy.model.vocab_size
        )
        left_out = "".join(f", {count} skipped: {reason}" for reason, count in skipped.items())
        info(f"eval/{name}: {report.summary()}; {len(sets[name])} used{left_out}")
    return sets


def not_held_out(
    prompts: Sequence[Prompt],
    eval_sets: Mapping[str, Sequence[Prompt]],
    info: Callable[[str], None],
) -> list[Prompt]:
    """The prompts that may be trained on: those that no evaluation set holds.

    Says how many are left out.
    """
    kept = without(prompts, itertools.chain(*eval_sets.values()))
    if held := len(prompts) - len(kept):
        info(f"problems: {held} of the prompts are in eval.sets too, and left out of training")
    return kept


@contextlib.contextmanager
def checked_pool(
    config: Config, source: str | None, sets: Mapping[str, Sequence[Prompt]], console: Console
) -> Iterator[RewardPool]:
    """A reward pool that suits the data: what it finds of the sets' ground truths is said, or
    raised, before it is used.
    """

    def judge(items: Sequence[RewardItem]) -> list[Verdict]:
        return multihost.gather_verdicts(pool.judge(multihost.share(items)), len(items))

    with RewardPool(config.reward, source) as pool:
        for name, prompts in sets.items():
            for line in check_data(
                name, [p.problem for p in prompts], config.data.template, config.reward, judge
            ):
                (console.result if line.startswith("warning") else console.info)(line)
        yield pool


def eval_sampling(config: Config) -> Sampling:
    return Sampling(config.eval.temperature, config.eval.top_p)


def main(argv: list[str] | None = None) -> int:
    """Measures held-out accuracy of a run's newest checkpoint or of a Hugging Face model on the
    config's eval sets.
    """
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.evaluate", description=main.__doc__)
    parser.add_argument(
        "--config", required=True, help="YAML config; its `eval` section says what and how"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--run-dir", help="run folder of dapo_jax.train; its newest usable checkpoint is evaluated"
    )
    where.add_argument(
        "--model",
        metavar="FOLDER",
        help="model to evaluate: a folder, gs://bucket/folder, or an id of the hub",
    )
    parser.add_argument(
        "--json",
        metavar="OUT",
        help="also write the results to this file; `python -m dapo_jax.compare` reads two of them",
    )
    parser.add_argument(
        "--samples",
        metavar="OUT",
        help="also write every response and its verdict to this file, a JSON object a line",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. eval.samples_per_problem=8",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="only warnings, errors and a line of each set"
    )
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    if not config.eval.sets:
        raise InputError(f"{args.config}: eval.sets: is empty; name a data set")
    run_dir = run_folder(args.run_dir) if args.run_dir else None
    policy = (
        load_policy(with_commit(config, run_dir)) if run_dir else load_policy(config, args.model)
    )
    multihost.initialize()
    console = make_console(main=multihost.is_main(), quiet=args.quiet)
    info = console.info
    sets = load_sets(config, policy, info)
    source = function_source(config.reward.function)
    checkpoints = records_digest(run_dir / "checkpoints") if run_dir else None
    facts = {
        "the reward function": source,
        "the digest of the checkpoints in --run-dir": checkpoints,
    }
    named = {f"eval.sets.{name}": prompts for name, prompts in sets.items()}
    check_started_alike(config, policy, named, facts)
    mesh = make_mesh(config.mesh)
    check_divides(config, mesh, slots=True)
    info(describe(policy, mesh))
    with checked_pool(config, source, named, console) as pool:
        if run_dir:
            step, params = restore_params(run_dir, policy, mesh)
            info(f"checkpoint of step {step}")
        else:
            step, params = None, load_params(config, policy, mesh)
        weights = publisher(params, mesh, policy.model.compute_dtype)(params)
        engine = make_engine(config, policy, mesh, eval_sampling(config))
        with Guard(config.train.stall_timeout_s) as guard:
            found = evaluate_sets(
                sets,
                config,
                engine=engine,
                params=weights,
                policy=policy,
                pool=pool,
                guard=guard,
                info=console.result,
                bars=console.bars,
            )
    results = {
        "step": step,
        "samples_per_problem": config.eval.samples_per_problem,
        "temperature": config.eval.temperature,
        "top_p": config.eval.top_p,
        "verifier": config.reward.verifier,
        "sets": {
            name: {"problems": len(sets[name]), **m, "accuracies": accuracies(answers)}
            for name, (m, answers) in found.items()
        },
    }
    if args.json and multihost.is_main():
        write_result(args.json, json.dumps(results, indent=2) + "\n")
    if args.samples and multihost.is_main():
        rows = (
            {"set": name} | answer_row(answer, policy)
            for name, (_, answers) in found.items()
            for answer in answers
        )
        write_result(args.samples, "".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
