"""Prepares data sets, and says what is in them. Touches no device.

python -m dapo_jax.data stats   --config C                               the training and evaluation sets of a config
python -m dapo_jax.data stats   --source FILE [--tokenizer FOLDER]       any other data set
python -m dapo_jax.data prepare --source FILE --out FOLDER --name NAME   a tensorflow-datasets folder, read by random access
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
from dapo_jax.data.problems import Watch, load_problems
from dapo_jax.data.prompts import load_tokenizer, prompt_lengths
from dapo_jax.data.rows import AS_USUAL
from dapo_jax.data.stats import length_stats, set_stats, table
from dapo_jax.reward.golds import check_data
from dapo_jax.reward.pool import RewardPool
from dapo_jax.runtime.console import progress
from dapo_jax.runtime.files import write_result
from dapo_jax.types import InputError, Problem

Found = dict[
    str, tuple[dict[str, Any], list[Problem]]
]  # numbers and problems, by what a data set is called


def main(argv: list[str] | None = None) -> int:
    """Prepares data sets, and says what is in them. Touches no device."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m dapo_jax.data", description=__doc__, formatter_class=raw
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="prepare|stats")

    sub = verbs.add_parser("prepare", help=prepare.__doc__, description=prepare.__doc__)
    sub.add_argument(
        "--source",
        required=True,
        help="a data set: a file, a folder or pattern of shards, here or at gs://bucket/...",
    )
    sub.add_argument(
        "--test", metavar="SOURCE", help="problems to evaluate on, which become the split `test`"
    )
    sub.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="where FOLDER/NAME/1.0.0 is to be, here or in a bucket",
    )
    sub.add_argument(
        "--name", default="problems", help="of the data set, e.g. dapo_math_17k (default problems)"
    )
    sub.set_defaults(run=prepare)

    sub = verbs.add_parser("stats", help=stats.__doc__, description=stats.__doc__)
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="YAML config: its data.train and eval.sets")
    which.add_argument(
        "--source", help="one data set: a file, a folder, a pattern, or `arithmetic`"
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override of the config, e.g. data.max_prompt_len=1024",
    )
    sub.add_argument(
        "--heldout",
        action="store_true",
        help="of a source that has both: the problems to evaluate on",
    )
    sub.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="measures prompts with the tokenizer of this model folder, not the config's",
    )
    sub.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    sub.set_defaults(run=stats)

    for sub in verbs.choices.values():
        text = "what is in which column, as in `columns` of a data set in a config, e.g. prompt=problem.text answer=label"
        sub.add_argument("--columns", nargs="+", default=[], metavar="PART=COLUMN", help=text)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Writes the distinct problems of a data set as a tensorflow-datasets folder (array_record)."""
    from dapo_jax.data import tfds_builder  # not at the top: slow to import

    with progress(None, "rows") as bar:
        folder = tfds_builder.prepare(
            args.source,
            args.out,
            test=args.test,
            name=args.name,
            columns=named_columns(args.columns),
            watch=bar.update,
            info=bar.write,
        )
    print(f"wrote {folder}")


def stats(args: argparse.Namespace) -> None:
    """Says what is in the data sets of a config, or in one data set: rows, what became of them, and
    how long the prompts are.
    """
    if args.config and (args.columns or args.heldout):
        raise InputError(
            "--columns, --heldout: go with --source; a config has `columns` in data.train and eval.sets"
        )
    if args.set and not args.config:
        raise InputError("--set: goes with --config")
    config = load_config(args.config, args.set) if args.config else None
    section = config.data if config else DataSection()
    with progress(None, "rows") as bar:
        found = _of_config(config, bar.update) if config else _of_source(args, bar.update)
    if config or args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer or (config.model.folder if config else None))
        for one, problems in found.values():
            one["prompt_tokens"] = length_stats(
                *prompt_lengths(problems, tokenizer, section), section.max_prompt_len
            )
    for name, (one, _) in found.items():
        print("\n".join(printable(line) for line in table(name, one)))
    if args.json:
        write_result(
            args.json, json.dumps({name: one for name, (one, _) in found.items()}, indent=2) + "\n"
        )
    reward = config.reward if config else RewardSection()
    with RewardPool(reward) as pool:
        for name, (_, problems) in found.items():
            try:
                lines = check_data(name, problems, section.template, reward, pool.judge)
            except InputError as e:
                if config:
                    raise
                lines = [f"warning: {e}"]  # of a source alone, nothing says which verifier is meant
            print("".join(f"{printable(line)}\n" for line in lines), end="")


def _of_config(config: Config, watch: Watch) -> Found:
    section, found = config.data, {}
    problems, reports = load_training(section, watch)
    mixture = mix(section.train, problems)
    for number, (report, weight, share) in enumerate(
        zip(reports, mixture.weights, mixture.shares(), strict=True)
    ):
        own = [p for p in problems if p.source == report.source]
        drawn = {"weight": weight, "share": float(share)} if len(reports) > 1 else {}
        found[f"data.train.{number}" if drawn else "data.train"] = (
            set_stats(report, own) | drawn,
            own,
        )
    for name, one in config.eval.sets.items():
        columns = one.columns or AS_USUAL
        own, report = load_problems(
            one.path, section.arithmetic, columns=columns, heldout=True, watch=watch
        )
        found[f"eval.sets.{name}"] = set_stats(report, own), own
    return found


def _of_source(args: argparse.Namespace, watch: Watch) -> Found:
    columns = named_columns(args.columns)
    problems, report = load_problems(
        args.source, ArithmeticConfig(), columns=columns, heldout=args.heldout, watch=watch
    )
    return {"source": (set_stats(report, problems), problems)}


def named_columns(pairs: list[str]) -> ColumnsConfig:
    """`["prompt=a.b", ...]` as a section of a config. Raises InputError for what is none."""
    parts = [field.name for field in dataclasses.fields(ColumnsConfig)]
    given = dict(pair.partition("=")[::2] for pair in pairs)
    for part, column in given.items():
        if part not in parts or not column.strip():
            raise InputError(
                f"--columns {printable(part)[:60]}: expected PART=COLUMN, where PART is one of {', '.join(parts)}"
            )
    return dataclasses.replace(AS_USUAL, **given)


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
