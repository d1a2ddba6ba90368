"""The paper's ablation in miniature: every part of DAPO switched on in turn, several seeds each, equal budgets, one table and one figure.

    python -m dapo_jax.study --config configs/study_arithmetic_cpu.yaml --out runs/study

Start it again to go on: what has been trained is not trained again. Rows and seeds may be added, and train.steps may grow; another config
for a row that has runs is refused. <out>/ gets table.md, figure.png, study.json and the run folders, which `dapo_jax.report` reads like
any others.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapo_jax.config import Config, config_from_dict, to_dict
from dapo_jax.model.weights import DESCRIPTION_FILES
from dapo_jax.paths import Folder
from dapo_jax.runtime.folder import write_whole, writing
from dapo_jax.runtime.models import local_model
from dapo_jax.study.figure import draw_study
from dapo_jax.study.ladder import Study, load_study
from dapo_jax.study.order import bias, draw_pools, leaked
from dapo_jax.study.runs import refuse_other_study, start_dir, train_all
from dapo_jax.study.summary import as_markdown, budget, estimate, read_runs, summarize
from dapo_jax.types import InputError

_POOLS = 8  # of prompts a seed, on which it is seen what dynamic sampling leaves undone
_MEASURED = ("model", "data", "rollout", "reward", "dapo", "optim", "supervised")  # sections that this depends on


def main(argv: list[str] | None = None) -> int:
    """Trains every row of a study with every seed, and writes one table and one figure. Goes on where an earlier start ended."""
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.study", description=main.__doc__)
    parser.add_argument("--config", required=True, help="YAML of the study, e.g. configs/study_arithmetic_cpu.yaml")
    parser.add_argument("--out", required=True, help="folder of the study: made if missing, gone on with if not")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the CPU cores (default 1)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the study's seeds")
    parser.add_argument("--summary", action="store_true", help="train nothing; table and figure of the runs that are there")
    args = parser.parse_args(argv)
    study, out = load_study(args.config), Path(args.out)
    if args.jobs < 1:
        raise InputError(f"--jobs: expected at least 1, got {args.jobs}; correct it")
    if args.seeds is not None:
        if unknown := sorted(set(args.seeds) - set(study.seeds)):
            raise InputError(f"--seeds: {unknown} are not among the study's seeds {list(study.seeds)}; correct them")
        study = dataclasses.replace(study, seeds=tuple(args.seeds))
    refuse_other_study(study, out)
    if not args.summary:
        train_all(study, out, args.jobs, lambda line: print(line, flush=True))
    rows = read_runs(study, out)
    if not any(rows):
        raise InputError(f"{out}: holds no finished run yet; start the study without --summary")
    without = undone(study, out)
    table = summarize(study, rows)
    text = as_markdown(study, table)
    with writing(out):
        write_whole(out / "table.md", text.encode())
        write_whole(out / "figure.png", draw_study(study, rows, without))
        write_whole(out / "study.json", json.dumps(_plain({"tokens": budget(rows), "rows": table, "without": without}), indent=1).encode())
    print(text)
    for name, value in without.items():
        print(f"{name}: {value.mean:.4g} ± {value.error:.2g}")
    return 0


def undone(study: Study, out: Path) -> dict[str, Any]:
    """What `order.bias` and `order.leaked` find with the policies that rows start from: an Estimate over seeds of each number.

    A seed's numbers are kept in <out>/undone/<seed>.json, with the digest of the config that they were measured by.
    """
    found, digest = [], _measured_by(study)
    for seed in study.seeds:
        start, file = start_dir(study, out, seed), out / "undone" / f"{seed}.json"
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if kept.get("config") != digest:
            if not _is_to_be_had(study, start):
                continue
            kept = {"config": digest, "numbers": _undone(study.config, seed, start)}
            with writing(out):
                write_whole(file, json.dumps(kept).encode())
        found.append(kept["numbers"])
    return {name: estimate([numbers[name] for numbers in found]) for name in (found[0] if found else ())}


def _is_to_be_had(study: Study, start: Folder) -> bool:
    """Whether the policy that rows start from is here, in its bucket or on the hub. Finished runs have a table without it too."""
    if study.warm_up is not None:
        return start.is_dir()
    try:
        local_model(str(start), DESCRIPTION_FILES)
    except InputError as e:
        print(f"what dynamic sampling leaves undone is not measured: {e}", flush=True)
        return False
    return True


def _measured_by(study: Study) -> str:
    """SHA-256 of all that the policies that rows start from, and what is sampled of them, depend on."""
    trees = [to_dict(config_from_dict(tree)) for tree in (study.warm_up, study.rows[0].tree) if tree is not None]
    return hashlib.sha256(json.dumps([{name: tree[name] for name in _MEASURED} for tree in trees], sort_keys=True).encode()).hexdigest()


def _undone(config: Config, seed: int, start: Folder) -> dict[str, float]:
    model = dataclasses.replace(config.model, architecture=None, folder=str(start))
    pools = draw_pools(dataclasses.replace(config, seed=seed, model=model), _POOLS)
    share = functools.partial(leaked, pools, config.reward, max_response_len=config.rollout.max_response_len)
    leaks = {f"leaked_{normalizer}": share(normalizer=normalizer) for normalizer in ("seq-mean-token-mean", "token-mean")}
    return bias(pools, config.dapo.prompts_per_step) | leaks


def _plain(value: Any) -> Any:
    """JSON without NaN: an Estimate as [mean, standard error, seeds]."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
