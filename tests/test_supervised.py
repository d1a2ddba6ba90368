"""Supervised warm-up: what is waited for, and when it gives up.

The update is a stand-in that notes what is asked of it.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from refusals import refusal

from dapo_jax import supervised
from dapo_jax.config import MeshSection, config_from_dict
from dapo_jax.dapo.packing import TrainItem
from dapo_jax.data.prompts import byte_tokenizer
from dapo_jax.runtime.console import Console
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.training.setup import Policy, with_computation
from dapo_jax.types import InputError, Problem, Prompt

ZEROS = np.zeros(3, np.float32)
ITEMS = [
    TrainItem(np.arange(4, dtype=np.int32), np.arange(3, dtype=np.int32), ZEROS, ZEROS, 0.0, 0.0)
    for _ in range(5)
]


def test_solutions_that_are_too_long_or_hold_control_tokens_are_left_out_and_counted():
    """In text `<|end|>` is the end token: imitating it would teach to end there."""
    solutions = ["1", "12<|end|>3", "1234567", "12", None]
    prompts = [Prompt(Problem(s or "", "?", "1", s), np.zeros(2, np.int32)) for s in solutions]
    config = config_from_dict(
        {
            "model": {"architecture": {}},
            "eval": {"every": 0},
            "rollout": {"max_response_len": 4},
            "reward": {"overlong_buffer_len": 0},
            "supervised": {"updates": 1},
        }
    )
    policy, said = Policy(config.model.architecture, byte_tokenizer(), (1,)), []
    items = supervised.solution_items(config, prompts, policy, said.append)
    ends = [[2 + ord("1"), 1], [2 + ord("1"), 2 + ord("2"), 1]]
    assert [item.response.tolist() for item in items] == ends
    assert said == [
        "warm-up: 2 of 4 solutions left out: longer than rollout.max_response_len 4 tokens, or "
        "with control tokens"
    ]
    with pytest.raises(InputError, match="every solution is longer than rollout.max_response_len"):
        supervised.solution_items(config, prompts[1:3], policy, said.append)


class OnDevice:
    """A number that is there once its update has ended: to read it is to wait."""

    def __init__(self, value, wait):
        self.value, self.wait = value, wait

    def __float__(self):
        self.wait()
        return float(self.value)


@pytest.fixture
def warm_up(monkeypatch):
    """Runs a warm-up whose skipped updates are 1; returns what happened, in order."""

    def warm_up(skips, done=0, skipped=0, most=3):
        happened = []

        def update(state, batch, rate):
            number = state + 1

            def wait():
                if f"end {number}" not in happened:
                    happened.append(f"end {number}")

            happened.append(f"update {number}")
            return number, {"skipped": OnDevice(skips[state], wait), "loss": OnDevice(1, wait)}

        monkeypatch.setattr(
            supervised, "supervised_programs", lambda *args: SimpleNamespace(update=update)
        )
        monkeypatch.setattr(
            supervised, "put_rows", lambda batch, mesh, axis: happened.append("rows")
        )
        changes = {
            "model": {"architecture": {}},
            "eval": {"every": 0},
            "supervised": {"updates": len(skips), "responses_per_update": 2},
            "optim": {"max_nonfinite_updates": most},
            "train": {"rows_per_microbatch": 1},
        }
        config = config_from_dict(changes)
        policy, mesh = (
            Policy(with_computation(config, config.model.architecture), None, ()),
            make_mesh(MeshSection(1, 1, 1), jax.devices()[:1]),
        )
        for updates, in_a_row, state in supervised.warm_up(
            config, policy, mesh, ITEMS, done, Console(print, print, False), (done, skipped)
        ):
            assert updates == state
            happened.append(f"{in_a_row} skipped")
        return happened

    return warm_up


def test_an_update_has_ended_before_the_place_where_a_run_may_be_left(warm_up):
    """One update runs at a time, while the rows of the next are built."""
    first, second, third = (
        ["update 1", "rows", "end 1"],
        ["update 2", "rows", "end 2"],
        ["update 3", "end 3"],
    )
    none = ["0 skipped"]
    assert warm_up([0, 0, 0]) == ["rows", *first, *none, *second, *none, *third, *none]


def test_skipped_updates_in_a_row_end_a_warm_up(warm_up):
    counts = [line for line in warm_up([1, 1, 0, 1, 0, 1, 1]) if "skipped" in line]
    assert counts == [f"{n} skipped" for n in (1, 2, 0, 1, 0, 1, 2)]
    with refusal("warm-up update 5: 3 updates ...non-finite"):
        warm_up([1, 0, 1, 1, 1, 0])
    with refusal("warm-up update 2: 3 updates"):  # the last of all, too
        warm_up([0, 1], done=1, skipped=2)
    assert warm_up([0, 1], done=1, skipped=1)[-1] == "2 skipped"
