"""From responses to training rows: the loss normaliser, first-fit-decreasing packing, and the way
back.

A packed row holds several segments, each a prompt followed by its response. Entry t of a row speaks
of predicting token t from what precedes it in its segment (`types.TrainBatch`).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from dapo_jax.types import TrainBatch

Normalizer = Literal["token-mean", "group-token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


class TrainItem(NamedTuple):
    """One response to train on."""

    prompt: np.ndarray  # int32 [P], P >= 1
    response: np.ndarray  # int32 [R]
    old_logprobs: np.ndarray  # float32 [R]
    behavior_logprobs: np.ndarray  # float32 [R]
    advantage: float
    weight: float  # of each of its tokens in the loss, see `normalizer_weights`


class Placement(NamedTuple):
    """Where a response lies in a packed batch: entries [microbatch, row, start : start + length]."""

    microbatch: int
    row: int
    start: int  # of the response, after its prompt
    length: int  # response tokens


class PackStats(NamedTuple):
    """How well a batch is filled, and where its responses are."""

    rows: int  # rows that hold anything
    used_microbatches: int  # micro-batches that hold anything; they come first
    tokens: int  # prompt and response tokens
    target_tokens: int  # response tokens
    efficiency: float  # tokens / (rows x row_len)
    long_share: float  # of the loss, see `long_share`
    placement: tuple[Placement, ...]  # one an item, in the items' order


def normalizer_weights(
    group_of: np.ndarray, target_counts: np.ndarray, kept: np.ndarray, *, normalizer: Normalizer
) -> np.ndarray:
    """Weight w_i of every token of response i, so that the loss of a mini-batch is sum_i w_i sum_t
    loss_it. [n] each -> float32 [n].

        token-mean           1 / sum of |o|
        group-token-mean     1 / (groups x sum of |o| in the group of i)       arXiv 2503.14476, Eq. 8
        seq-mean-token-mean  1 / (responses x |o_i|)                           naive GRPO
        seq-mean-token-sum   1 / responses

    group_of: which group a response is of (any integers). target_counts: |o_i|, tokens. kept: False
    takes a response out of the loss and of all the sums above; so does having no tokens. These get
    0. Raises ValueError for shapes that differ, negative counts and unknown normalisers.

    >>> group_of, lengths, kept = [1, 1, 2, 2], [2, 4, 1, 3], [True] * 4
    >>> print(normalizer_weights(group_of, lengths, kept, normalizer="token-mean").round(4))
    [0.1 0.1 0.1 0.1]
    >>> print(normalizer_weights(group_of, lengths, kept, normalizer="group-token-mean").round(4))
    [0.0833 0.0833 0.125  0.125 ]
    """
    group_of, counts, kept = (
        np.asarray(group_of),
        np.asarray(target_counts, np.int64),
        np.asarray(kept, bool),
    )
    if counts.ndim != 1 or not group_of.shape == counts.shape == kept.shape:
        raise ValueError(
            f"group_of, target_counts and kept must be [n], got {group_of.shape}, {counts.shape}, {kept.shape}"
        )
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
            divisor = np.full(counts.size, counts.size)
        case _:
            raise ValueError(f"unknown normalizer {normalizer!r}")
    weights = np.zeros(trained.size, np.float32)
    weights[trained] = 1.0 / divisor
    return weights


def long_share(
    lengths: Sequence[int] | np.ndarray, weights: Sequence[float], advantages: Sequence[float]
) -> float:
    """What share of sum_i |o_i| w_i |A_i| the longest quarter of the responses carries, in [0, 1];
    0 where the sum is 0. [n] each.

    At ratio 1 this is how the gradient's weight is shared out: a sample-level loss gives every
    response of a group as much, however long; a token-level loss gives long ones more. Of equal
    lengths the first ones count as long; the quarter is rounded up.
    """
    sizes = np.asarray(lengths, np.float64)
    carried = sizes * np.abs(np.asarray(weights, np.float64) * np.asarray(advantages, np.float64))
    longest = np.argsort(-sizes, kind="stable")[: _ceil_div(sizes.size, 4)]
    return float(carried[longest].sum() / total) if (total := carried.sum()) else 0.0


def pack_rows(lengths: Sequence[int] | np.ndarray, row_len: int) -> list[list[int]]:
    """First-fit-decreasing: which items share a row of row_len tokens.

    Rows of indices into lengths, ascending in each row.

    Longest first, equal lengths by index, each into the first row with room; at most 11/9 of the
    fewest possible rows + 6/9 (Dósa 2007). Time is items x rows, in one vectorised scan an item.
    Raises ValueError for a length outside 1..row_len.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= row_len:
        raise ValueError(
            f"items of {sizes.min()} to {sizes.max()} tokens do not fit rows of {row_len}; lengths are from 1 to row_len"
        )
    room = np.full(sizes.size, row_len)
    rows: list[list[int]] = []
    for index in np.argsort(-sizes, kind="stable"):
        row = int(
            np.argmax(room[: len(rows) + 1] >= sizes[index])
        )  # the row after the last is empty, so there is always one
        if row == len(rows):
            rows.append([])
        rows[row].append(int(index))
        room[row] -= sizes[index]
    return [sorted(row) for row in rows]


def max_microbatches(
    n_items: int, *, row_len: int, max_item_len: int, rows_per_microbatch: int
) -> int:
    """Micro-batches that suffice for any n_items of at most max_item_len tokens, packed by
    `pack_rows`.

    Let k = floor(row_len / max_item_len). A row with fewer than k items has at most (k - 1)
    max_item_len tokens taken, so at least max_item_len free, and takes any item. First-fit
    therefore opens a row only once every earlier row has k items or more: all rows but the last
    hold at least k, and there are at most ceil(n_items / k). Items that are all of max_item_len
    attain it. Raises ValueError if an item may be longer than a row.
    """
    if not 1 <= max_item_len <= row_len:
        raise ValueError(f"max_item_len must be from 1 to row_len {row_len}, got {max_item_len}")
    return _ceil_div(_ceil_div(n_items, row_len // max_item_len), rows_per_microbatch)


def build_batch(
    items: Sequence[TrainItem],
    *,
    row_len: int,
    rows_per_microbatch: int,
    microbatches: int | None = None,
    row_shards: int = 1,
) -> tuple[TrainBatch, PackStats]:
    """Packs items into numpy rows [M, N, T] with T = row_len, N = rows_per_microbatch, M =
    microbatches or the fewest that do.

    Each micro-batch is split over row_shards devices, N / row_shards successive rows each. Rows are
    dealt to the devices' parts of the used micro-batches in descending order of attention cost (sum
    of squared segment lengths), back and forth, so that the costs of any two parts differ by at
    most the costliest row's, and their row counts by at most one. Micro-batches beyond the used
    ones, and rows beyond the dealt ones, are empty. Raises ValueError for no items, an empty
    prompt, log-probs that do not match the response, an item longer than a row, too few
    microbatches, and rows that do not divide over the devices.
    """
    if rows_per_microbatch % row_shards:
        raise ValueError(f"{rows_per_microbatch} rows do not divide over {row_shards} devices")
    if not items:
        raise ValueError("there are no items to pack")
    for i, item in enumerate(items):
        if not len(item.prompt):
            raise ValueError(
                f"item {i} has an empty prompt; its first response token would have nothing to be predicted from"
            )
        tokens, old, behavior = (
            len(item.response),
            len(item.old_logprobs),
            len(item.behavior_logprobs),
        )
        if not tokens == old == behavior:
            raise ValueError(
                f"item {i} has {tokens} response tokens, but {old} old and {behavior} behavior log-probs"
            )
    lengths = np.array([len(item.prompt) + len(item.response) for item in items])
    rows = pack_rows(lengths, row_len)
    used = _ceil_div(len(rows), rows_per_microbatch)
    if microbatches is None:
        microbatches = used
    if used > microbatches:
        raise ValueError(
            f"{len(rows)} rows need {used} micro-batches of {rows_per_microbatch} rows, got {microbatches}"
        )

    shape = (microbatches, rows_per_microbatch, row_len)
    batch = TrainBatch(
        tokens=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        target_mask=np.zeros(shape, np.bool_),
        old_logprobs=np.zeros(shape, np.float32),
        behavior_logprobs=np.zeros(shape, np.float32),
        advantages=np.zeros(shape, np.float32),
        weight=np.zeros(shape, np.float32),
    )
    costs = np.array([np.sum(lengths[row] ** 2) for row in rows])
    placement: dict[int, Placement] = {}
    parts = used * row_shards  # part p is of micro-batch p % used, device p // used
    for rank, r in enumerate(np.argsort(-costs, kind="stable")):
        turn, part = divmod(rank, parts)
        device, m = divmod(part if turn % 2 == 0 else parts - 1 - part, used)
        n = device * (rows_per_microbatch // row_shards) + turn
        start = 0
        for segment, i in enumerate(rows[r], start=1):
            item = items[i]
            middle, end = start + len(item.prompt), start + int(lengths[i])
            batch.tokens[m, n, start:middle] = item.prompt
            batch.tokens[m, n, middle:end] = item.response
            batch.segment_ids[m, n, start:end] = segment
            batch.positions[m, n, start:end] = np.arange(end - start)
            batch.target_mask[m, n, middle:end] = True
            batch.old_logprobs[m, n, middle:end] = item.old_logprobs
            batch.behavior_logprobs[m, n, middle:end] = item.behavior_logprobs
            batch.advantages[m, n, middle:end] = item.advantage
            batch.weight[m, n, middle:end] = item.weight
            placement[i] = Placement(m, n, middle, end - middle)
            start = end
    stats = PackStats(
        rows=len(rows),
        used_microbatches=used,
        tokens=int(lengths.sum()),
        target_tokens=sum(len(item.response) for item in items),
        efficiency=float(lengths.sum() / (len(rows) * row_len)),
        long_share=long_share(
            [len(i.response) for i in items],
            [i.weight for i in items],
            [i.advantage for i in items],
        ),
        placement=tuple(placement[i] for i in range(len(items))),
    )
    return batch, stats


def gather_targets(values: np.ndarray, placement: Sequence[Placement]) -> list[np.ndarray]:
    """The values [M, N, T] on each response's tokens, float32 [R] each, in the order of placement."""
    return [
        np.array(values[p.microbatch, p.row, p.start : p.start + p.length], np.float32)
        for p in placement
    ]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
