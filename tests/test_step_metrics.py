"""Every metric of a rollout step on a hand-made one: three groups drawn, one carried in, two trained on."""

import dataclasses

import numpy as np
import pytest

from dapo_jax.config import Config, DapoSection
from dapo_jax.dapo.buffer import DynamicSamplingBuffer
from dapo_jax.dapo.packing import PackStats
from dapo_jax.data.problems import Cursor
from dapo_jax.drawing import Drawn
from dapo_jax.train import draw_metrics, throughput, update_metrics
from dapo_jax.types import Group, Problem, Prompt, Response, Verdict


def group(draw, correct, lengths, truncated, penalty, gap):
    """Log-probs of the sampler are -1 on every token, of the trainer -1 + gap."""
    responses = tuple(Response(np.zeros(n, np.int32), -np.ones(n, np.float32), t) for n, t in zip(lengths, truncated, strict=True))
    return Group(
        draw=draw,
        prompt=Prompt(Problem(f"p{draw}", "1+1=", "2"), np.zeros(3, np.int32)),
        responses=responses,
        texts=("",) * len(lengths),
        correct=np.array(correct, bool),
        reward=np.where(correct, 1, -1).astype(np.float32) + np.float32(penalty),
        penalty=np.array(penalty, np.float32),
        old_logprobs=tuple(np.full(n, -1 + gap, np.float32) for n in lengths),
    )


CARRIED = group(4, [1, 0], [2, 2], [False, False], [0, 0], gap=0.5)
SURPLUS = group(5, [0, 1], [9, 9], [False, False], [0, 0], gap=9)
DRAWN = [
    group(6, [1, 0], [4, 10], [False, True], [0, -0.5], gap=-0.1),  # trained on
    group(7, [1, 1], [3, 5], [False, False], [0, 0], gap=9),
    group(8, [0, 0], [10, 8], [True, False], [-0.5, -0.25], gap=9),
]
VERDICTS = [Verdict(True, 1.0)] * 3 + [Verdict(False, -1.0, "timed out after 1 s")] * 2 + [Verdict(False, -1.0, "ValueError: x")]
# Two updates over 10 and 8 target tokens; the second was skipped.
SUMS = [
    {"loss": 0.2, "grad_norm": 1.0, "skipped": 0.0, "tokens": 10.0, "entropy": 20.0, "approx_kl": 0.0, "token_prob": 4.0}
    | {"clipped_low": 0.0, "clipped_high": 0.0, "upclipped_prob": 0.0, "sampler_gap": 1.0},
    {"loss": 0.4, "grad_norm": 3.0, "skipped": 1.0, "tokens": 8.0, "entropy": 7.0, "approx_kl": 0.9, "token_prob": 5.0}
    | {"clipped_low": 2.0, "clipped_high": 4.0, "upclipped_prob": 1.0, "sampler_gap": 8.0},
]
PACKED = [PackStats(2, 1, 30, 10, 0.75, 0.5, ()), PackStats(1, 1, 14, 8, 0.25, 0.3, ())]


def metrics(**algo):
    """The step as the training loop makes it: the step before left group 4, this one draws 6 to 8 and trains on 4 and 6."""
    buffer = DynamicSamplingBuffer(1, dynamic_sampling=True, carry_surplus=True)
    buffer.add([group(3, [1, 0], [1, 1], [False, False], [0, 0], gap=0), CARRIED])
    buffer.take()
    state = buffer.state()
    buffer = DynamicSamplingBuffer(2, dynamic_sampling=True, carry_surplus=True)
    buffer.restore(state, {CARRIED.prompt.problem.id: CARRIED.prompt.problem})
    buffer.add(DRAWN)
    kept, counts = buffer.take()
    config = dataclasses.replace(Config(), dapo=DapoSection(prompts_per_draw=2, **algo))
    drawn = draw_metrics(Drawn(DRAWN, VERDICTS, Cursor(), 3, 40, [], []), config)
    return drawn | update_metrics(kept, counts, SUMS, PACKED, config)


def test_every_metric_of_a_step():
    expected = {
        # 6 responses drawn: rewards 1, -1.5, 1, 1, -1.5, -1.25
        "reward/mean": (1 - 1.5 + 1 + 1 - 1.5 - 1.25) / 6,
        "reward/accuracy": 3 / 6,
        "reward/accuracy_kept": 2 / 4,
        "reward/overlong_penalty_mean": -1.25 / 6,
        "reward/errors": 1,
        "reward/timeouts": 2,
        "filter/kept_fraction": 1 / 3,
        "filter/all_correct": 1 / 3,
        "filter/all_wrong": 1 / 3,
        "filter/carried_groups": 1,
        "filter/surplus_groups": 0,
        "filter/wasted_tokens": 3 + 5 + 10 + 8,
        "filter/trained_informative": 1.0,  # groups 4 and 6
        "rollout/generation_batches": 2,  # 3 prompts in batches of 2
        "rollout/prompts": 3,
        "rollout/response_len_mean": (4 + 10 + 3 + 5 + 10 + 8) / 6,
        "rollout/response_len_max": 10,
        "rollout/truncated_fraction": 2 / 6,
        "rollout/tokens": 40,
        "policy/loss": 0.3,
        "policy/entropy": 27 / 18,
        "policy/token_prob_mean": 9 / 18,
        "policy/approx_kl": 0.9 / 18,
        "policy/clip_fraction_low": 2 / 18,
        "policy/clip_fraction_high": 4 / 18,
        "policy/clip_fraction_dual": 0,
        "policy/importance_capped_fraction": 0,
        "policy/upclipped_prob_mean": 1 / 4,
        # of the 4 carried tokens 0.5 each, of the 14 drawn ones 0.1
        "policy/sampler_gap_mean": (4 * 0.5 + 14 * 0.1) / 18,
        "policy/long_share": 0.4,
        "optim/grad_norm": 2.0,
        "optim/skipped_updates": 1,
        "pack/efficiency": 0.5,
    }
    assert metrics() == pytest.approx(expected, rel=1e-6)


def test_what_a_step_draws_and_samples_counts_in_it_wherever_its_groups_are_completed():
    """Two prompts more than the groups completed, left open after 15 tokens."""
    config = dataclasses.replace(Config(), dapo=DapoSection(prompts_per_draw=2))
    found = draw_metrics(Drawn(DRAWN, VERDICTS, Cursor(), 5, 55, [], []), config)
    assert (found["rollout/prompts"], found["rollout/generation_batches"], found["rollout/tokens"]) == (5, 3, 55)
    assert found["filter/kept_fraction"] == pytest.approx(1 / 3)  # of groups that are completed


def test_with_the_samplers_logprobs_the_gap_is_that_of_the_first_update():
    """Only before it are trainer and sampler the same policy."""
    assert metrics(old_logprobs="sampler")["policy/sampler_gap_mean"] == pytest.approx(1.0 / 10)


def test_surplus_groups_are_counted_and_not_wasted():
    buffer = DynamicSamplingBuffer(1, dynamic_sampling=True, carry_surplus=True)
    buffer.add([CARRIED, SURPLUS])
    _, counts = buffer.take()
    assert (counts.surplus, counts.wasted_tokens, counts.kept) == (1, 0, 1)


def test_tokens_a_second():
    seconds = {"time/rollout_s": 4.0, "time/update_s": 2.0}
    drew, nothing = {"rollout/tokens": 40}, {"rollout/tokens": 0}  # a step that lives on carried groups alone draws nothing
    assert throughput(drew, PACKED, seconds) == {"throughput/rollout_tokens_per_s": 10, "throughput/train_tokens_per_s": 22}
    assert throughput(drew, [], {"time/rollout_s": 0.0, "time/update_s": 0.1}) == {}  # resumed after all of it
    assert throughput(nothing, PACKED, seconds) == {"throughput/train_tokens_per_s": 22}
