"""A run's metrics in Weights & Biases or MLflow: a copy of metrics.jsonl, which stays the record.

    train.tracker: wandb      <run>/wandb/, to be sent with `wandb sync --append`; at once where WANDB_MODE is online
    train.tracker: mlflow     <run>/mlflow.db; the server that MLFLOW_TRACKING_URI names where it is set

A thread of its own hands the lines on, so that a tracker that hangs does not slow the run, and one
that fails does not stop it: that is said once. A run that goes on continues its tracker run, whose
id lies in <run>/tracker.json. Steps that are done again are sent again, as a run replays them: the
same numbers, unless it was taken back by optim.rollback_steps. Keys of a tracker come from the
environment, and none is written anywhere.
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
from dapo_jax.runtime.files import Folder, is_bucket, read, reason, write_whole
from dapo_jax.types import InputError

Kind = Literal["wandb", "mlflow"]
Send = Callable[[int, Mapping[str, float]], None]  # (step, numbers)

_WAITING = 1000  # lines at most; a tracker that falls further behind loses some
_PATIENCE_S = 30.0  # at the end of a run, for lines that are under way; all is saved by then
_KEYS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
_PARAMS = 100  # that MLflow takes at a time
_VALUE = 500  # characters of a parameter that every MLflow takes


def check_tracker(kind: Kind | None, run_dir: Folder) -> None:
    """Raises InputError for a tracker that is not installed, or keeps files where the run folder
    cannot hold them. Imports nothing.
    """
    if kind is None:
        return
    if importlib.util.find_spec(kind) is None:
        raise InputError(
            f"train.tracker: {kind} is not installed; pip install 'dapo_jax[{kind}]', or set train.tracker to null"
        )
    if is_bucket(run_dir) and _is_local(kind):
        needed = "WANDB_MODE=online" if kind == "wandb" else "MLFLOW_TRACKING_URI"
        raise InputError(
            f"train.tracker: {kind} would keep files in {run_dir}, and a bucket cannot hold them; set {needed}"
        )


class Tracker:
    """Context manager around a run. `send` takes its lines.

    kind: None does nothing. config: flat, what the tracker shows of the run. info: told once if the
    tracker fails.
    """

    def __init__(
        self,
        kind: Kind | None,
        run_dir: Folder,
        config: Mapping[str, Any],
        info: Callable[[str], None],
    ):
        self._kind, self._run_dir, self._config, self._info = kind, run_dir, config, info
        self._lines: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._lost = False

    def __enter__(self) -> "Tracker":
        if self._kind is not None:
            self._thread = threading.Thread(
                target=self._work, name=f"{self._kind} tracker", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._lines.put_nowait(None)
            self._thread.join(_PATIENCE_S)
            if self._thread.is_alive():
                self._complain(f"has not taken the last lines within {_PATIENCE_S:g} s")

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hands on a line, and waits for nothing."""
        if self._thread is not None and self._thread.is_alive():
            try:
                self._lines.put_nowait((step, numbers))
            except queue.Full:
                self._complain("is too slow and loses lines")

    def _work(self) -> None:
        assert self._kind is not None
        opened = _wandb if self._kind == "wandb" else _mlflow
        try:
            with opened(self._run_dir, self._config) as send:
                while (line := self._lines.get()) is not None:
                    send(*line)
        except BaseException as e:  # a stranger's code, which may do anything
            self._complain(f"has failed ({_words(e)}) and gets no more lines")

    def _complain(self, what: str) -> None:
        if not self._lost:
            self._lost = True
            self._info(
                f"train.tracker: {self._kind} {what}; the run goes on, and metrics.jsonl has them all"
            )


@contextlib.contextmanager
def _wandb(run_dir: Folder, config: Mapping[str, Any]) -> Iterator[Send]:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    name = _known(run_dir).get("wandb") or uuid.uuid4().hex[:8]
    _remember(run_dir, "wandb", name)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "dapo_jax"),
        id=name,
        name=run_dir.name if is_bucket(run_dir) else Path(run_dir).resolve().name,
        resume="allow",
        mode=os.environ.get("WANDB_MODE", "offline"),
        dir=tempfile.gettempdir() if is_bucket(run_dir) else str(run_dir),
        config=dict(config),
        # Nothing of the machine, its command line, its code, its console.
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
        ),
    )
    run.define_metric("*", step_metric="step")  # its own counter refuses to go back
    yield lambda step, numbers: run.log({"step": step, **numbers})
    run.finish()


@contextlib.contextmanager
def _mlflow(run_dir: Folder, config: Mapping[str, Any]) -> Iterator[Send]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    import mlflow
    from mlflow.entities import Metric, Param, RunStatus

    client = mlflow.MlflowClient(
        os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{Path(run_dir).resolve() / 'mlflow.db'}"
    )
    run = _known(run_dir).get("mlflow")
    if run is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dapo_jax")
        found = client.get_experiment_by_name(name)
        run = client.create_run(
            found.experiment_id if found else client.create_experiment(name), run_name=run_dir.name
        ).info.run_id
        _remember(run_dir, "mlflow", run)
        params = [Param(key, str(value)[:_VALUE]) for key, value in config.items()]
        for at in range(0, len(params), _PARAMS):
            client.log_batch(run, params=params[at : at + _PARAMS])
    else:
        client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))

    def send(step: int, numbers: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(
            run, metrics=[Metric(key, float(value), now, step) for key, value in numbers.items()]
        )

    yield send
    client.set_terminated(run)


def _is_local(kind: Kind) -> bool:
    """Whether the tracker writes files, and reaches no server."""
    return (
        os.environ.get("WANDB_MODE", "offline") == "offline"
        if kind == "wandb"
        else not os.environ.get("MLFLOW_TRACKING_URI")
    )


def _known(run_dir: Folder) -> dict[str, str]:
    """Ids of the tracker runs that this run has begun. What cannot be read counts as none."""
    try:
        found = json.loads(read(run_dir / "tracker.json") or b"{}")
    except (ValueError, RecursionError):
        return {}
    return (
        {kind: name for kind, name in found.items() if isinstance(name, str)}
        if isinstance(found, dict)
        else {}
    )


def _remember(run_dir: Folder, kind: Kind, name: str) -> None:
    write_whole(
        run_dir / "tracker.json", (json.dumps(_known(run_dir) | {kind: name}) + "\n").encode()
    )


def _words(error: BaseException) -> str:
    """What an error says, without the keys of a tracker."""
    words = printable(reason(error) if isinstance(error, Exception) else type(error).__name__)
    for name in _KEYS:
        if value := os.environ.get(name):
            words = words.replace(value, name)
    return words
