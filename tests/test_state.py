"""What a checkpoint is written for, and what is taken up from one, without disks or devices."""

import json
import types

import numpy as np
import pytest
from flax import serialization
from groups import MIXED, PROBLEMS, make_group
from refusals import refusal

from dapo_jax.dapo.buffer import DynamicSamplingBuffer
from dapo_jax.data.inputs import Digests
from dapo_jax.data.problems import Cursor
from dapo_jax.runtime.checkpoint import Restored
from dapo_jax.runtime.records import plain
from dapo_jax.training.dynamic_sampling import DrawState, OpenGroup, Sample
from dapo_jax.training.state import PartialStep, Progress, RunState, RunStore
from dapo_jax.types import (
    NoCheckpointError,
    NonFiniteError,
    Prompt,
    Response,
    Verdict,
)

DATA = Digests("loaded", "trained on", "tokens", None)
PROMPTS = [Prompt(problem, np.array([1], np.int32)) for problem in PROBLEMS.values()]
CONFIG = {"supervised": {"updates": 0}}


class Folder:
    """Checkpoints that remember what was written."""

    def __init__(self):
        self.saved, self.whole = [], {}

    def steps(self):
        return list(self.whole)

    def save(self, step, state, host, groups, *, partial):
        groups = serialization.msgpack_restore(serialization.msgpack_serialize(plain(groups)))
        host = json.loads(json.dumps(host))
        self.saved.append(Restored(f"checkpoints/{step}", step, state, host, groups))
        if not partial:
            self.whole.setdefault(step, self.saved[-1])

    def restore(self, abstract_state, *, at_most=None):
        if at_most is None:
            return self.saved[-1]
        return self.whole[max(step for step in self.whole if step <= at_most)]


def make_run(draw=DrawState(), **progress):  # noqa: B008
    buffer = DynamicSamplingBuffer(2, True, True)
    return RunState(buffer, Progress(begun=True, **progress), draw, state="weights")


def restored(folder, run, data=DATA, allow_change=False, at_most=None):
    store = RunStore(folder, None, PROMPTS, CONFIG, data, allow_change)
    assert store.restore(run, at_most=at_most)
    return run


def write(run, folder):
    RunStore(folder, None, PROMPTS, CONFIG, DATA).save(run)


def test_a_rollback_is_written_once_and_restored():
    """The step that the run was rolled back to has a whole checkpoint from before the rollback."""
    folder, run = Folder(), make_run(DrawState(draws=8), step=1)
    write(run, folder)
    write(run, folder)
    assert len(folder.saved) == 1
    run.progress = run.progress._replace(rollbacks=1)
    run.draw = DrawState(Cursor(2, 3), 24)
    write(run, folder)
    write(run, folder)
    assert list(folder.whole) == [1] and len(folder.saved) == 2
    again = restored(folder, make_run())
    assert (again.progress, again.draw) == (run.progress, run.draw)
    write(again, folder)
    assert len(folder.saved) == 2  # nothing has happened since


@pytest.mark.parametrize("changed", [False, True])
def test_a_rollback_leaves_nothing_of_the_step_it_leaves(changed):
    """Groups drawn, groups left open and updates of a partial step: none stays, also where the data set is
    another by now.
    """
    folder, run = Folder(), make_run(DrawState(draws=1), step=1)
    run.buffer.add([make_group(0, MIXED)])
    write(run, folder)

    run.buffer.add([make_group(draw, MIXED) for draw in (3, 4)])
    run.draw = DrawState(draws=6, open=(OpenGroup(5, 0, [Sample()] * 2),))
    run.partial = PartialStep({}, [{"loss": np.nan}])
    run.progress = run.progress._replace(step=2)
    other = Digests("other", "other", "other", None)
    restored(folder, run, other if changed else DATA, allow_change=changed, at_most=1)
    assert (run.progress.step, run.buffer.missing()) == (1, 2 if changed else 1)
    assert not run.draw.open and run.partial is None
    run.buffer.add([make_group(draw, MIXED) for draw in (6, 7)])
    groups, counts = run.buffer.take()
    assert [g.draw for g in groups] == ([6, 7] if changed else [0, 6]) and counts.drawn == (
        2 if changed else 3
    )


def test_a_run_rolled_back_to_step_0_has_begun():
    """Its checkpoint was saved after the warm-up, before the evaluation that begins a run."""
    folder, run = Folder(), make_run(DrawState(draws=1))
    run.progress = run.progress._replace(begun=False)
    write(run, folder)
    run.progress = run.progress._replace(begun=True, step=1)
    run.draw = DrawState(draws=4)
    dropped, store = [], RunStore(folder, None, PROMPTS, CONFIG, DATA)
    log = types.SimpleNamespace(rollback=dropped.append)
    with store.rolling_back(run, 1, log, lambda line: None):
        raise NonFiniteError("update 2")
    assert run.progress == Progress(begun=True, rollbacks=1) and dropped == [0]
    assert restored(folder, make_run()).progress.begun and run.draw.draws == 4


def test_prompts_of_other_tokens_are_other_data():
    """Of the same problems, by a tokenizer or chat template that has changed since."""
    folder, run = Folder(), make_run(DrawState(Cursor(1, 2), 1), step=1)
    run.buffer.add([make_group(0, MIXED)])
    write(run, folder)
    others = DATA._replace(tokens="others")
    with refusal("model.folder: its tokenizer or chat template "):
        restored(folder, make_run(), others)
    again = restored(folder, make_run(), others, allow_change=True)
    assert (again.draw, again.buffer.missing()) == (DrawState(draws=1), 2)


WHOLE = Response(np.array([4, 5], np.int32), np.zeros(2, np.float32), True, ((1, 1), (2, 1)))
SO_FAR = Response(np.array([4], np.int32), np.zeros(1, np.float32), False, ((2, 1),))
OPEN = OpenGroup(5, 0, [Sample(WHOLE, True, Verdict(True, 1.0)), Sample(SO_FAR)])
DRAWN = {"rollout/prompts": 2, "rollout/tokens": 7.0, "filter/wasted_tokens": 0}
PARTIAL = PartialStep(DRAWN, [{"loss": 0.5, "skipped": 0.0}])


def put(value, *keys):
    """A change of one value of (host, groups)."""

    def change(host, groups):
        *path, last = keys
        at = {"host": host, "groups": groups}
        for key in path:
            at = at[key]
        at[last] = value

    return change


BUFFERED, BEGUN = ("groups", "buffer", "groups", 0), ("groups", "draw", "open", 0, "samples", 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda host, groups: host.pop("progress"),
        put(None, "host", "progress"),
        put(1, "host", "progress", "more"),
        put("1", "host", "progress", "step"),
        put(7, "host", "progress", "step"),
        put(-1, "host", "progress", "updates"),
        put(True, "host", "progress", "warmed"),
        lambda host, groups: host.pop("digests"),
        put("x", "host", "digests", "more"),
        put(0, "groups", "draw", "cursor"),
        put([0, "first"], "groups", "draw", "cursor"),
        put(-1, "groups", "draw", "draws"),
        put(float("nan"), "groups", "draw", "keep_rate"),
        put(None, "groups", "draw", "keep_rate"),
        put([1], "groups", "partial", "drawn"),
        put({"no/metric": 1.0}, "groups", "partial", "drawn"),
        put({"rollout/tokens": "many"}, "groups", "partial", "drawn"),
        put({"rollout/tokens": 7.0}, "groups", "partial", "drawn"),
        put(float("inf"), "groups", "partial", "drawn", "rollout/prompts"),
        put(["loss"], "groups", "partial", "sums"),
        put([{"loss": 1.0}], "groups", "partial", "sums"),
        lambda host, groups: groups["buffer"].pop("counts"),
        put([0] * 99, "groups", "buffer", "counts"),
        put(np.array([True]), *BUFFERED, "correct"),
        put(np.zeros((1, 2), np.float32), *BUFFERED, "reward"),
        put([1, 2], *BUFFERED, "prompt", "tokens"),
        put(np.array([1.5]), *BUFFERED, "responses", 0, "tokens"),
        put(7, *BUFFERED, "prompt", "problem", "id"),
        put(99, "groups", "draw", "open", 0, "problem"),
        put(-1, "groups", "draw", "open", 0, "problem"),
        put(np.zeros(7, np.float32), *BEGUN, "response", "behavior_logprobs"),
        put([True], *BEGUN, "verdict"),
        put(1, "host", "progress", "begun"),
        put("1", "groups", "draw", "keep_rate"),
        put("6", "groups", "buffer", "last_draw"),
        put(b"p0", *BUFFERED, "prompt", "problem", "id"),
        put("yes", *BEGUN, "ended"),
    ],
)
def test_what_a_forged_checkpoint_says_is_one_line(change):
    """Its digests hold, so that it is this module that sees what cannot be."""
    folder, run = Folder(), make_run(DrawState(draws=6, open=(OPEN,)), step=1)
    run.buffer.add([make_group(0, MIXED)])
    run.partial = PARTIAL
    write(run, folder)
    (forged,) = folder.saved
    again = restored(folder, make_run())
    assert again.partial == PARTIAL and again.draw.open[0].tokens() == OPEN.tokens() == 3
    change(forged.host, forged.groups)
    with refusal("checkpoints/1: ...run state ...malformed", NoCheckpointError):
        restored(folder, make_run())
