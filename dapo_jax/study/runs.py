"""Trains the rows of a study: one warm-up a seed, then every row from it, each in a process and a run folder of its own.

    <out>/warm/<seed>/                  the warm-up's policy, a Hugging Face folder that all rows start from
    <out>/configs/<row>.yaml            the row's config
    <out>/runs/<row>/<seed>/            its run folder; <seed>.log beside it is what it said

What is there is not done again, and a run that was interrupted goes on from its checkpoint. So the config of a row that has runs, and
of a warm-up that has been made, stays what it is (`refuse_other_study`).
"""

import concurrent.futures
import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from dapo_jax.config import Config, ConfigError, config_from_dict, dump_yaml, load_config
from dapo_jax.paths import Folder, as_path
from dapo_jax.runtime.folder import remove, write_whole, writing
from dapo_jax.runtime.metrics import read_metrics
from dapo_jax.study.ladder import Row, Study
from dapo_jax.train import MAY_CHANGE, difference
from dapo_jax.types import RunError, Stopped

# What may change while a row has runs: less than in a run folder, for all runs of a table draw and are evaluated alike.
_MAY_CHANGE = tuple(key for key in MAY_CHANGE if not key.startswith(("dapo.", "eval.")))
_NOT_OF_WARM_UP = ("dapo.", "eval.", "reward.")  # which the warm-up makes no use of


def row_key(study: Study, row: Row) -> str:
    """The row's name as files have it: `1_overlong_filtering`."""
    return f"{study.rows.index(row)}_{re.sub(r'[^a-z0-9]+', '_', row.name.lower()).strip('_')}"


def run_dir(out: Path, study: Study, row: Row, seed: int) -> Path:
    """The run folder of a row and a seed."""
    return out / "runs" / row_key(study, row) / str(seed)


def start_dir(study: Study, out: Path, seed: int) -> Folder:
    """The model folder that every row of a seed starts from; as text it is what `model.folder` takes, gs://... and hub ids too."""
    return out / "warm" / str(seed) if study.warm_up is not None else as_path(str(study.config.model.folder))


def last_step(folder: Path) -> int:
    """The last step of a run folder, 0 where there is none yet."""
    records = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    return records[-1]["step"] if records else 0


def is_done(folder: Path, steps: int) -> bool:
    """Whether a run folder holds the run's last step."""
    return last_step(folder) >= steps


def refuse_other_study(study: Study, out: Path) -> None:
    """Raises ConfigError if what is in `out` was made by another config than the study now has: it is not done again.

    Rows without runs may change, and so may what is no part of a result, as reward.workers. train.steps may grow, and the runs go on.
    """
    trained = [(row, folders) for row in study.rows if (folders := _made(out / "runs" / row_key(study, row)))]
    for row, folders in trained:
        config = config_from_dict(row.tree)
        _refuse_change(out / "configs" / f"{row_key(study, row)}.yaml", config, _MAY_CHANGE)
        for folder in folders:
            if (step := last_step(folder)) > config.train.steps:
                raise ConfigError(
                    f"{folder}: train.steps: is {config.train.steps} in the study, but this run has done {step}; "
                    f"give another --out, or set it to {step} or more"
                )
    if study.warm_up is not None and (trained or _made(out / "warm")):
        _refuse_change(out / "configs" / "warm_up.yaml", config_from_dict(study.warm_up), (*_MAY_CHANGE, *_NOT_OF_WARM_UP))


def _made(folder: Path) -> list[Path]:
    """The folders in it, by seed, that hold something made; one of a warm-up under way is called <seed>.part."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and path.suffix != ".part")


def _refuse_change(file: Path, config: Config, may_change: tuple[str, ...]) -> None:
    if file.is_file() and (changed := difference(load_config(file), config, may_change)):
        key, was, now = changed
        raise ConfigError(
            f"{file}: {key}: is {was!r}, by which something here was trained, but {now!r} in the study; give another --out, or set it back"
        )


def train_all(study: Study, out: Path, jobs: int, say: Callable[[str], None]) -> None:
    """Does all that is not done yet, `jobs` processes at a time: all rows of the first seed, then of the next.

    Raises RunError if a run fails, and Stopped on SIGTERM or SIGINT, after the runs under way have saved.
    """
    with writing(out):
        if study.warm_up is not None:
            write_whole(out / "configs" / "warm_up.yaml", dump_yaml(config_from_dict(study.warm_up)).encode())
        for row in study.rows:
            write_whole(out / "configs" / f"{row_key(study, row)}.yaml", dump_yaml(config_from_dict(row.tree)).encode())
    with _Processes(out / "cache", jobs) as processes, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        needed = study.seeds if study.warm_up is not None else ()
        warm = {seed: pool.submit(_warm_up, study, out, seed, processes, say) for seed in needed}

        def one(row: Row, seed: int) -> None:
            if seed in warm:
                warm[seed].result()
            _train(study, out, row, seed, processes, say)

        # Queued behind the warm-ups, which therefore never wait for a run that waits for them.
        runs = [pool.submit(one, row, seed) for seed in study.seeds for row in study.rows]
        try:
            for future in concurrent.futures.as_completed([*warm.values(), *runs]):
                future.result()
        except BaseException:
            for future in [*warm.values(), *runs]:
                future.cancel()
            processes.stop()
            raise


def _warm_up(study: Study, out: Path, seed: int, processes: "_Processes", say: Callable[[str], None]) -> None:
    folder, part = out / "warm" / str(seed), out / "warm" / f"{seed}.part"
    if folder.is_dir():
        return
    remove(part)
    say(f"seed {seed}: warm-up")
    config = str(out / "configs" / "warm_up.yaml")
    processes.run(["supervised", "--config", config, "--set", f"seed={seed}", "--out", str(part)], out / "warm" / f"{seed}.log")
    os.rename(part, folder)


def _train(study: Study, out: Path, row: Row, seed: int, processes: "_Processes", say: Callable[[str], None]) -> None:
    folder, steps = run_dir(out, study, row, seed), study.config.train.steps
    if is_done(folder, steps):
        return
    say(f"seed {seed}: {row.name}")
    start = (f"seed={seed}", f"model.folder={start_dir(study, out, seed)}", "model.architecture=null", "supervised.updates=0")
    command = ["train", "--config", str(out / "configs" / f"{row_key(study, row)}.yaml"), "--run-dir", str(folder)]
    processes.run(command + [word for change in start for word in ("--set", change)], folder.with_name(f"{seed}.log"))


class _Processes:
    """The verbs under way. Leaving ends them; they save first."""

    def __init__(self, cache: Path, jobs: int):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._shares: queue.Queue[list[int]] = queue.Queue()  # cores for a process each: sharing them all costs more than it gives
        for job in range(jobs):
            self._shares.put(cores[job % max(1, len(cores)) :: jobs])
        # The rows run much the same programs: what one has compiled, the others read. On a GPU each would take most of its memory.
        self._environment = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        if jobs > 1:
            self._environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.8 / jobs:.3f}"
        self._environment |= os.environ
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "_Processes":
        def heard(number: int, frame: object) -> None:
            raise Stopped(
                number, f"{signal.Signals(number).name}: stopped, and the runs under way saved; the same command goes on from there"
            )

        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def stop(self) -> None:
        """Asks what runs to save and end; nothing starts any more."""
        self._stopped.set()
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    def run(self, words: Sequence[str], log: Path) -> None:
        """Runs a verb to its end, its words appended to the log. RunError if it fails."""
        if self._stopped.is_set():
            return
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            output = open(log, "ab")
        share = self._shares.get()
        with output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"dapo_jax.{words[0]}", *words[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches it through `stop` alone, once
            )
            if share:
                os.sched_setaffinity(process.pid, share)
            self._running.add(process)
            if self._stopped.is_set():  # between the look above and now
                process.terminate()
            status = process.wait()
            self._running.discard(process)
        self._shares.put(share)
        if status and not self._stopped.is_set():
            lines = log.read_text("utf-8", "replace").splitlines() or ["it said nothing"]
            raise RunError(f"{log}: dapo_jax.{words[0]} ended with status {status}: {lines[-1][:200]}; mend that, then start again")
