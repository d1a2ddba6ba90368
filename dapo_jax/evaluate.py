"""Held-out accuracy: avg@k, pass@k and cons@k with standard errors.

python -m dapo_jax.evaluate --config C --run-dir D          the newest checkpoint of a run
python -m dapo_jax.evaluate --config C --model FOLDER       a model as in `model.folder`
"""

import argparse
import collections
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dapo_jax.config import Config, load_config
from dapo_jax.data.problems import load_problems
from dapo_jax.data.prompts import decode, make_prompts
from dapo_jax.policy import Policy, describe, load_params, load_policy, make_engine, restore_params, with_commit
from dapo_jax.reward.pool import RewardItem, RewardPool, check_errors
from dapo_jax.reward.verify import extract_answer
from dapo_jax.rollout.engine import Engine
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime import multihost
from dapo_jax.runtime.folder import run_folder, write_result
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.mesh import make_mesh, publisher
from dapo_jax.runtime.metrics import progress
from dapo_jax.types import InputError, Params, Prompt, Request


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k is right) from `correct` of `samples`: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the {samples} samples, got {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def consensus(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Is the most frequent answer right? Ties go to the answer seen first; responses without an answer do not vote."""
    votes = collections.Counter(a for a in answers if a is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # most_common keeps first-seen order among equals
    return bool(correct[list(answers).index(winner)])


def estimates(correct: np.ndarray, answers: Sequence[Sequence[str | None]]) -> dict[str, float]:
    """avg@k with its standard error, pass@k and cons@k.

    The standard error is over problems, std of the problems' accuracies / √Q: samples of one problem are no
    independent evidence.

    Args:
      correct: bool [Q, k]. answers: Q lists of k extracted answers, None where a response has none.
    """
    per_problem = np.asarray(correct, np.float64).mean(axis=1)
    q, k = np.shape(correct)
    return {
        "avg": float(per_problem.mean()),
        "avg_se": float(per_problem.std(ddof=1) / math.sqrt(q)) if q > 1 else 0.0,
        "pass": float(np.mean([pass_at_k(k, int(c.sum()), k) for c in correct])),
        "cons": float(np.mean([consensus(a, c) for a, c in zip(answers, correct, strict=True)])),
    }


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
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Samples every problem k times and judges the responses.

    The noise of problem i, sample j is the same at every call, so that two evaluations differ by their weights only.
    `guard` is reached as `eval` after each segment, and before the verdicts are used.

    Returns:
      (metrics without their `eval/<set>/` prefix, one row a response).
    """
    k = config.eval.samples_per_problem
    seed = jax.random.fold_in(jax.random.key(config.seed), 1)  # apart from training rollouts
    requests = [Request(i, j, prompt.tokens) for i, prompt in enumerate(prompts) for j in range(k)]

    def after_segment(count: int) -> None:
        on_done(count)
        guard.reach("eval")

    responses = engine.generate(params, requests, seed, after_segment)
    texts = [decode(policy.tokenizer, r.tokens, policy.stop) for r in responses]
    items = [RewardItem(prompts[q.draw].problem, text, len(r.tokens)) for q, text, r in zip(requests, texts, responses, strict=True)]
    pending = pool.submit(multihost.share(items))
    guard.wait(pending.wait, "eval")
    verdicts = multihost.gather_verdicts(pending.result(), len(items))
    check_errors(verdicts, config.reward)
    correct = np.array([v.correct for v in verdicts]).reshape(-1, k)
    answers = [[extract_answer(text) for text in texts[i : i + k]] for i in range(0, len(texts), k)]
    metrics = estimates(correct, answers) | {
        "response_len_mean": float(np.mean([len(r.tokens) for r in responses])),
        "truncated_fraction": float(np.mean([r.truncated for r in responses])),
    }
    rows = [
        {
            "id": prompts[q.draw].problem.id,
            "sample": q.sample,
            "answer": prompts[q.draw].problem.answer,
            "response": text,
            "correct": v.correct,
        }
        for q, text, v in zip(requests, texts, verdicts, strict=True)
    ]
    return metrics, rows


def evaluate_sets(
    sets: Mapping[str, Sequence[Prompt]],
    config: Config,
    *,
    engine: Engine,
    params: Params,
    policy: Policy,
    pool: RewardPool,
    guard: Guard,
    say: Callable[[str], None],
) -> dict[str, tuple[dict[str, float], list[dict[str, Any]]]]:
    """`evaluate_set` on each set, with a line for people. Returns (metrics, rows) by set."""
    k, results = config.eval.samples_per_problem, {}
    for name, prompts in sets.items():
        with progress(len(prompts) * k, f"eval {name}", enabled=multihost.is_main()) as bar:
            m, rows = evaluate_set(prompts, config, engine=engine, params=params, policy=policy, pool=pool, guard=guard, on_done=bar.update)
        say(
            f"eval {name}: avg@{k} {m['avg']:.3f} ± {m['avg_se']:.3f}  pass@{k} {m['pass']:.3f}  cons@{k} {m['cons']:.3f}  "
            f"length {m['response_len_mean']:.0f}, {m['truncated_fraction']:.1%} truncated  "
            f"({len(prompts)} problems, {config.reward.verifier} verifier)"
        )
        results[name] = m, rows
    return results


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of right responses of each problem, from rows of `evaluate_set`: what two evaluations are compared by."""
    verdicts: dict[str, list[bool]] = {}
    for row in rows:
        verdicts.setdefault(row["id"], []).append(row["correct"])
    return {problem: float(np.mean(correct)) for problem, correct in verdicts.items()}


def load_sets(config: Config, policy: Policy, say: Callable[[str], None]) -> dict[str, list[Prompt]]:
    """The evaluation sets of a config, rendered to prompts."""
    sets = {}
    for name, source in config.eval.sets.items():
        problems, report = load_problems(source, config.data.arithmetic, heldout=True)
        problems = problems[: config.eval.max_problems]
        sets[name], skipped = make_prompts(problems, policy.tokenizer, config.data)
        left_out = "".join(f", {count} skipped: {reason}" for reason, count in skipped.items())
        say(f"eval/{name}: {report.summary()}; {len(sets[name])} used{left_out}")
    return sets


def eval_sampling(config: Config) -> Sampling:
    return Sampling(config.eval.temperature, config.eval.top_p)


def main(argv: list[str] | None = None) -> int:
    """Measures held-out accuracy of a run's newest checkpoint or of a Hugging Face model on the config's eval sets."""
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.evaluate", description=main.__doc__)
    parser.add_argument("--config", required=True, help="YAML config; its `eval` section says what and how")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run-dir", help="run folder of dapo_jax.train; its newest usable checkpoint is evaluated")
    where.add_argument("--model", metavar="FOLDER", help="model to evaluate: a folder, gs://bucket/folder, or an id of the hub")
    parser.add_argument("--json", metavar="OUT", help="also write the results to this file; `python -m dapo_jax.compare` reads two of them")
    parser.add_argument("--samples", metavar="OUT", help="also write every response and its verdict to this file, a JSON object a line")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. eval.samples_per_problem=8")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    if not config.eval.sets:
        raise InputError(f"{args.config}: eval.sets: is empty; name a data set")
    run_dir = run_folder(args.run_dir) if args.run_dir else None
    policy = load_policy(with_commit(config, run_dir)) if run_dir else load_policy(config, args.model)
    multihost.initialize()
    say = print if multihost.is_main() else lambda line: None
    sets = load_sets(config, policy, say)
    mesh = make_mesh(config.mesh)
    say(describe(policy, mesh))
    if run_dir:
        step, params = restore_params(run_dir, policy, mesh)
        say(f"checkpoint of step {step}")
    else:
        step, params = None, load_params(config, policy, mesh)
    weights = publisher(params, mesh, policy.model.compute_dtype)(params)
    engine = make_engine(config, policy, mesh, eval_sampling(config))
    with Guard(config.train.stall_timeout_s) as guard, RewardPool(config.reward) as pool:
        found = evaluate_sets(sets, config, engine=engine, params=weights, policy=policy, pool=pool, guard=guard, say=say)
    results = {
        "step": step,
        "samples_per_problem": config.eval.samples_per_problem,
        "verifier": config.reward.verifier,
        "sets": {name: {"problems": len(sets[name]), **m, "accuracies": accuracies(rows)} for name, (m, rows) in found.items()},
    }
    if args.json and multihost.is_main():
        write_result(args.json, json.dumps(results, indent=2) + "\n")
    if args.samples and multihost.is_main():
        write_result(args.samples, "".join(json.dumps({"set": name} | row) + "\n" for name, (_, rows) in found.items() for row in rows))
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
