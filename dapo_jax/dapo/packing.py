"""From responses to training rows: the loss normaliser and first-fit-decreasing packing.

A packed row holds several segments, each a prompt followed by its response (`types.TrainBatch`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Shaped, UInt8
from numpy.typing import ArrayLike

from dapo_jax.types import TrainBatch

# Of the fields of a TrainBatch, in order, but the last.
_DTYPES: Sequence[type[np.generic]] = [np.int32] * 3 + [np.bool_] + [np.float32] * 4 + [np.bool_]


class TrainItem(NamedTuple):
    prompt: Int32[np.ndarray, " P"]  # P >= 1
    response: Int32[np.ndarray, " R"]
    old_logprobs: Float32[np.ndarray, " R"]
    behavior_logprobs: Float32[np.ndarray, " R"]
    advantage: float
    weight: float  # of each of its tokens in the loss, see `normalizer_weights`
    current: bool = True  # this step's policy sampled it, so its log-probs can be compared
    experts: UInt8[np.ndarray, "R c"] | None = None  # of all items, or of none


class Placement(NamedTuple):
    """Where a response is in a packed batch: [microbatch, row, start : start + length]."""

    microbatch: int
    row: int
    start: int  # of the response, after its prompt
    length: int  # response tokens


class PackStats(NamedTuple):
    """How well a batch is filled, and where its responses are."""

    rows: int  # non-empty rows
    used_microbatches: int  # non-empty micro-batches; they come first
    tokens: int  # prompt and response tokens
    target_tokens: int  # response tokens
    efficiency: float  # tokens / (rows x row_len)
    long_share: float  # of the loss, see `long_share`
    placement: tuple[Placement, ...]  # one per item, in the items' order


def normalizer_weights(
    group_of: ArrayLike,
    target_counts: ArrayLike,
    kept: ArrayLike,
    *,
    normalizer: str,
    length: int | None = None,
) -> Float32[np.ndarray, " n"]:
    """Weight w_i of each token of response i: the loss of a mini-batch is Σ_i w_i Σ_t loss_it.

        token-mean           1 / sum of |o|
        group-token-mean     1 / (groups x sum of |o| in the group of i)   arXiv 2503.14476, Eq. 8
        seq-mean-token-mean  1 / (responses x |o_i|)                       naive GRPO
        seq-mean-token-sum   1 / (responses x length)                      Dr. GRPO; length 1: None

    [n] each: group_of, any integers; target_counts, |o_i|; kept: False takes a response out of the
    loss and of all sums, as having no tokens does.

    Returns 0 for responses without tokens or not kept. Raises ValueError for shapes that differ,
    negative counts and unknown normalisers.

    >>> group_of, lengths, kept = [1, 1, 2, 2], [2, 4, 1, 3], [True] * 4
    >>> print(normalizer_weights(group_of, lengths, kept, normalizer="token-mean").round(4))
    [0.1 0.1 0.1 0.1]
    >>> print(normalizer_weights(group_of, lengths, kept, normalizer="group-token-mean").round(4))
    [0.0833 0.0833 0.125  0.125 ]
    """
    group_of, kept = np.asarray(group_of), np.asarray(kept, bool)
    counts = np.asarray(target_counts, np.int64)
    shapes = group_of.shape, counts.shape, kept.shape
    if counts.ndim != 1 or len({*shapes}) > 1:
        raise ValueError(f"group_of, target_counts and kept must be [n], got {shapes}")
    if (counts < 0).any():
        raise ValueError("target_counts must not be negative")
    trained = kept & (counts > 0)
    counts = counts[trained]
    _, group = np.unique(group_of[trained], return_inverse=True)
    match normalizer:
        case "token-mean":
            divisor = np.full(counts.size, counts.sum())
        case "group-token-mean":
            group_tokens = np.bincount(group, weights=counts)
            divisor = group_tokens.size * group_tokens[group]
        case "seq-mean-token-mean":
            divisor = counts.size * counts
        case "seq-mean-token-sum":
            divisor = np.full(counts.size, counts.size * (length or 1))
        case _:
            raise ValueError(f"unknown normalizer {normalizer!r}")
    weights = np.zeros(trained.size, np.float32)
    weights[trained] = 1.0 / divisor
    return weights


def long_share(lengths: ArrayLike, weights: ArrayLike, advantages: ArrayLike) -> float:
    """The share of Σ_i |o_i| w_i |A_i| in the longest quarter of the responses, 0 if the sum is 0.

    At ratio 1 this is their share of the gradient. [n] each; the quarter is rounded up.
    """
    sizes = np.asarray(lengths, np.float64)
    carried = sizes * np.abs(np.asarray(weights, np.float64) * np.asarray(advantages, np.float64))
    longest = np.argsort(-sizes, kind="stable")[: -(-sizes.size // 4)]
    return float(carried[longest].sum() / total) if (total := carried.sum()) else 0.0


def pack_rows(lengths: ArrayLike, row_len: int) -> list[list[int]]:
    """First-fit-decreasing: rows of ascending indices into lengths, at most row_len tokens each.

    Longest first, equal lengths by index, each into the first row with room; at most 11/9 of the
    fewest possible rows + 6/9 (Dósa 2007). Raises ValueError for a length outside 1..row_len.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= row_len:
        found = f"items of {sizes.min()} to {sizes.max()} tokens"
        raise ValueError(f"{found} do not fit rows of {row_len}; lengths are from 1 to row_len")
    room = np.full(sizes.size, row_len)
    rows: list[list[int]] = []
    for index in np.argsort(-sizes, kind="stable"):
        row = int(np.argmax(room[: len(rows) + 1] >= sizes[index]))  # the last one is empty
        if row == len(rows):
            rows.append([])
        rows[row].append(int(index))
        room[row] -= sizes[index]
    return [sorted(row) for row in rows]


def max_microbatches(
    n_items: int, *, row_len: int, max_item_len: int, rows_per_microbatch: int
) -> int:
    """Micro-batches that suffice for any n_items of at most max_item_len tokens.

    Let k = floor(row_len / max_item_len). A row with fewer than k items has max_item_len tokens
    free and takes any item, so `pack_rows` opens a row only if all others have at least k: there
    are at most ceil(n_items / k), attained by the longest items. Raises ValueError if an item may
    be longer than a row.
    """
    if not 1 <= max_item_len <= row_len:
        raise ValueError(f"max_item_len must be from 1 to row_len {row_len}, got {max_item_len}")
    rows = -(-n_items // (row_len // max_item_len))
    return -(-rows // rows_per_microbatch)


def build_batch(
    items: Sequence[TrainItem],
    *,
    row_len: int,
    rows_per_microbatch: int,
    microbatches: int | None = None,
    row_shards: int = 1,
) -> tuple[TrainBatch, PackStats]:
    """Packs items into numpy rows [M, N, T].

    T = row_len, N = rows_per_microbatch, M = microbatches or the fewest that suffice. Rows go to
    the row_shards parts of the used micro-batches in descending order of attention cost (sum of
    squared segment lengths), in snake order: costs of two parts differ by at most the costliest
    row's. The other rows and micro-batches, at the end, are empty.

    Raises ValueError for no items, an empty prompt, log-probs that do not match the response, an
    item longer than a row, too few microbatches, and rows that do not divide over the devices.
    """
    if rows_per_microbatch % row_shards:
        raise ValueError(f"{rows_per_microbatch} rows do not divide over {row_shards} devices")
    _check_items(items)
    lengths = np.array([len(item.prompt) + len(item.response) for item in items])
    rows = pack_rows(lengths, row_len)
    used = -(-len(rows) // rows_per_microbatch)
    microbatches = used if microbatches is None else microbatches
    if used > microbatches:
        size = f"micro-batches of {rows_per_microbatch} rows"
        raise ValueError(f"{len(rows)} rows need {used} {size}, got {microbatches}")

    shape = (microbatches, rows_per_microbatch, row_len)
    batch = TrainBatch(*(np.zeros(shape, dtype) for dtype in _DTYPES))
    if (experts := items[0].experts) is not None:
        batch = batch._replace(experts=np.zeros((*shape, experts.shape[1]), np.uint8))
    costs = np.array([np.sum(lengths[row] ** 2) for row in rows])
    placement: dict[int, Placement] = {}
    parts = used * row_shards  # part p is of micro-batch p % used, device p // used
    for rank, r in enumerate(np.argsort(-costs, kind="stable")):
        turn, part = divmod(rank, parts)
        device, m = divmod(part if turn % 2 == 0 else parts - 1 - part, used)
        n = device * (rows_per_microbatch // row_shards) + turn
        start = 0
        for segment, i in enumerate(rows[r], start=1):
            end = start + int(lengths[i])
            parts_of = (None if field is None else field[m, n, start:end] for field in batch)
            _write(TrainBatch(*parts_of), items[i], segment)
            count = len(items[i].response)
            placement[i] = Placement(m, n, end - count, count)
            start = end
    sizes = np.array([len(item.response) for item in items])
    stats = PackStats(
        rows=len(rows),
        used_microbatches=used,
        tokens=int(lengths.sum()),
        target_tokens=int(sizes.sum()),
        efficiency=float(lengths.sum() / (len(rows) * row_len)),
        long_share=long_share(sizes, [i.weight for i in items], [i.advantage for i in items]),
        placement=tuple(placement[i] for i in range(len(items))),
    )
    return batch, stats


def _check_items(items: Sequence[TrainItem]) -> None:
    if not items:
        raise ValueError("there are no items to pack")
    for i, item in enumerate(items):
        if not len(item.prompt):
            raise ValueError(f"item {i} has an empty prompt: nothing to predict its response from")
        tokens, old, behavior = map(len, item[1:4])
        if not tokens == old == behavior:
            found = f"{old} old and {behavior} behavior log-probs"
            raise ValueError(f"item {i} has {tokens} response tokens, but {found}")


def _write(entries: TrainBatch, item: TrainItem, segment: int) -> None:
    p = len(item.prompt)
    entries.tokens[:p] = item.prompt
    entries.tokens[p:] = item.response
    entries.segment_ids[:] = segment
    entries.positions[:] = np.arange(len(entries.positions))
    entries.target_mask[p:] = True
    entries.old_logprobs[p:] = item.old_logprobs
    entries.behavior_logprobs[p:] = item.behavior_logprobs
    entries.advantages[p:] = item.advantage
    entries.weight[p:] = item.weight
    entries.current[p:] = item.current
    if entries.experts is not None:
        entries.experts[p:] = item.experts


def gather_targets(
    values: Shaped[np.ndarray, "M N T"], placement: Sequence[Placement]
) -> list[Float32[np.ndarray, " _"]]:
    """The values [M, N, T] of each response's tokens, float32 [R], in the order of placement."""
    return [np.array(values[m, n, start : start + r], np.float32) for m, n, start, r in placement]
