"""A copy of a run's metrics in Weights & Biases or MLflow; metrics.jsonl stays the record.

    train.tracker: wandb   <run>/wandb/ for `wandb sync --append`; at once if WANDB_MODE is online
    train.tracker: mlflow  <run>/mlflow.db, or the server that MLFLOW_TRACKING_URI names

A thread sends the lines, so a tracker that hangs does not slow the run, and one that fails does not
stop it; a failure is reported once. A resumed run continues its tracker run, whose id is in
<run>/tracker.json, and sends repeated steps again. API keys come from the environment and are
written nowhere.
"""

import contextlib
import importlib.util
import json
import logging
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dapo_jax.config import printable
from dapo_jax.runtime.files import Folder, is_bucket, read, write_whole
from dapo_jax.types import InputError

Kind = Literal["wandb", "mlflow"]
Send = Callable[[int, Mapping[str, float]], None]  # (step, numbers)

_WAITING = 1000  # lines at most; a tracker that falls further behind loses some
_PATIENCE_S = 30.0  # for the last lines, at the end of a run
_KEYS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
_PARAMS = 100  # of MLflow: parameters per call
_VALUE = 500  # of MLflow: characters of a parameter


def check_tracker(kind: Kind | None, run_dir: Folder) -> None:
    """Raises InputError for a tracker that is not installed, or that would write local files where
    the run folder is in a bucket. Imports nothing."""
    if kind is None:
        return
    if importlib.util.find_spec(kind) is None:
        raise InputError(
            f"train.tracker: {kind} is not installed; pip install -e '.[{kind}]' in the checkout, "
            "or set train.tracker to null"
        )
    needed = "WANDB_MODE=online" if kind == "wandb" else "MLFLOW_TRACKING_URI"
    name, _, value = needed.partition("=")
    if is_bucket(run_dir) and os.environ.get(name, "") in ("", "offline"):
        raise InputError(
            f"train.tracker: {kind} would keep files in {run_dir}, and a bucket cannot hold them; "
            f"set {needed}"
        )


class Tracker:
    """Context manager around a run. `send` takes its lines.

    kind: None does nothing. config: flat. info: gets a message once if the tracker fails.
    """

    def __init__(
        self, kind: Kind | None, run_dir: Folder, config: Mapping[str, Any], info: Callable
    ):
        self._kind, self._run_dir, self._config, self._info = kind, run_dir, config, info
        self._lines: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"{kind} tracker", daemon=True)
        self._failed = False

    def __enter__(self) -> "Tracker":
        if self._kind is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._lines.put_nowait(None)
            self._thread.join(_PATIENCE_S)
            if self._thread.is_alive():
                self._report(f"has not taken the last lines within {_PATIENCE_S:g} s")

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Queues a line; never blocks."""
        if self._thread.is_alive():
            try:
                self._lines.put_nowait((step, numbers))
            except queue.Full:
                self._report("is too slow and loses lines")

    def _work(self) -> None:
        opened = _wandb if self._kind == "wandb" else _mlflow
        try:
            with opened(self._run_dir, self._config) as send:
                while (line := self._lines.get()) is not None:
                    send(*line)
        except BaseException as e:  # foreign code may raise anything
            words = printable((str(e) or type(e).__name__).splitlines()[0])
            for name in _KEYS:  # before the text is cut: no part of a key stays
                words = words.replace(os.environ.get(name) or name, name)
            self._report(f"has failed ({words[:200]}) and gets no more lines")

    def _report(self, what: str) -> None:
        if not self._failed:
            self._failed = True
            self._info(
                f"train.tracker: {self._kind} {what}; the run continues, and metrics.jsonl has "
                "every line"
            )


@contextlib.contextmanager
def _wandb(run_dir: Folder, config: Mapping[str, Any]) -> Iterator[Send]:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    name = _known(run_dir).get("wandb") or uuid.uuid4().hex[:8]
    _remember(run_dir, "wandb", name)
    # Nothing about the machine, its command line, its code, its console.
    private = (
        "silent disable_code disable_git x_disable_machine_info x_disable_meta x_disable_stats"
    )
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "dapo_jax"),
        id=name,
        name=_name(run_dir),
        resume="allow",
        mode=os.environ.get("WANDB_MODE", "offline"),
        dir=tempfile.gettempdir() if is_bucket(run_dir) else str(run_dir),
        config=dict(config),
        settings=wandb.Settings(console="off", **dict.fromkeys(private.split(), True)),
    )
    run.define_metric("*", step_metric="step")  # wandb's own step cannot go back
    yield lambda step, numbers: run.log({"step": step, **numbers})
    run.finish()


@contextlib.contextmanager
def _mlflow(run_dir: Folder, config: Mapping[str, Any]) -> Iterator[Send]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    import mlflow
    from mlflow.entities import Metric, Param, RunStatus

    local = f"sqlite:///{Path(run_dir).resolve() / 'mlflow.db'}"
    client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
    if run := _known(run_dir).get("mlflow"):
        client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))
    else:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dapo_jax")
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        run = client.create_run(experiment, run_name=_name(run_dir)).info.run_id
        _remember(run_dir, "mlflow", run)
        params = [Param(key, str(value)[:_VALUE]) for key, value in config.items()]
        for at in range(0, len(params), _PARAMS):
            client.log_batch(run, params=params[at : at + _PARAMS])

    def send(step: int, numbers: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(key, float(value), now, step) for key, value in numbers.items()]
        client.log_batch(run, metrics=metrics)

    yield send
    client.set_terminated(run)


def _name(run_dir: Folder) -> str:
    return run_dir.name if is_bucket(run_dir) else Path(run_dir).resolve().name


def _known(run_dir: Folder) -> dict[str, str]:
    """Ids of the run's tracker runs; none if they cannot be read."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        found = json.loads(read(run_dir / "tracker.json") or b"{}")
        return {kind: name for kind, name in found.items() if isinstance(name, str)}
    return {}


def _remember(run_dir: Folder, kind: Kind, name: str) -> None:
    ids = json.dumps(_known(run_dir) | {kind: name})
    write_whole(run_dir / "tracker.json", f"{ids}\n".encode())
