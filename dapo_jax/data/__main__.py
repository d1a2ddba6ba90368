"""Prepares data sets, and prints what is in them. Uses no device.

python -m dapo_jax.data show    --config C                          rows as fed, and verdicts
python -m dapo_jax.data stats   --config C                          the data sets of a config
python -m dapo_jax.data stats   --source FILE [--tokenizer FOLDER]  any other data set
python -m dapo_jax.data prepare --source FILE --out FOLDER          a tensorflow-datasets folder
"""

import argparse
import dataclasses
import json
from typing import Any, NoReturn

import numpy as np

from dapo_jax import cli
from dapo_jax.config import (
    ArithmeticConfig,
    ColumnsConfig,
    Config,
    load_config,
    printable,
)
from dapo_jax.config.checks import build
from dapo_jax.data.mixture import load_training, mix
from dapo_jax.data.problems import LoadReport, load_problems
from dapo_jax.data.prompts import load_tokenizer, make_prompts, shown_prompt
from dapo_jax.data.rows import AS_USUAL
from dapo_jax.reward.golds import check_data
from dapo_jax.reward.pool import RewardItem, RewardPool
from dapo_jax.runtime.files import check_result, local_model, write_result
from dapo_jax.types import InputError, Problem

POINTS = {f"p{percent}": percent for percent in (50, 90, 95, 99)}
_MANY_TOKENS = 1 << 20  # of a prompt that is measured

# By name: problems, the counts of their rows, and their weight and share in a mixture.
Found = dict[str, tuple[list[Problem], LoadReport, dict[str, float]]]


def main(argv: list[str] | None = None) -> int:
    """Prepares data sets, and prints what is in them. Uses no device."""
    parser = cli.parser("data", __doc__, "show --config configs/tiny_cpu.yaml")
    verbs = parser.add_subparsers(required=True, metavar="prepare|show|stats")
    source = "a file, a folder or pattern of shards, here or at gs://bucket/..."

    sub = verbs.add_parser("prepare", help=prepare.__doc__, description=prepare.__doc__)
    sub.add_argument("--source", required=True, help=f"the problems of split `train`: {source}")
    sub.add_argument("--test", metavar="SOURCE", help="the problems of split `test`")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="to hold NAME/1.0.0")
    sub.add_argument("--name", default="problems", help="of the data set, e.g. dapo_math_17k")
    sub.set_defaults(run=prepare)

    for run in (stats, show):
        sub = verbs.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        which = sub.add_mutually_exclusive_group(required=True)
        which.add_argument("--config", help="YAML config: its data.train and eval.sets")
        which.add_argument("--source", help=f"one data set: {source}, or `arithmetic`")
        text = "override of the config"
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
        sub.add_argument("--heldout", action="store_true", help="the test split of --source")
        text = "of another model: a folder, gs://bucket/folder, or an id of the hub"
        sub.add_argument("--tokenizer", metavar="FOLDER", help=text)
        sub.set_defaults(run=run)
    sub.add_argument("--first", type=int, default=3, metavar="N", help="rows and failures shown")
    sub = verbs.choices["stats"]
    sub.add_argument("--json", metavar="OUT", help="also write the numbers to this file")

    columns = "as in a config, e.g. prompt=problem.text answer=label"
    for sub in verbs.choices.values():
        sub.add_argument("--columns", nargs="+", default=[], metavar="PART=COLUMN", help=columns)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Writes the distinct problems of a data set as a tensorflow-datasets folder (array_record)."""
    from dapo_jax.data import tfds_builder  # not at the top: slow to import

    how: Any = {"columns": named_columns(args.columns), "info": print}
    folder = tfds_builder.prepare(args.source, args.out, test=args.test, name=args.name, **how)
    print(f"wrote {folder}")


def show(args: argparse.Namespace) -> None:
    """Prints the first rows as they are fed to the model, and the verifier's verdict on every
    solution, or without solutions on answers made from the ground truths."""
    config, found = _loaded(args)
    section, reward, tokenizer = config.data, config.reward, _tokenizer(args, config)
    with RewardPool(reward) as pool:
        for name, (problems, report, _) in found.items():
            print(f"{name}: {report.source}, {len(problems):,} problems")
            for problem in problems[: args.first]:
                try:
                    [prompt], _ = make_prompts([problem], tokenizer, section)
                    fed = shown_prompt(tokenizer, prompt.tokens)
                except InputError as e:
                    fed = f"({e})"
                print(
                    f"---- {problem.id}: prompt as fed\n{fed}\n---- ground truth: {problem.answer}"
                )
                if problem.solution is not None:
                    print(f"---- solution: {problem.solution}")
            solved = [p for p in problems if p.solution]
            verdicts = pool.judge([RewardItem(p, p.solution or "", 0) for p in solved])
            pairs = [(p, v) for p, v in zip(solved, verdicts, strict=True) if not v.correct]
            if solved:
                correct = len(solved) - len(pairs)
                share = f"{correct:,} of {len(solved):,} ({correct / len(solved):.1%})"
                print(f"{name}: {share} solutions are correct by the {reward.verifier} verifier")
            else:
                _print_findings(args, config, name, problems, pool)
            for problem, verdict in pairs[: args.first]:
                why = verdict.error or "incorrect"
                print(f"---- {problem.id}: {why}; ground truth: {problem.answer}")
                print(problem.solution)


def _loaded(args: argparse.Namespace) -> tuple[Config, Found]:
    """The config and its data sets, or the defaults and --source. Needs no eval.sets."""
    if args.config and (args.columns or args.heldout):
        fix = "a config has `columns` in data.train and eval.sets"
        raise InputError(f"--columns, --heldout: go with --source; {fix}")
    if args.set and not args.config:
        raise InputError("--set: goes with --config")
    if not args.config:
        return Config(), _of_source(args)
    config = load_config(args.config, ["eval.every=0", *args.set])
    return config, _of_config(config)


def _tokenizer(args: argparse.Namespace, config: Config) -> Any:
    """That of --tokenizer or else of the config's model, fetched if needed; or the bytes."""
    name = args.tokenizer or config.model.folder
    return load_tokenizer(name and local_model(name).folder)


def stats(args: argparse.Namespace) -> None:
    """Prints the rows, skips and prompt lengths of one data set, or of those of a config."""
    check_result(args.json)
    config, found = _loaded(args)
    section = config.data
    tokenizer = _tokenizer(args, config) if args.config or args.tokenizer else None
    numbers = {}
    for name, (problems, report, drawn) in found.items():
        solved = sum(p.solution is not None for p in problems)
        own = numbers[name] = dataclasses.asdict(report) | drawn | {"with_solution": solved}
        counts = {f"problems from {report.rows:,} rows": report.problems, **report.counts()}
        counts["with a solution"] = solved
        notes = []
        if drawn:
            notes.append(f"{drawn['share']:>11.1%}  of the draws, weight {drawn['weight']:g}")
        if tokenizer is not None:
            unbounded = dataclasses.replace(section, max_prompt_len=_MANY_TOKENS)
            try:
                prompts, left_out = make_prompts(problems, tokenizer, unbounded)
            except InputError as e:
                notes.append(f"warning: {e}")
            else:
                lengths = length_stats([len(p.tokens) for p in prompts], section.max_prompt_len)
                own["prompt_tokens"] = lengths | {"left_out": left_out}
                counts |= {f"{what}, left out": count for what, count in left_out.items()}
                counts[f"longer than {section.max_prompt_len:,} tokens"] = lengths["too_long"]
                keys = ("min", "mean", *POINTS, "max")
                points = "  ".join(f"{key} {lengths[key]:,.5g}" for key in keys)
                notes.append(f"  prompt tokens: {points}")
        lines = [f"{count:>11,}  {what}" for what, count in counts.items()]
        print("\n".join(map(printable, [f"{name}: {report.source}", *lines, *notes])))
    if args.json:
        write_result(args.json, json.dumps(numbers, indent=2) + "\n")
    with RewardPool(config.reward) as pool:
        for name, (problems, *_) in found.items():
            _print_findings(args, config, name, problems, pool)


def _print_findings(
    args: argparse.Namespace, config: Config, name: str, problems: list[Problem], pool: RewardPool
) -> None:
    """Does the verifier suit the data set?"""
    try:
        lines = check_data(name, problems, config.data.template, config.reward, pool.judge)
    except InputError as e:
        if args.config:
            raise
        lines = [f"warning: {e}"]  # no config names the verifier of a source
    print("".join(f"{printable(line)}\n" for line in lines), end="")


def _of_config(config: Config) -> Found:
    section, found = config.data, Found()
    problems, reports = load_training(section)
    mixture = mix(section.train, problems)
    for n, report in enumerate(reports):
        own = [p for p in problems if p.source == report.source]
        drawn = {"weight": mixture.weights[n], "share": float(mixture.shares()[n])}
        if len(reports) > 1:
            found[f"data.train.{n}"] = own, report, drawn
        else:
            found["data.train"] = own, report, {}
    for name, one in config.eval.sets.items():
        how: Any = {"columns": one.columns or AS_USUAL, "heldout": True}
        found[f"eval.sets.{name}"] = (*load_problems(one.path, section.arithmetic, **how), {})
    return found


def _of_source(args: argparse.Namespace) -> Found:
    how: Any = {"columns": named_columns(args.columns), "heldout": args.heldout}
    return {"source": (*load_problems(args.source, ArithmeticConfig(), **how), {})}


def length_stats(lengths: list[int], max_prompt_len: int) -> dict[str, Any]:
    """The distribution of lengths in tokens. The p-th percentile is the shortest length that at
    least p% of the prompts do not exceed."""
    points = np.percentile(lengths, [*POINTS.values()], method="inverted_cdf").astype(int).tolist()
    found: dict[str, Any] = {"prompts": len(lengths), "max_prompt_len": max_prompt_len}
    found["too_long"] = sum(length > max_prompt_len for length in lengths)
    found |= {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)}
    return found | dict(zip(POINTS, points, strict=True))


def named_columns(pairs: list[str]) -> ColumnsConfig:
    """`["prompt=a.b", ...]` as a section of a config. Raises InputError for an unknown part."""

    def fail(part: str, message: str) -> NoReturn:
        raise InputError(f"--columns {part}: {message} (PART=COLUMN)")

    return build(ColumnsConfig, dict(pair.partition("=")[::2] for pair in pairs), fail)


if __name__ == "__main__":
    cli.run(main)
