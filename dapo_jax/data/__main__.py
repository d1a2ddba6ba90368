"""Prepares data sets, and prints what is in them. Uses no device.

python -m dapo_jax.data stats   --config C                          the data sets of a config
python -m dapo_jax.data stats   --source FILE [--tokenizer FOLDER]  any other data set
python -m dapo_jax.data prepare --source FILE --out FOLDER          a tensorflow-datasets folder
"""

import argparse
import dataclasses
import json
from typing import Any

from dapo_jax.config import (
    ArithmeticConfig,
    ColumnsConfig,
    Config,
    DataSection,
    RewardSection,
    load_config,
    printable,
)
from dapo_jax.data.mixture import load_training, mix
from dapo_jax.data.problems import load_problems
from dapo_jax.data.prompts import load_tokenizer, prompt_lengths
from dapo_jax.data.rows import AS_USUAL
from dapo_jax.data.stats import length_stats, set_stats, table
from dapo_jax.reward.golds import check_data
from dapo_jax.reward.pool import RewardPool
from dapo_jax.runtime.files import write_result
from dapo_jax.types import InputError, Problem

Found = dict[str, tuple[dict[str, Any], list[Problem]]]  # numbers and problems, by name


def main(argv: list[str] | None = None) -> int:
    """Prepares data sets, and prints what is in them. Uses no device."""
    how: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.data", description=__doc__, **how)
    verbs = parser.add_subparsers(required=True, metavar="prepare|stats")
    source = "a file, a folder or pattern of shards, here or at gs://bucket/..."

    sub = verbs.add_parser("prepare", help=prepare.__doc__, description=prepare.__doc__)
    sub.add_argument("--source", required=True, help=f"the problems of split `train`: {source}")
    sub.add_argument("--test", metavar="SOURCE", help="the problems of split `test`")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="to hold NAME/1.0.0")
    sub.add_argument("--name", default="problems", help="of the data set, e.g. dapo_math_17k")
    sub.set_defaults(run=prepare)

    sub = verbs.add_parser("stats", help=stats.__doc__, description=stats.__doc__)
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="YAML config: its data.train and eval.sets")
    which.add_argument("--source", help=f"one data set: {source}, or `arithmetic`")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the config"
    )
    sub.add_argument("--heldout", action="store_true", help="the test split of --source")
    sub.add_argument("--tokenizer", metavar="FOLDER", help="a model folder, to measure prompts")
    sub.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    sub.set_defaults(run=stats)

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


def stats(args: argparse.Namespace) -> None:
    """Prints the rows, skips and prompt lengths of one data set, or of those of a config."""
    if args.config and (args.columns or args.heldout):
        fix = "a config has `columns` in data.train and eval.sets"
        raise InputError(f"--columns, --heldout: go with --source; {fix}")
    if args.set and not args.config:
        raise InputError("--set: goes with --config")
    config = load_config(args.config, args.set) if args.config else None
    section, reward = (config.data, config.reward) if config else (DataSection(), RewardSection())
    found = _of_config(config) if config else _of_source(args)
    if config or args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer or (config.model.folder if config else None))
        for numbers, problems in found.values():
            lengths = prompt_lengths(problems, tokenizer, section)
            numbers["prompt_tokens"] = length_stats(*lengths, section.max_prompt_len)
    for name, (numbers, _) in found.items():
        print("\n".join(printable(line) for line in table(name, numbers)))
    if args.json:
        content = {name: numbers for name, (numbers, _) in found.items()}
        write_result(args.json, json.dumps(content, indent=2) + "\n")
    with RewardPool(reward) as pool:
        for name, (_, problems) in found.items():
            try:
                lines = check_data(name, problems, section.template, reward, pool.judge)
            except InputError as e:
                if config:
                    raise
                lines = [f"warning: {e}"]  # no config names the verifier of a source
            for line in lines:
                print(printable(line))


def _of_config(config: Config) -> Found:
    section, found = config.data, {}
    problems, reports = load_training(section)
    mixture = mix(section.train, problems)
    for n, (report, weight) in enumerate(zip(reports, mixture.weights, strict=True)):
        own = [p for p in problems if p.source == report.source]
        drawn = {"weight": weight, "share": float(mixture.shares()[n])}
        several = len(reports) > 1
        numbers = set_stats(report, own) | (drawn if several else {})
        found[f"data.train.{n}" if several else "data.train"] = numbers, own
    for name, one in config.eval.sets.items():
        how: Any = {"columns": one.columns or AS_USUAL, "heldout": True}
        own, report = load_problems(one.path, section.arithmetic, **how)
        found[f"eval.sets.{name}"] = set_stats(report, own), own
    return found


def _of_source(args: argparse.Namespace) -> Found:
    how: Any = {"columns": named_columns(args.columns), "heldout": args.heldout}
    problems, report = load_problems(args.source, ArithmeticConfig(), **how)
    return {"source": (set_stats(report, problems), problems)}


def named_columns(pairs: list[str]) -> ColumnsConfig:
    """`["prompt=a.b", ...]` as a section of a config. Raises InputError for an unknown part."""
    parts = [field.name for field in dataclasses.fields(ColumnsConfig)]
    given = dict(pair.partition("=")[::2] for pair in pairs)
    for part, column in given.items():
        if part not in parts or not column.strip():
            expected = f"expected PART=COLUMN, where PART is one of {', '.join(parts)}"
            raise InputError(f"--columns {printable(part)[:60]}: {expected}")
    return dataclasses.replace(AS_USUAL, **given)


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
