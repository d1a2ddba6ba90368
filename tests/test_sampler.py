"""Whole responses against teacher forcing and a draw done by hand; slots that come, go and move."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from dapo_jax.config import MeshSection
from dapo_jax.model.decoder import Cache, abstract_params, apply
from dapo_jax.rollout import sampler
from dapo_jax.rollout.sampler import Arrivals, Decoding, Slots, Until, response_keys
from dapo_jax.rollout.token_sampling import Sampling
from dapo_jax.runtime.mesh import make_mesh, rollout_sharding

MODEL = tiny.model(vocab_size=130)
N, SLOTS, P, R = 2, 4, 6, 9
B = N * SLOTS
SAMPLING = Sampling(0.9, top_p=0.95, top_k=60)
STOP = (3, 4, 5, 6, 7, 8, 9, 10)
SEED = jax.random.key(11)
PROMPT_LEN = np.array([1, 6, 3, 0, 2, 5, 4, 6], np.int32)  # slot 3 stays empty
DRAW, SAMPLE = np.arange(B) // 2, np.arange(B) % 2
LIMIT = np.array([R, R, 2, R, R, R, 1, R])
ONE = make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])


@functools.cache
def sharp_params():
    """Logits with a spread, so that top-p and top-k cut something."""
    params = tiny.params(MODEL)
    return {**params, "embed": {"embedding": 3 * params["embed"]["embedding"]}}


PROMPTS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (B, P)).astype(np.int32)
PAGE = 4
COUNT = -(-(P + R) // PAGE)  # pages of a sequence
SIZES = {"shards": N, "slots": SLOTS, "pages": 1 + SLOTS * COUNT, "page": PAGE, "room": R}
TABLE = 1 + np.random.default_rng(2).permuted(np.tile(np.arange(SLOTS * COUNT), (N, 1)), axis=1)
TABLE = TABLE.reshape(N, SLOTS, COUNT).astype(np.int32)
read_prompts = jax.jit(
    functools.partial(sampler.prefill, model=MODEL, page=PAGE, int8=False, mesh=ONE)
)
insert, move = jax.jit(functools.partial(sampler.insert, mesh=ONE)), jax.jit(sampler.move)
decode = jax.jit(
    functools.partial(sampler.decode, Decoding(MODEL, SAMPLING, STOP, ONE)),
    static_argnames="width",
)


def empty(**sizes):
    return sampler.empty_state(MODEL, **sizes, int8=False)


def started(wanted, *, at=None, state=None):
    """A state with these of the eight sequences in it, each in its own slot or in `at`."""
    at = wanted if at is None else at
    packed = np.full((len(Arrivals._fields), N, SLOTS), SLOTS, np.int32)
    counts, parts = [0, 0], -(-P // PAGE)  # pages of a row
    copies = np.zeros((2, N, SLOTS * parts), np.int32)
    for i, slot in zip(wanted, at, strict=True):
        n, length = slot // SLOTS, PROMPT_LEN[i]
        here = slice(counts[n] * parts, (counts[n] + 1) * parts)
        copies[0, n, here] = (B - 1 - i) * parts + np.arange(parts)
        copies[1, n, here] = TABLE[n, slot % SLOTS, :parts]
        entry = Arrivals(
            slot % SLOTS,
            PROMPTS[i, length - 1],
            length - 1,
            DRAW[i],
            SAMPLE[i],
            LIMIT[i],
        )
        packed[:, n, counts[n]] = entry
        counts[n] += 1
    state = empty(**SIZES) if state is None else state
    prefilled = read_prompts(sharp_params(), PROMPTS[::-1])
    return insert(state, prefilled, SEED, packed, copies, max(counts) * parts)


def run(state, max_steps, few=0, half=0, width=SLOTS, table=TABLE):
    until = Until(few, half, max_steps)
    state, seen, steps = decode(sharp_params(), state, table, until, width=width)
    return state, np.asarray(seen), int(steps)


def flat(slots):
    """Per-slot arrays as [B, ...] numpy."""
    return slots._replace(
        **{
            k: np.asarray(v).reshape(B, *v.shape[2:])
            for k, v in slots._asdict().items()
            if k not in ("keys", "experts")
        }
    )


OCCUPIED = [0, 1, 2, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def sampled():
    """The slots at the end, decoded in pieces of four steps."""
    state, pieces = started(OCCUPIED), []
    while np.asarray(state.slots.live).any():
        state, seen, steps = run(state, 4)
        pieces.append(steps)
        for array, expected in zip(
            seen, (state.slots.live, state.slots.length, state.slots.ended), strict=True
        ):
            np.testing.assert_array_equal(array, expected)
    assert pieces == [4, 4, 1]
    return flat(state.slots)


@pytest.fixture(scope="module")
def forced(sampled):
    """Logits [B, R, V] / temperature that the model gives for each response token, from one pass
    over prompt and response.
    """
    rows = np.zeros((B, P + R), np.int32)
    for row, prompt, length, response in zip(
        rows, PROMPTS, PROMPT_LEN, sampled.tokens, strict=True
    ):
        row[: length + R] = np.concatenate([prompt[:length], response])
    logits = np.asarray(jax.jit(apply, static_argnums=1)(sharp_params(), MODEL, rows), np.float64)
    at = np.maximum(PROMPT_LEN[:, None] - 1, 0) + np.arange(R)
    return np.take_along_axis(logits, at[..., None], axis=1) / SAMPLING.temperature


# --------------------------------------------------------------------------------------------------------------------
# What a response says
# --------------------------------------------------------------------------------------------------------------------


def test_log_probs_are_those_of_teacher_forcing(sampled, forced):
    """Measured: within 2e-6."""
    log_softmax = forced - np.log(np.exp(forced).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(log_softmax, sampled.tokens[..., None], axis=-1)[..., 0]
    written = np.arange(R) < sampled.length[:, None]
    np.testing.assert_allclose(sampled.logprobs[written], expected[written], rtol=0, atol=1e-5)
    assert not sampled.logprobs[~written].any() and not sampled.tokens[~written].any()


def draw_by_hand(weights, key) -> int:
    """Inverse CDF and rejection in float64: until what is heavier than the draw holds less than
    top_p of the k heaviest.
    """
    weights = tiny.nucleus_by_sorting(weights, 1, SAMPLING.top_k)
    mass, round_ = SAMPLING.top_p * weights.sum(), 0
    while True:
        uniform = (
            float(jax.random.uniform(jax.random.fold_in(key, round_) if round_ else key)) + 2.0**-24
        )
        token = int(np.argmax(np.cumsum(weights) > uniform * weights.sum()))
        heavier = np.where(weights > weights[token], weights, 0)
        if heavier.sum() < mass:
            return token
        weights, round_ = heavier, round_ + 1


def test_every_token_is_the_draw_that_its_key_makes(sampled, forced):
    """Noise is fold_in(seed, draw, sample, position)."""
    for b in range(B):
        for t in range(sampled.length[b]):
            key = SEED
            for number in (DRAW[b], SAMPLE[b], PROMPT_LEN[b] + t):
                key = jax.random.fold_in(key, number)
            assert sampled.tokens[b, t] == draw_by_hand(
                np.exp(forced[b, t] - forced[b, t].max()), key
            )


def test_stop_tokens_end_a_response_and_belong_to_it_and_the_limit_cuts(sampled):
    is_stop = np.isin(sampled.tokens, STOP)
    outcomes = set()
    for b in OCCUPIED:
        first = int(np.argmax(is_stop[b])) if is_stop[b].any() else None
        assert sampled.length[b] == (LIMIT[b] if first is None else first + 1)
        assert sampled.ended[b] == (first is not None)
        outcomes.add(("cut" if LIMIT[b] == R else "cut short") if first is None else "ended")
    assert outcomes == {"cut", "cut short", "ended"}
    assert not sampled.live.any()


def test_an_empty_slot_stays_empty(sampled):
    assert sampled.length[3] == 0 and not sampled.ended[3] and not sampled.tokens[3].any()


def test_keys_differ_by_draw_and_sample_and_are_those_of_fold_in():
    draws, samples = (x.ravel() for x in np.meshgrid(np.arange(5), np.arange(5)))
    keys = np.asarray(
        jax.random.key_data(response_keys(SEED, jnp.asarray(draws), jnp.asarray(samples)))
    )
    assert len({tuple(key) for key in keys}) == 25
    expected = jax.random.fold_in(jax.random.fold_in(SEED, draws[7]), samples[7])
    np.testing.assert_array_equal(keys[7], jax.random.key_data(expected))


# --------------------------------------------------------------------------------------------------------------------
# Slots
# --------------------------------------------------------------------------------------------------------------------


def assert_said(slots, slot, sampled, b):
    assert (
        slots.tokens[slot, : slots.length[slot]].tolist()
        == sampled.tokens[b, : sampled.length[b]].tolist()
    )
    np.testing.assert_allclose(
        slots.logprobs[slot, : slots.length[slot]],
        sampled.logprobs[b, : sampled.length[b]],
        rtol=0,
        atol=1e-5,
    )


def test_a_segment_ends_when_few_are_left_or_few_on_any_shard(sampled):
    lengths = sampled.length.reshape(N, SLOTS)
    steps = np.arange(R + 1)
    live = (lengths[None] > steps[:, None, None]).sum(axis=2)  # [steps, N]
    for few, half in ((2, 0), (5, 0), (0, 1), (0, 2)):
        expected = int(np.argmax((live.sum(axis=1) <= few) | (live.max(axis=1) <= half)))
        assert 0 < expected < R
        assert run(started(OCCUPIED), 100, few, half)[2] == expected


def test_sequences_come_while_others_are_under_way_and_take_the_place_of_those_that_ended(sampled):
    state, _, _ = run(started([0, 6]), 3)
    state, _, _ = run(started([7, 2, 4], at=[6, 1, 3], state=state), 100)
    slots = flat(state.slots)
    for slot, b in ((0, 0), (6, 7), (1, 2), (3, 4)):
        assert_said(slots, slot, sampled, b)
    assert sampled.length[6] < 3 < sampled.length[0]


def test_sequences_move_to_the_first_slots_and_continue_there_alone(sampled):
    """Slots beyond the first two are not decoded, those that were left are not live, and no page of
    another slot is read. Without a page a sequence is not live.
    """
    state, _, _ = run(started([0, 7], at=[3, 6]), 2)
    moves = np.full((2, N, SLOTS), SLOTS, np.int32)
    moves[:, 0, 0], moves[:, 1, 0] = (3, 1), (2, 0)
    state = move(state, moves)
    assert np.argwhere(state.slots.live).tolist() == [[0, 1], [1, 0]]
    table = np.zeros_like(TABLE)
    table[0, 1], table[1, 0] = TABLE[0, 3], TABLE[1, 2]
    others = np.ones((N, 1 + SLOTS * COUNT), bool)
    others[:, 0], others[0, table[0, 1]], others[1, table[1, 0]] = False, False, False
    poison = jax.tree.map(
        lambda x: jnp.where(others[:, None, :, None, None, None], np.nan, x), state.cache
    )
    state = state._replace(cache=poison)
    assert run(state, 100, width=2, table=0 * table)[2] == 0
    state, _, _ = run(state, 100, width=2, table=table)
    for slot, b in ((1, 0), (4, 7)):
        assert_said(flat(state.slots), slot, sampled, b)
        assert sampled.length[b] > 2


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1)], ids=str)
def test_take_counts_blocks_through_all_shards_and_keeps_every_bit(layout):
    """Three slots of two blocks of four tokens on each of four shards; the log-probs hold NaN, -0
    and infinity.
    """
    rng = np.random.default_rng(0)
    tokens, logprobs = (
        rng.integers(0, 99, (4, 3, 8), np.int32),
        rng.normal(size=(4, 3, 8)).astype(np.float32),
    )
    logprobs[2, 1, :3] = np.nan, -0.0, -np.inf
    mesh = make_mesh(MeshSection(*layout), jax.devices()[: np.prod(layout)])
    slots = Slots(**dict.fromkeys(Slots._fields) | {"tokens": tokens, "logprobs": logprobs})
    slots = slots._replace(experts=rng.integers(0, 256, (4, 3, 8, 5)).astype(np.uint8))
    blocks = np.array([0, 14, 23, 15, 14], np.int32)
    take = jax.jit(functools.partial(sampler.take, size=4, mesh=mesh))
    found, experts = map(np.asarray, take(slots, blocks))
    np.testing.assert_array_equal(experts, slots.experts.reshape(-1, 4, 5)[blocks])
    assert take(slots._replace(experts=None), blocks)[1] is None
    np.testing.assert_array_equal(found[0], tokens.reshape(-1, 4)[blocks])
    np.testing.assert_array_equal(found[1], logprobs.reshape(-1, 4)[blocks].view(np.int32))


@pytest.mark.default("(2, 2, 2)-*")
@pytest.mark.parametrize(
    "layout, kv_heads, int8", [((2, 2, 2), 2, False), ((1, 4, 2), 1, True)], ids=str
)
def test_prompts_are_read_and_go_into_slots_on_any_devices(layout, kv_heads, int8):
    """Each shard reads its own prompts, and gets what the others have read.

    Against one device; a row wanted twice, slots left alone.
    """
    model = tiny.model(kv_heads=kv_heads)
    mesh, params = make_mesh(MeshSection(*layout)), tiny.params(model)
    shards, rng = layout[0] * layout[1], np.random.default_rng(1)
    prompts = rng.integers(0, model.vocab_size, (2 * shards, P)).astype(np.int32)
    rows = rng.permutation(2 * shards)[:shards]
    packed = np.full((len(Arrivals._fields), shards, 3), 3, np.int32)
    packed[:, :, 0], packed[0, :, 0], packed[:, 0, 1] = 0, 2, 0
    copies = np.zeros((2, shards, 4), np.int32)
    for part in range(2):  # a row has two pages: into pages 2 and 5, and 3 and 1 of the first shard
        copies[0, :, part], copies[1, :, part] = 2 * rows + part, (2, 5)[part]
        copies[0, 0, 2 + part], copies[1, 0, 2 + part] = 2 * rows[-1] + part, (3, 1)[part]

    def cache_on(mesh):
        how = {"model": model, "page": PAGE, "int8": int8, "mesh": mesh}
        read = jax.jit(functools.partial(sampler.prefill, **how))
        put = jax.jit(functools.partial(sampler.insert, mesh=mesh))
        sizes = {"shards": shards, "slots": 3, "pages": 7, "page": PAGE, "room": R}
        state = sampler.empty_state(model, **sizes, int8=int8)
        placed = jax.device_put(params, rollout_sharding(params, mesh))
        prefilled = read(placed, prompts)
        return prefilled, put(state, prefilled, SEED, packed, copies, 4).cache

    (read, found), (expected_read, expected) = cache_on(mesh), cache_on(ONE)
    assert read.k.addressable_shards[0].data.shape[1] == 2  # prompts a shard
    tolerance = {
        "rtol": 0,
        "atol": 1 if int8 else 1e-5,
    }  # a rounded step of 8 bits; measured: 1e-6 of values up to 4
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), read, expected_read)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), found, expected)
    np.testing.assert_array_equal(
        expected.k[:, :, [2, 5]], np.moveaxis(expected_read.k[:, rows], 1, 0)
    )
    np.testing.assert_array_equal(
        expected.k[0, :, [3, 1]].swapaxes(0, 1), expected_read.k[:, rows[-1]]
    )
    filled = np.zeros((shards, 7), bool)
    filled[:, [0, 2, 5]], filled[0, [3, 1]] = True, True
    assert not np.moveaxis(np.asarray(expected.k), 1, 2)[~filled].any()


@pytest.mark.slow
def test_a_gpu_fills_and_extends_the_cache_with_the_same(monkeypatch):
    """Its scatters against the loops of other platforms: pages left alone, a slot without any.
    8 bits have scales too.
    """
    mesh = make_mesh(MeshSection(2, 1, 1), jax.devices()[:2])
    params = jax.device_put(sharp_params(), rollout_sharding(sharp_params(), mesh))

    def states():
        state = sampler.empty_state(MODEL, **SIZES, int8=True)
        state = jax.tree.map(
            lambda x: x if x.dtype == state.slots.keys.dtype else x + 1, state
        )  # so that what is left alone shows
        packed = np.full((len(Arrivals._fields), N, SLOTS), SLOTS, np.int32)
        copies = np.zeros((2, N, 6), np.int32)
        for n, (slot, row, length) in enumerate([(2, 5, P), (0, 1, 1)]):
            packed[:, n, 0] = Arrivals(slot, PROMPTS[row, length - 1], length - 1, n, 0, R)
            copies[:, n, :2] = (2 * row, 2 * row + 1), TABLE[n, slot, :2]
        how = {"model": MODEL, "page": PAGE, "int8": True, "mesh": mesh}
        prefilled = jax.jit(functools.partial(sampler.prefill, **how))(params, PROMPTS)
        started = jax.jit(functools.partial(sampler.insert, mesh=mesh))(
            state, prefilled, SEED, packed, copies, 2
        )
        table = TABLE.copy()
        table[1, 3] = 0
        run = functools.partial(sampler.decode, Decoding(MODEL, SAMPLING, STOP, mesh), width=SLOTS)
        caches = started.cache, jax.jit(run)(params, started, table, Until(0, 0, 2))[0].cache
        return jax.tree.map(lambda x: x[:, :, 1:], caches)  # page 0 may hold anything

    expected = states()
    gpu = lambda *args, default, **other: other.get("cuda", default)(*args)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", gpu)
    jax.tree.map(np.testing.assert_array_equal, states(), expected)
    assert (
        np.asarray(expected[1].k) != np.asarray(expected[0].k)
    ).any()  # two tokens a sequence were written


# --------------------------------------------------------------------------------------------------------------------
# What is compiled
# --------------------------------------------------------------------------------------------------------------------


def shapes(kind: str, text: str) -> list[tuple[int, ...]]:
    """Shapes of what operations of a kind give in a compiled program."""
    lines = re.findall(rf"= (\S+) (?:{kind})(?:-start)?\(", text)
    return [
        tuple(int(n) for n in shape.split(",") if n)
        for line in lines
        for shape in re.findall(r"\w\d*\[([\d,]*)\]", line)
    ]


@pytest.mark.slow
def test_caches_and_responses_are_written_in_place():
    """The donated state is the result; no step copies a cache, a part of it of all layers, or the
    tokens.
    """
    state = jax.eval_shape(
        functools.partial(empty, **SIZES | {"pages": 4096, "page": 64, "room": 4090})
    )
    how = Decoding(MODEL, SAMPLING, STOP, ONE)
    step = functools.partial(sampler.decode, how, width=SLOTS)
    program = jax.jit(step, donate_argnums=1)
    table = jax.ShapeDtypeStruct((N, SLOTS, 2), "int32")
    program = program.lower(abstract_params(MODEL), state, table, Until(0, 0, 4)).compile()
    big = [2 * SLOTS * MODEL.kv_heads * 64 * MODEL.head_dim, N * SLOTS * 4090]
    assert not [s for s in shapes("copy", program.as_text()) if np.prod(s) >= min(big)]
    memory = program.memory_analysis()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes > cache_bytes and memory.temp_size_in_bytes < cache_bytes / 10


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_sequences_on_different_devices_need_no_communication(layout):
    """But to agree when to leave, and to put a token's activations together from devices that share
    the weights.
    """
    mesh = make_mesh(MeshSection(*layout))
    shards = layout[0] * layout[1]
    heads = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    state = jax.eval_shape(
        functools.partial(empty, shards=shards, slots=2, pages=7, page=32, room=80)
    )
    layouts = sampler.SamplerState(Cache(heads, heads), jax.tree.map(lambda _: rows, state.slots))
    how = Decoding(MODEL, SAMPLING, STOP, mesh)
    decode = functools.partial(sampler.decode, how, width=1)
    inputs = (rollout_sharding(abstract_params(MODEL), mesh), layouts, rows, None)
    program = jax.jit(decode, in_shardings=inputs)
    table = jax.ShapeDtypeStruct((shards, 2, 3), "int32")
    text = program.lower(abstract_params(MODEL), state, table, Until(0, 0, 4)).compile().as_text()
    moved = shapes("all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute", text)
    assert moved and max(int(np.prod(s)) for s in moved) <= (128 if layout[2] > 1 else 1)


def test_a_trace_names_the_parts_of_a_decode_step():
    state = jax.eval_shape(functools.partial(empty, **SIZES))
    until = Until(0, 0, 4)
    program = decode.lower(abstract_params(MODEL), state, TABLE, until, width=SLOTS)
    text = program.as_text(debug_info=True)
    for scope in ("embed", "layer/attention", "layer/mlp", "cache", "head", "draw"):
        assert re.search(rf"\b{scope}\)?/", text), scope  # vmap(embed)/gather, layer/mlp/mul
