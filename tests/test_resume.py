"""What a checkpoint is written for, and what is taken up from one, without disks or devices."""

import numpy as np
import pytest
from test_buffer import MIXED, PROBLEMS, make_group

from dapo_jax.dapo.buffer import DynamicSamplingBuffer
from dapo_jax.data.memory import PassMemory
from dapo_jax.data.problems import Cursor
from dapo_jax.drawing import OpenGroup
from dapo_jax.resume import DataDigests, Progress, Run, UnderWay, restore, save
from dapo_jax.runtime.checkpoint import Restored
from dapo_jax.types import InputError, Prompt

DATA = DataDigests("loaded", "trained on", "tokens")
PROMPTS = [Prompt(problem, np.array([1], np.int32)) for problem in PROBLEMS.values()]


class Folder:
    """Checkpoints that remember what was written."""

    def __init__(self):
        self.whole, self.interrupted = {}, []

    def latest_step(self):
        return max(self.whole, default=None)

    def steps(self):
        return list(self.whole)

    def save(self, step, state, host, groups):
        self.whole[step] = Restored(step, state, self._host(host), groups)

    def save_interrupted(self, step, state, host, groups):
        self.interrupted.append(Restored(step, state, self._host(host), groups))

    def restore(self, abstract_state, *, at_most=None):
        if at_most is None and self.interrupted:
            return self.interrupted[-1]
        return self.whole[max(step for step in self.whole if at_most is None or step <= at_most)]

    def _host(self, host):
        return {**host, "progress": list(host["progress"])}


def make_run(at=None):
    return Run(DynamicSamplingBuffer(2, True, True), PassMemory(len(PROMPTS), 1, 1), at or Progress(begun=True), state="weights")


def taken_up(folder, run, data=DATA, **options):
    assert restore(run, folder, None, prompts=PROMPTS, data=data, **options)
    return run


def write(run, folder):
    save(run, folder, config={}, data=DATA)


def test_a_rollback_is_written_once_and_taken_up():
    """The step that the run is back at has a whole checkpoint already, from before the rollback."""
    folder, run = Folder(), make_run(Progress(step=1, draws=8, begun=True))
    write(run, folder)
    write(run, folder)
    assert list(folder.whole) == [1] and not folder.interrupted
    back = Progress(step=1, draws=24, cursor=Cursor(2, 3), begun=True, rollbacks=1)
    run.at = back
    write(run, folder)
    write(run, folder)
    assert list(folder.whole) == [1] and len(folder.interrupted) == 1
    again = taken_up(folder, make_run())
    assert again.at == back
    write(again, folder)
    assert len(folder.interrupted) == 1  # nothing has happened since


@pytest.mark.parametrize("changed", [False, True])
def test_a_rollback_leaves_nothing_of_the_step_it_leaves(changed):
    """Groups drawn, groups left open, updates under way and problems that rest: none stays, also where the data set is another by now."""
    folder, run = Folder(), make_run(Progress(step=1, draws=1, begun=True))
    run.buffer.add([make_group(0, MIXED)])
    write(run, folder)

    run.buffer.add([make_group(draw, MIXED) for draw in (3, 4)])
    run.memory.record(2, True, 0)
    run.left_open = [OpenGroup(5, PROMPTS[0], 2)]
    run.under_way = UnderWay({}, [{"loss": np.nan}], [])
    run.at = run.at._replace(step=2, draws=6)
    taken_up(folder, run, DataDigests("other", "other", "other") if changed else DATA, allow_change=changed, at_most=1)
    assert (run.at.step, run.buffer.missing(), run.memory.resting(0)) == (1, 2 if changed else 1, 0)
    assert not run.left_open and run.under_way is None
    run.buffer.add([make_group(draw, MIXED) for draw in (6, 7)])
    groups, counts = run.buffer.take()
    assert [g.draw for g in groups] == ([6, 7] if changed else [0, 6]) and counts.drawn == (2 if changed else 3)


def test_prompts_of_other_tokens_are_other_data():
    """Of the same problems, by a tokenizer or chat template that has changed since."""
    folder, run = Folder(), make_run(Progress(step=1, draws=1, cursor=Cursor(1, 2), begun=True))
    run.buffer.add([make_group(0, MIXED)])
    write(run, folder)
    others = DATA._replace(tokens="others")
    with pytest.raises(
        InputError, match="^model.folder: its tokenizer or chat template makes other prompts than when the run was started; "
    ):
        taken_up(folder, make_run(), others)
    again = taken_up(folder, make_run(), others, allow_change=True)
    assert (again.at.cursor, again.buffer.missing()) == (Cursor(), 2)
    folder.whole[1].host.pop("tokens_digest")  # as an earlier version wrote it
    assert taken_up(folder, make_run(), others).buffer.missing() == 1
