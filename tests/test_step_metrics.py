"""Every metric of a rollout step on a hand-made one: three groups drawn, one carried in, two
trained on.
"""

import dataclasses

import numpy as np
import pytest

from dapo_jax.config import Config, DapoSection, ModelConfig, TrainSection
from dapo_jax.dapo.buffer import DynamicSamplingBuffer, StepCounts, UnderfilledError
from dapo_jax.dapo.packing import PackStats
from dapo_jax.training.dynamic_sampling import Drawn, DrawState
from dapo_jax.training.record import Recorder, draw_metrics, throughput, update_metrics
from dapo_jax.training.setup import BatchShape, Policy
from dapo_jax.training.state import RunState
from dapo_jax.training.step import Updates, minibatches
from dapo_jax.types import Group, Problem, Prompt, Response, Verdict


def test_an_underfilled_step_says_that_the_verifier_reads_no_answers(tmp_path):
    """Before it stops: the form of the answers is the usual cause of all-incorrect groups."""
    said, policy = [], Policy(ModelConfig(), None, ())
    run = RunState(DynamicSamplingBuffer(1, True, True))
    train = TrainSection(samples_per_step=0)
    shared = (DapoSection(prompts_per_step=1), train, 0, lambda weights: {})
    recorder = Recorder(tmp_path, None, said.append, None, None, policy, *shared)
    verdicts = [Verdict(False, -1.0, answered=n > 2) for n in range(4)]
    with pytest.raises(UnderfilledError):
        recorder.commit(run, Drawn([DRAWN[2]], verdicts, 1, 18, 0, DrawState()), [DRAWN[2]])
    [line] = said
    assert line.startswith("step 1: 75% of the responses contain no answer")


def group(draw, correct, lengths, truncated, penalty, gap):
    """Log-probs of the sampler are -1 on every token, of the trainer -1 + gap."""
    responses = tuple(
        Response(np.zeros(n, np.int32), -np.ones(n, np.float32), t)
        for n, t in zip(lengths, truncated, strict=True)
    )
    return Group(
        draw=draw,
        prompt=Prompt(Problem(f"p{draw}", "1+1=", "2"), np.zeros(3, np.int32)),
        responses=responses,
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
VERDICTS = [*[Verdict(True, 1.0)] * 2, Verdict(True, 1.0, answered=False)]
VERDICTS += [Verdict(False, -1.0, "timed out after 1 s")] * 2 + [
    Verdict(False, -1.0, "ValueError: x")
]
# Three updates; the last was skipped, and its sums are as non-finite as they may be. Over 10 and 8
# target tokens, of which 6 and 8 are new.
SUMS = [
    {
        "loss": 0.2,
        "grad_norm": 1.0,
        "skipped": 0.0,
        "tokens": 10.0,
        "entropy": 20.0,
        "approx_kl": 0.0,
        "token_prob": 4.0,
    }
    | {
        "clipped_low": 0.0,
        "clipped_high": 0.0,
        "upclipped_prob": 0.0,
        "sampler_gap": 1.0,
        "gap_tokens": 6.0,
        "ratio_tight": 2.0,
        "ratio_one_percent": 3.0,
        "ratio_five_percent": 5.0,
    },
    {
        "loss": 0.4,
        "grad_norm": 3.0,
        "skipped": 0.0,
        "tokens": 8.0,
        "entropy": 7.0,
        "approx_kl": 0.9,
        "token_prob": 5.0,
    }
    | {
        "clipped_low": 2.0,
        "clipped_high": 4.0,
        "upclipped_prob": 1.0,
        "sampler_gap": 8.0,
        "gap_tokens": 8.0,
        "ratio_tight": 8.0,
        "ratio_one_percent": 8.0,
        "ratio_five_percent": 8.0,
    },
]
SUMS.append(dict.fromkeys(SUMS[0], np.nan) | {"skipped": 1.0})
PACKED = [PackStats(2, 1, 30, 10, 0.75, 0.5, ()), PackStats(1, 1, 14, 8, 0.25, 0.3, ())]


SHAPE = BatchShape(row_len=64, rows_per_microbatch=2, microbatches=2, row_shards=1)


def metrics(sums=SUMS, left=(CARRIED,), **algo):
    """The step as the training loop makes it: the step before left some groups, this one draws 6 to
    8 and trains on two.
    """
    buffer = DynamicSamplingBuffer(1, dynamic_sampling=True, carry_surplus=True)
    buffer.add([group(2, [1, 0], [1, 1], [False, False], [0, 0], gap=0), *left])
    buffer.take()
    state = buffer.state()
    buffer = DynamicSamplingBuffer(2, dynamic_sampling=True, carry_surplus=True)
    buffer.restore(state)
    buffer.add(DRAWN)
    kept, counts = buffer.take()
    drawn = draw_metrics(Drawn(DRAWN, VERDICTS, 3, 40, 0, DrawState(), decode_steps=17), 2)
    updates = Updates(kept, counts, 6, [len(kept)], PACKED, 0, 1e-6)
    return drawn | update_metrics(updates, sums, DapoSection(**algo))


def test_every_metric_of_a_step():
    expected = {
        # 6 responses drawn: rewards 1, -1.5, 1, 1, -1.5, -1.25
        "reward/mean": (1 - 1.5 + 1 + 1 - 1.5 - 1.25) / 6,
        "reward/accuracy": 3 / 6,
        "reward/accuracy_kept": 2 / 4,
        "reward/overlong_penalty_mean": -1.25 / 6,
        "reward/errors": 1,
        "reward/timeouts": 2,
        "reward/no_answer_fraction": 1 / 3,  # of those with a verdict
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
        "rollout/decode_steps": 17,
        "rollout/suspended": 0,
        "policy/loss": 0.3,
        "policy/entropy": 27 / 18,
        "policy/token_prob_mean": 9 / 18,
        "policy/approx_kl": 0.9 / 18,
        "policy/clip_fraction_low": 2 / 18,
        "policy/clip_fraction_high": 4 / 18,
        "policy/clip_fraction_dual": 0,
        "policy/importance_capped_fraction": 0,
        "policy/upclipped_prob_mean": 1 / 4,
        "policy/sampler_gap_mean": 0.1,  # of the 14 tokens drawn in this step, not of the 4 carried ones
        # of the 14 tokens too: all at a ratio of e^-0.1 = 0.905
        "policy/sampler_ratio_tight": 0,
        "policy/sampler_ratio_one_percent": 0,
        "policy/sampler_ratio_five_percent": 0,
        "policy/sampler_ratio_max": np.exp(-0.1),
        "policy/advantage_rms": 0.5**0.5,  # of ±1 / √2, but for ε
        "policy/long_share": 0.4,
        "optim/grad_norm": 2.0,
        "optim/lr": 1e-6,
        "optim/skipped_updates": 1,
        "optim/underfilled_updates": 1,  # 2 groups of 16, where 32 fill one
        "pack/efficiency": 0.5,
    }
    assert metrics() == pytest.approx(expected, rel=1e-6)


def test_groups_without_a_verdict_on_some_or_all_answers():
    """Metrics are over the answers that have one: a group without any is neither all-correct nor
    all-incorrect and counts in no share; with none at all only counts are left.
    """
    empty = group(10, [], [], [], [], gap=0)
    drawn = [*DRAWN, group(9, [1], [4], [False], [0], gap=0), empty]
    found = draw_metrics(Drawn(drawn, VERDICTS, 5, 55, 15, DrawState()), 2)
    assert found["reward/accuracy"] == 4 / 7 and found["reward/mean"] == pytest.approx(
        (1 - 1.5 + 1 + 1 - 1.5 - 1.25 + 1) / 7
    )
    shares = [found[f"filter/{name}"] for name in ("kept_fraction", "all_correct", "all_wrong")]
    assert shares == [1 / 4, 2 / 4, 1 / 4] and found["filter/wasted_tokens"] == 15
    assert set(draw_metrics(Drawn([empty], VERDICTS, 1, 9, 9, DrawState()), 2)) == {
        "reward/timeouts",
        "reward/errors",
        "reward/no_answer_fraction",
        "rollout/generation_batches",
        "rollout/prompts",
        "rollout/tokens",
        "rollout/decode_steps",
        "rollout/suspended",
        "filter/wasted_tokens",
    }


def test_what_a_step_draws_and_samples_counts_in_it_wherever_its_groups_are_completed():
    """Two prompts more than the groups completed, left open after 15 tokens."""
    found = draw_metrics(Drawn(DRAWN, VERDICTS, 5, 55, 0, DrawState()), 2)
    keys = ("rollout/prompts", "rollout/generation_batches", "rollout/tokens")
    assert [found[key] for key in keys] == [5, 3, 55]
    assert found["filter/kept_fraction"] == pytest.approx(1 / 3)  # of groups that are completed


def test_with_the_samplers_logprobs_the_gap_is_that_of_the_first_update_on_new_tokens():
    """Only before it are trainer and sampler the same policy.

    A skipped update does not change it; carried tokens are of another.
    """
    found = metrics(old_logprobs="sampler")
    assert found["policy/sampler_gap_mean"] == pytest.approx(1.0 / 6)
    names = ("tight", "one_percent", "five_percent")
    shares = [found[f"policy/sampler_ratio_{name}"] for name in names]
    assert shares == pytest.approx([2 / 6, 3 / 6, 5 / 6])
    assert "policy/sampler_ratio_max" not in found
    assert metrics([SUMS[2], SUMS[1]], old_logprobs="sampler")[
        "policy/sampler_gap_mean"
    ] == pytest.approx(8.0 / 8)
    none_new = SUMS[0] | {"gap_tokens": 0.0, "sampler_gap": 0.0}
    assert "policy/sampler_gap_mean" not in metrics([none_new, SUMS[1]], old_logprobs="sampler")


def test_shares_of_the_ratio_of_trainer_to_sampler():
    """e^gap is 1.0015, 0.9985 and 1.03 on 2 tokens each, 0.94 and 1.2 on one: of 8 tokens, 2 are in
    [0.999, 1.002], 4 within 1%, 6 within 5%.
    """
    ratios = np.float32([1.0015, 1.0015, 0.9985, 0.9985, 1.03, 1.03, 0.94, 1.2])
    made = group(6, [1, 0], [4, 4], [False, False], [0, 0], gap=0)
    old = tuple(np.log(r) - 1 for r in np.split(ratios, 2))
    kept = [dataclasses.replace(made, old_logprobs=old)]
    updates = Updates(kept, StepCounts(kept=1), 6, [1], PACKED, 0, 1e-6)
    found = update_metrics(updates, SUMS, DapoSection())
    names = ("tight", "one_percent", "five_percent", "max")
    shares = [found[f"policy/sampler_ratio_{name}"] for name in names]
    assert shares == pytest.approx([2 / 8, 4 / 8, 6 / 8, 1.2], rel=1e-6)


def test_shares_of_responses_that_masks_remove():
    """Geometric means of e^0.5 on the 2 carried responses and of e^-0.1 on the 2 drawn ones."""
    keys = [f"policy/sequence_{name}_fraction" for name in ("masked", "vetoed")]
    found = metrics(sequence_mask=(0.95, 2.0), sequence_veto=0.5)
    assert [found[key] for key in keys] == [0.5, 0]
    found = metrics(sequence_mask=(0.5, 1.1), sequence_veto=0.95)
    assert [found[key] for key in keys] == [0.5, 0.5]
    assert not metrics().keys() & set(keys)


def test_groups_carried_in_count_if_they_are_trained_on_and_give_no_gap():
    found = metrics(left=(dataclasses.replace(CARRIED, draw=3), CARRIED, SURPLUS))
    assert (found["filter/carried_groups"], found["filter/surplus_groups"]) == (2, 2)
    assert "policy/sampler_gap_mean" not in found


def test_a_step_whose_updates_were_all_skipped_says_so_and_nothing_of_the_policy():
    found = metrics(SUMS[2:] * 2)
    assert found["optim/skipped_updates"] == 2 and found["pack/efficiency"] == 0.5
    assert {key for key in found if key.startswith(("policy/", "optim/"))} == {
        "policy/long_share",
        "policy/advantage_rms",
        "policy/sampler_gap_mean",
        "policy/sampler_ratio_tight",
        "policy/sampler_ratio_one_percent",
        "policy/sampler_ratio_five_percent",
        "policy/sampler_ratio_max",
        "optim/lr",
        "optim/skipped_updates",
        "optim/underfilled_updates",
    }
    assert all(np.isfinite(value) for value in found.values())


def test_a_mini_batch_holds_the_answers_that_got_a_verdict():
    """Two of one group and one of another, alone there: its tokens count in the mean, and its
    advantage is 0.
    """
    config = dataclasses.replace(
        Config(), dapo=DapoSection(responses_per_prompt=2, responses_per_update=4)
    )
    batch, _ = next(
        minibatches([CARRIED, group(6, [1], [4], [False], [0], gap=0)], config.dapo, SHAPE)
    )
    assert batch.weight[batch.target_mask].tolist() == [np.float32(1 / 8)] * 8
    assert (
        sorted(batch.advantages[batch.target_mask].round(4).tolist())
        == [np.float32(-0.7071).round(4)] * 2 + [0] * 4 + [np.float32(0.7071).round(4)] * 2
    )


def test_mini_batches_hide_the_samplers_log_probs_of_groups_of_earlier_steps():
    """Only where they are in the ratio, and nowhere else than for the metric."""
    for mode, hidden in (("sampler", 4), ("recompute", 0)):
        algo = DapoSection(responses_per_prompt=2, responses_per_update=4, old_logprobs=mode)
        batch, _ = next(minibatches([CARRIED, DRAWN[0]], algo, SHAPE, 6))
        assert (batch.target_mask & ~batch.current).sum() == hidden
        assert not (batch.current & ~batch.target_mask).any()


def test_surplus_groups_are_counted_and_not_wasted():
    buffer = DynamicSamplingBuffer(1, dynamic_sampling=True, carry_surplus=True)
    buffer.add([CARRIED, SURPLUS])
    _, counts = buffer.take()
    assert (counts.surplus, counts.wasted_tokens, counts.kept) == (1, 0, 1)


def test_tokens_a_second():
    seconds = {"time/rollout_s": 4.0, "time/update_s": 2.0}
    rollout, trained = (
        {"throughput/rollout_tokens_per_s": 10},
        {"throughput/train_tokens_per_s": 22},
    )
    assert throughput(40, 44, seconds) == rollout | trained
    assert throughput(0, 44, seconds) == trained  # the carried groups were enough
    assert (
        throughput(40, 0, {"time/rollout_s": 0.0, "time/update_s": 0.1}) == {}
    )  # resumed after it
