"""A tiny model, tiny batches, and a plain loss to hold the packed and fused one against."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from dapo_jax.config import Experts, ModelConfig, Windows
from dapo_jax.dapo.packing import TrainItem, normalizer_weights
from dapo_jax.model.decoder import abstract_params, apply

# Relative error allowed between two orders of summing one gradient: 32 roundings of float32. Compiler
# and CPU decide the order: 7e-7 to 1.03e-6 were measured (jax 0.10.2, jax 0.12).
GRADIENT = 2e-6


def model(family="qwen3", **changes) -> ModelConfig:
    sizes = {
        "vocab_size": 40,
        "model_dim": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn_dim": 24,
    }
    own: dict = {}
    if family == "gemma3_text":
        own = {"windows": Windows(3, 2, 1e2), "rope_factor": 4.0, "query_scalar": 5}
    elif family == "qwen3_moe":
        own = {"experts": Experts(4, 2)}
    return ModelConfig(
        family=family, **(sizes | {"max_position": 64, "rope_theta": 1e4} | own | changes)
    )


@functools.cache
def params(config: ModelConfig):
    """Random weights with nothing trivial about them: also the norms and biases, which `init`
    leaves at one and zero.
    """
    rng = np.random.default_rng(0)
    one = 0 if config.family == "gemma3_text" else 1  # Gemma adds it itself

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        kind = path[-1].key
        return jnp.asarray(
            {
                "scale": one + 0.1 * noise,
                "bias": 0.1 * noise,
                "embedding": 0.1 * noise,
                "kernel": 0.25 * noise,
            }[kind]
        )

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


_SHAPE = (12, 13)  # of unpacked rows: one shape, one compilation a model


def _rows(items):
    """Tokens, target mask, old log-probs, advantages and weights [12, 13]: each item alone in a
    row, nothing packed.
    """
    tokens, mask = np.zeros(_SHAPE, np.int32), np.zeros(_SHAPE, bool)
    old, advantage, weight = np.zeros((3, *_SHAPE), np.float32)
    for i, item in enumerate(items):
        start, end = len(item.prompt), len(item.prompt) + len(item.response)
        tokens[i, :end] = np.concatenate([item.prompt, item.response])
        mask[i, start:end], old[i, start:end] = True, item.old_logprobs
        advantage[i, start:end], weight[i, start:end] = item.advantage, item.weight
    return tokens, mask, old, advantage, weight


@functools.partial(jax.jit, static_argnums=1)
def plain_logprobs(params, config, tokens, temperature=1.0):
    """log softmax(logits / temperature) of every token but the first of [n, T] rows, 0 on the
    first.
    """
    log_softmax = jax.nn.log_softmax(apply(params, config, tokens)[:, :-1] / temperature)
    return jnp.pad(
        jnp.take_along_axis(log_softmax, tokens[:, 1:, None], axis=-1)[..., 0], ((0, 0), (1, 0))
    )


def plain_loss(params, config, items, temperature=1.0):
    """Minus the objective of DAPO with ε 0.2 and 0.28, from whole log-softmaxes of unpacked rows."""
    tokens, mask, old, advantage, weight = _rows(items)
    ratio = jnp.exp(jnp.where(mask, plain_logprobs(params, config, tokens, temperature) - old, 0.0))
    bounded = jnp.where(advantage > 0, jnp.minimum(ratio, 1.28), jnp.maximum(ratio, 0.8))
    return -jnp.sum(weight * bounded * advantage)


def response_logprobs(params, config, items, temperature=1.0) -> list[np.ndarray]:
    """The model's log-probs of each response, [R] each."""
    tokens, mask, *_ = _rows(items)
    found = np.asarray(plain_logprobs(params, config, tokens, temperature))
    return [row[m] for row, m in zip(found, mask, strict=True)][: len(items)]


def with_ratios(params, config, items, ratios, temperature=1.0):
    """The items with old log-probs that make π_θ / π_old the given ratios."""
    found = response_logprobs(params, config, items, temperature)
    return [
        item._replace(old_logprobs=(p - np.log(r)).astype(np.float32))
        for item, p, r in zip(items, found, ratios, strict=True)
    ]


def make_items(
    config: ModelConfig, n: int, *, seed: int = 0, longest: int = 9, temperature: float = 1.0
) -> list[TrainItem]:
    """Random responses of 1 to `longest` tokens in groups of four, weighted per group, ratios on
    both sides of both clips.
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, longest + 1, n)
    weights = normalizer_weights(
        np.arange(n) // 4, counts, np.ones(n, bool), normalizer="group-token-mean"
    )
    items = []
    for count, weight in zip(counts, weights, strict=True):
        prompt, response = (
            rng.integers(0, config.vocab_size, size).astype(np.int32)
            for size in (rng.integers(1, 5), count)
        )
        zeros = np.zeros(count, np.float32)
        items.append(
            TrainItem(
                prompt,
                response,
                zeros,
                zeros,
                (-1) ** len(items) * rng.uniform(0.3, 2),
                float(weight),
            )
        )
    ratios = [np.exp(rng.normal(0, 0.5, len(item.response))) for item in items]
    return with_ratios(params(config), config, items, ratios, temperature)


def gap(found, expected) -> float:
    """‖found - expected‖ / ‖expected‖ over two trees of arrays, in float64."""
    a, b = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)])
        for t in (found, expected)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def nucleus_by_sorting(weights, top_p, top_k) -> np.ndarray:
    """Weights [V] with 0 for all but the k heaviest, then for all but the fewest that hold top_p;
    ties stay in.
    """
    kept = np.sort(weights)[::-1]
    threshold = kept[top_k - 1] if 0 < top_k <= kept.size else 0
    weights = np.where(weights >= threshold, weights, 0)
    if top_p == 1:
        return weights
    order = np.sort(weights)[::-1]
    enough = int(np.argmax(np.cumsum(order) >= top_p * order.sum()))
    return np.where(weights >= order[enough], weights, 0)


class CountedReads:
    """safe_open as `model.weights` uses it, which adds up the bytes of the parts that are read."""

    total = 0

    def __init__(self, path, framework):
        self.opened = safetensors.safe_open(path, framework=framework)
        self.keys = self.opened.keys

    def __enter__(self):
        self.opened.__enter__()
        return self

    def __exit__(self, *error):
        self.opened.__exit__(*error)

    def get_slice(self, name):
        return CountedSlice(self.opened.get_slice(name))


class CountedSlice:
    def __init__(self, part):
        self.part, self.get_shape, self.get_dtype = part, part.get_shape, part.get_dtype

    def __getitem__(self, index):
        values = self.part[index]
        CountedReads.total += values.nbytes
        return values


def shard_bytes(params) -> int:
    """Bytes of this process's shards, a replicated leaf once."""
    whole = [leaf.is_fully_replicated for leaf in jax.tree.leaves(params)]
    return sum(
        shard.data.nbytes
        for leaf, once in zip(jax.tree.leaves(params), whole, strict=True)
        for shard in leaf.addressable_shards[: 1 if once else None]
    )
