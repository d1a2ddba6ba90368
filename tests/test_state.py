"""What a checkpoint is written for, and what is taken up from one, without disks or devices."""

import numpy as np
import pytest
from test_buffer import MIXED, PROBLEMS, make_group

from dapo_jax.dapo.buffer import DynamicSamplingBuffer
from dapo_jax.data.problems import Cursor
from dapo_jax.runtime.checkpoint import Restored
from dapo_jax.training.dynamic_sampling import OpenGroup
from dapo_jax.training.state import DataDigests, PartialStep, Progress, Run, restore, save
from dapo_jax.types import InputError, NoCheckpointError, Prompt

DATA = DataDigests("loaded", "trained on", "tokens")
PROMPTS = [Prompt(problem, np.array([1], np.int32)) for problem in PROBLEMS.values()]


class Folder:
    """Checkpoints that remember what was written."""

    def __init__(self):
        self.saved, self.whole = [], {}

    def steps(self):
        return list(self.whole)

    def save(self, step, state, host, groups, *, partial):
        host = {**host, "progress": list(host["progress"])}
        self.saved.append(Restored(f"checkpoints/{step}", step, state, host, groups))
        if not partial:
            self.whole.setdefault(step, self.saved[-1])

    def restore(self, abstract_state, *, at_most=None):
        if at_most is None:
            return self.saved[-1]
        return self.whole[max(step for step in self.whole if step <= at_most)]


def make_run(at=None):
    return Run(
        DynamicSamplingBuffer(2, True, True),
        at or Progress(begun=True),
        state="weights",
    )


def taken_up(folder, run, data=DATA, **options):
    assert restore(run, folder, None, prompts=PROMPTS, data=data, **options)
    return run


def write(run, folder):
    save(run, folder, config={}, data=DATA, function=None)


def test_a_rollback_is_written_once_and_taken_up():
    """The step that the run is back at has a whole checkpoint already, from before the rollback."""
    folder, run = Folder(), make_run(Progress(step=1, draws=8, begun=True))
    write(run, folder)
    write(run, folder)
    assert len(folder.saved) == 1
    back = Progress(step=1, draws=24, cursor=Cursor(2, 3), begun=True, rollbacks=1)
    run.at = back
    write(run, folder)
    write(run, folder)
    assert list(folder.whole) == [1] and len(folder.saved) == 2
    again = taken_up(folder, make_run())
    assert again.at == back
    write(again, folder)
    assert len(folder.saved) == 2  # nothing has happened since


@pytest.mark.parametrize("changed", [False, True])
def test_a_rollback_leaves_nothing_of_the_step_it_leaves(changed):
    """Groups drawn, groups left open and updates under way: none stays, also where the data set is
    another by now.
    """
    folder, run = Folder(), make_run(Progress(step=1, draws=1, begun=True))
    run.buffer.add([make_group(0, MIXED)])
    write(run, folder)

    run.buffer.add([make_group(draw, MIXED) for draw in (3, 4)])
    run.left_open = [OpenGroup(5, PROMPTS[0], 2)]
    run.partial = PartialStep({}, [{"loss": np.nan}])
    run.at = run.at._replace(step=2, draws=6)
    taken_up(
        folder,
        run,
        DataDigests("other", "other", "other") if changed else DATA,
        allow_change=changed,
        at_most=1,
    )
    assert (run.at.step, run.buffer.missing()) == (1, 2 if changed else 1)
    assert not run.left_open and run.partial is None
    run.buffer.add([make_group(draw, MIXED) for draw in (6, 7)])
    groups, counts = run.buffer.take()
    assert [g.draw for g in groups] == ([6, 7] if changed else [0, 6]) and counts.drawn == (
        2 if changed else 3
    )


def test_prompts_of_other_tokens_are_other_data():
    """Of the same problems, by a tokenizer or chat template that has changed since."""
    folder, run = Folder(), make_run(Progress(step=1, draws=1, cursor=Cursor(1, 2), begun=True))
    run.buffer.add([make_group(0, MIXED)])
    write(run, folder)
    others = DATA._replace(tokens="others")
    with pytest.raises(
        InputError,
        match="^model.folder: its tokenizer or chat template makes other prompts than when the run was started; ",
    ):
        taken_up(folder, make_run(), others)
    again = taken_up(folder, make_run(), others, allow_change=True)
    assert (again.at.cursor, again.buffer.missing()) == (Cursor(), 2)
    folder.whole[1].host.pop("tokens_digest")  # as an earlier version wrote it
    assert taken_up(folder, make_run(), others).buffer.missing() == 1


UNDER_WAY = PartialStep({"rollout/tokens": 7.0}, [{"loss": 0.5, "skipped": 0.0}])


@pytest.mark.parametrize(
    "change",
    [
        lambda host, arrays: host.pop("progress"),
        lambda host, arrays: host.update(progress=None),
        lambda host, arrays: host["progress"].append(1),
        lambda host, arrays: host["progress"].__setitem__(0, "1"),
        lambda host, arrays: host["progress"].__setitem__(0, 7),
        lambda host, arrays: host["progress"].__setitem__(2, -1),
        lambda host, arrays: host["progress"].__setitem__(3, 0),
        lambda host, arrays: host["progress"].__setitem__(3, [0, "first"]),
        lambda host, arrays: host["progress"].__setitem__(4, float("nan")),
        lambda host, arrays: host["progress"].__setitem__(4, None),
        lambda host, arrays: host.pop("data_digest"),
        lambda host, arrays: host.update(drawn=[1]),
        lambda host, arrays: host.update(drawn={"no/metric": 1.0}),
        lambda host, arrays: host.update(drawn={"rollout/tokens": "many"}),
        lambda host, arrays: host.update(sums=["loss"]),
        lambda host, arrays: arrays.pop("counters"),
        lambda host, arrays: arrays.update(counters=np.zeros(99)),
        lambda host, arrays: arrays.update(correct_len=np.array([9])),
        lambda host, arrays: arrays.update(
            open_groups=np.array([[0, 99]]), open_lengths=np.array([1])
        ),
    ],
)
def test_what_a_forged_checkpoint_says_is_one_line(change):
    """Its digests hold, so that it is this module that sees what cannot be."""
    folder, run = Folder(), make_run(Progress(step=1, draws=1, begun=True))
    run.buffer.add([make_group(0, MIXED)])
    run.partial = UNDER_WAY
    write(run, folder)
    (forged,) = folder.saved
    assert taken_up(folder, make_run()).partial == UNDER_WAY
    change(forged.host, forged.groups)
    with pytest.raises(
        NoCheckpointError,
        match="^checkpoints/1: its digests hold, but what it says of the run cannot be ",
    ) as e:
        taken_up(folder, make_run())
    assert "\n" not in str(e.value)
