"""The scheduler simulation: real engine and dynamic sampling on programs that only count."""

import collections
import dataclasses
import json

import jaxtyping
import numpy as np
import pytest

from dapo_jax.benchmark import main, schedule
from dapo_jax.benchmark.schedule import Machine, Workload, measured, parse_lengths, simulate
from dapo_jax.config import Config, DapoSection, DataSection, RewardSection, RolloutSection
from dapo_jax.model.ragged_attention import entries_read
from dapo_jax.training.dynamic_sampling import DynamicSampler
from dapo_jax.types import InputError

SLOTS, SHARDS, G = 64, 4, 8
LONGEST = 1280


@pytest.fixture(autouse=True)
def signatures_are_checked_elsewhere(monkeypatch):
    """Two thirds of a simulation would be the checks of the engine's signatures: `test_engine.py`."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def config(slots=SLOTS, **algo):
    sizes = {"prompts_per_step": 32, "responses_per_prompt": G, "responses_per_update": G}
    sizes |= {"prompts_per_draw": 96} | algo
    return Config(
        dapo=DapoSection(**sizes),
        data=DataSection(max_prompt_len=128),
        reward=RewardSection(overlong_buffer_len=64),
        rollout=RolloutSection(max_response_len=LONGEST, decode_slots=slots),
    )


def work(mean=320, sigma=0.8, **options):
    lengths = parse_lengths(f"lognormal:{mean}:{sigma}", LONGEST)
    return Workload(lengths, prompt_len=32, **options)


def watched(monkeypatch):
    """Finished responses, as (rollout step, draw, sample, tokens), in order."""
    found, advance = [], schedule._SimulatedStream.advance

    def watch(stream):
        finished = advance(stream)
        step = stream._engine.rollout_step
        found.extend((step, q.draw, q.sample, len(r.tokens)) for q, r in finished)
        return finished

    monkeypatch.setattr(schedule._SimulatedStream, "advance", watch)
    return found


def test_lengths_have_the_mean_after_truncation_and_the_sigma_before():
    d = parse_lengths("lognormal:5120:0.8", 20480)
    assert d.mean == pytest.approx(5120, rel=1e-4) and d.values.max() == 20480
    free = np.log(d.values[d.values < 20480])
    low, high = np.quantile(np.log(d.values), [0.1587, 0.8413])  # of a normal: ± sigma
    assert (high - low) / 2 == pytest.approx(0.8, rel=0.01) and len(free) < len(d.values)
    # E[L²] / 2 E[L], numerically: the mean place of a token that is chosen at random.
    rng = np.random.default_rng(0)
    chosen = rng.choice(d.values, 200_000, p=d.values / d.values.sum())
    assert d.live_mean == pytest.approx((chosen * rng.random(200_000)).mean(), rel=0.02)


@pytest.mark.parametrize(
    "text", ["normal:5:1", "lognormal:5", "lognormal:0:1", "lognormal:1280:1", "lognormal:9:x", ""]
)
def test_other_lengths_are_refused(text):
    with pytest.raises(InputError, match="lognormal:MEAN:SIGMA"):
        parse_lengths(text, LONGEST)


@pytest.mark.parametrize("partial", [False, True])
def test_every_request_finishes_once_with_its_own_length(monkeypatch, partial):
    found = watched(monkeypatch)
    result = simulate(config(partial_rollouts=partial), Machine(SHARDS), work())
    assert max(collections.Counter((d, s) for _, d, s, _ in found).values()) == 1
    samples = schedule._Samples(work(), G)
    assert all(length == samples.of_draw(d)[0][s] for _, d, s, length in found)
    drawn = sum(step.prompts for step in result.steps)
    left = result.steps[-1].open_groups
    finished = {d for _, d, _, _ in found}
    assert finished >= set(range(drawn - left)) and max(finished) < drawn
    if not partial:
        assert left == 0 and len(found) == drawn * G
    tokens = sum(length for *_, length in found)
    assert tokens <= sum(step.tokens for step in result.steps)
    assert (tokens == sum(step.tokens for step in result.steps)) == (left == 0)


@pytest.mark.parametrize("partial", [False, True])
def test_segments_add_up(partial):
    result = simulate(config(partial_rollouts=partial), Machine(SHARDS), work())
    s = result.segments
    for n, step in enumerate(result.steps):
        own = s.rollout_step == n
        assert s.steps[own].sum() == step.decode_steps and s.live[own].sum() == step.tokens
        assert step.live_share == pytest.approx(step.tokens / step.decode_steps / SLOTS)
    assert (s.live <= s.steps * s.width * SHARDS).all() and (s.steps <= 64).all()
    assert (s.cache_mean <= s.cache_worst).all()
    longest = LONGEST + config().data.max_prompt_len
    assert (s.cache_worst <= s.steps * s.width * longest).all()
    assert (s.cache_worst <= s.cache_mean * SHARDS).all()
    assert result.prefills[:, 1:].prod(axis=1).sum() == sum(x.prefill_tokens for x in result.steps)


@pytest.mark.slow
def test_a_schedule_is_a_function_of_its_arguments():
    a, b, other = (simulate(config(), Machine(SHARDS), work(seed=seed)) for seed in (0, 0, 1))
    assert a.steps == b.steps != other.steps
    assert all(np.array_equal(x, y) for x, y in zip(a.segments, b.segments, strict=True))


@pytest.mark.slow
def test_partial_rollouts_keep_slots_full():
    """The shape of the 32B config over 16, with lengths over 16."""
    full = config(88, responses_per_prompt=16, responses_per_update=16, partial_rollouts=True)
    whole = config(88, responses_per_prompt=16, responses_per_update=16)
    a, b = (simulate(c, Machine(SHARDS, 64), work()) for c in (full, whole))
    assert all(step.live_share >= 0.95 for step in a.steps)
    ideal = 32 / 0.5 * 16 * 320 / 88  # decode steps of one step's tokens in full slots
    later = [step.decode_steps for step in a.steps[1:]]
    assert np.mean(later) < 1.1 * ideal and b.decode_steps > 1.15 * ideal


@pytest.mark.default("0")
@pytest.mark.parametrize("age", [0, 1, 2, None])
def test_no_trained_token_is_older_than_the_bound(age):
    """Many slots and few groups a step: without the bound tokens wait for several steps."""
    for seed in range(3):
        options = {"partial_rollouts": True, "max_policy_age": age, "prompts_per_step": 8}
        result = simulate(config(256, **options), Machine(SHARDS), work(seed=seed, steps=12))
        ages = [step.token_age_max for step in result.steps]
        assert max(ages) == age if age is not None else max(ages) > 2
        assert all(step.versions_max <= step.token_age_max + 1 for step in result.steps)
        assert all(step.trained == 8 for step in result.steps)


@pytest.mark.slow
def test_open_groups_hold_a_bounded_number_of_tokens(monkeypatch):
    """While the first of them is sampled, at most slots x longest tokens are, twice over."""
    held, draw = [], DynamicSampler.draw

    def watch(*args):
        drawn = draw(*args)
        held.append(sum(group.tokens() for group in drawn.state.open))
        return drawn

    monkeypatch.setattr(DynamicSampler, "draw", watch)
    for kept in (0.1, 0.5):
        small = config(128, partial_rollouts=True, prompts_per_step=4)
        simulate(small, Machine(SHARDS), work(kept=kept, steps=20))
    assert 0 < max(held) < 2 * 128 * LONGEST


def test_one_slot_of_equal_responses_by_hand():
    """One group of two responses of 100 tokens after prompts of 32: 2 x 100 decode steps."""
    one = config(1, prompts_per_step=1, responses_per_prompt=2, responses_per_update=2)
    constant = Workload(parse_lengths("lognormal:100:0", LONGEST), 32, kept=1.0, steps=1)
    result = simulate(one, Machine(1), constant)
    assert result.decode_steps == 200 and result.live_share == 1.0 == result.shard_balance
    prompt = result.prefills[0, 2] and result.segments.cache_mean.sum() / 2
    # positions of 100 steps, twice: 100 p + 0 + 1 + ... + 99, p the prompt without its last token
    assert (prompt - 4950) / 100 == int((prompt - 4950) / 100) > 0


@pytest.mark.default("True")
@pytest.mark.parametrize("partial", [False, True])
def test_a_small_cache_suspends_sequences_and_changes_no_length(monkeypatch, partial):
    """Room for 24 of the 64 slots' mean live sequence; no response is lost or sampled twice."""
    whole = config(partial_rollouts=partial)
    rollout = dataclasses.replace(whole.rollout, cache_tokens=24 * 320)
    found = watched(monkeypatch)
    small = simulate(dataclasses.replace(whole, rollout=rollout), Machine(SHARDS, page=16), work())
    assert sum(step.suspended for step in small.steps) > 0
    assert max(collections.Counter((d, s) for _, d, s, _ in found).values()) == 1
    samples = schedule._Samples(work(), G)
    assert all(length == samples.of_draw(d)[0][s] for _, d, s, length in found)
    large = simulate(whole, Machine(SHARDS, page=16), work())
    assert not any(step.suspended for step in large.steps)
    assert 0.6 < small.cache_share < 1.1 and small.cache_share > large.cache_share
    assert small.decode_steps > large.decode_steps and small.live_share < large.live_share


def test_blocks_are_read_whole_and_only_those_in_a_window():
    """Blocks of 256 entries. A window of 40 at 600 entries begins at entry 561, in the third."""
    lengths = np.array([0, 1, 256, 257, 600])
    assert entries_read(lengths).tolist() == [256, 256, 256, 512, 768]
    assert entries_read(lengths, 40).tolist() == [256, 256, 256, 512, 256]
    result = simulate(config(), Machine(SHARDS, reads=entries_read), work())
    read, live = result.segments.cache_read.sum(), result.segments.cache_worst.sum()
    assert 1.2 * live < read < live + 256 * SLOTS / SHARDS * result.segments.steps.sum()


def test_the_benchmark_prints_a_table_and_json(tmp_path, capsys):
    flags = ["--config", "configs/tiny_cpu.yaml", "--shards", "4", "--lengths", "lognormal:20:0.5"]
    assert main(["schedule", *flags, "--set", "dapo.partial_rollouts=true", "--steps", "2"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["row_shards"] == 4 and result["slots"] == 256 and result["steps"] == 2
    assert 0 < result["live_share_of_slots"] <= 1
    assert result["decode_steps_per_step"] >= result["ideal_decode_steps"] > 0


def test_lengths_of_a_run_are_those_of_its_samples(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    with pytest.raises(
        InputError, match="has no step with samples; set train.samples_per_step, or give --lengths"
    ):
        measured(tmp_path)
    for step, lengths in enumerate(([5, 7], [9]), 1):
        rows = [{"response": "", "length": n} for n in lengths]
        lines = "".join(json.dumps(row) + "\n" for row in rows) + "damaged\n"
        (folder / f"step_{step:06d}.jsonl").write_text(lines)
    shares = [{"step": n, "filter/kept_fraction": k} for n, k in ((1, 0.25), (2, 0.75))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shares))
    lengths, kept = measured(tmp_path)
    assert sorted(lengths.values) == [5, 7, 9] and kept == 0.5
