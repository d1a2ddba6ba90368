"""Work that a model takes, counted from its architecture.

A multiplication and an addition are two FLOPs.

The compiler's own count sees the body of a loop over layers once and no kernel at all.
"""

from dapo_jax.config import ModelConfig


def layer_weights(c: ModelConfig) -> int:
    """Weights in the matmuls of all layers: D(H + 2K)h + HhD of attention and 3DF of the
    feed-forward, each.
    """
    attention = c.model_dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    return c.layers * (attention + 3 * c.model_dim * c.ffn_dim)


def head_weights(c: ModelConfig) -> int:
    """Weights of the output projection, DV."""
    return c.model_dim * c.vocab_size


def adapter_weights(c: ModelConfig) -> int:
    """Weights of the adapters of all layers: r · (inputs + outputs) of each adapted projection; 0
    without LoRA.
    """
    if c.lora is None:
        return 0
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    other = {
        "q": queries,
        "k": keys,
        "v": keys,
        "o": queries,
        "gate": c.ffn_dim,
        "up": c.ffn_dim,
        "down": c.ffn_dim,
    }
    return c.layers * c.lora.rank * sum(c.model_dim + other[name] for name in c.lora.targets)


def weights(c: ModelConfig) -> int:
    """Weights of all matrices, embedding and head once if tied.

    Norms and biases, below a thousandth of it, are left out.
    """
    return layer_weights(c) + head_weights(c) * (1 if c.tie_embeddings else 2)


def _mean_over_layers(c: ModelConfig, near: float, whole: float) -> float:
    """`near` in layers with a window, `whole` in the others."""
    share = 0.0 if c.windows is None else (c.layers - c.layers // c.windows.every) / c.layers
    return share * near + (1 - share) * whole


def visible_keys(c: ModelConfig, length: float) -> float:
    """Keys that the last of n tokens sees, n, or W with a window. Mean over layers."""
    return _mean_over_layers(c, min(length, c.windows.size) if c.windows else length, length)


def visible_pairs(c: ModelConfig, length: float) -> float:
    """Pairs of query and key in a causal segment: n(n + 1) / 2; with a window W(W + 1) / 2 + (n -
    W)W. Mean over layers.
    """
    w = min(length, c.windows.size) if c.windows else length
    return _mean_over_layers(c, w * (w + 1) / 2 + (length - w) * w, length * (length + 1) / 2)


def forward_flops(c: ModelConfig, tokens: float, pairs: float, targets: float) -> float:
    """2 a weight and token, 4Hh a layer and pair of query and key (scores and their sum of values),
    2DV a target.
    """
    return (
        2 * (layer_weights(c) + adapter_weights(c)) * tokens
        + 4 * c.layers * c.heads * c.head_dim * pairs
        + 2 * head_weights(c) * targets
    )


def backward_flops(c: ModelConfig, tokens: float, pairs: float, targets: float) -> float:
    """Twice the forward pass; with LoRA without the gradient of frozen weights, which for them is
    once.
    """
    frozen = (
        0.0 if c.lora is None else 2 * layer_weights(c) * tokens + 2 * head_weights(c) * targets
    )
    return 2 * forward_flops(c, tokens, pairs, targets) - frozen


def train_flops(c: ModelConfig, tokens: float, pairs: float, targets: float) -> float:
    """Forward and backward. What remat computes again is no work of the model's."""
    return forward_flops(c, tokens, pairs, targets) + backward_flops(c, tokens, pairs, targets)


def recomputed_flops(c: ModelConfig, tokens: float, pairs: float) -> float:
    """What the backward pass does over: with remat "full" the layers, with "dots" what is no matmul
    with weights.
    """
    return {
        "none": 0.0,
        "dots": forward_flops(c, 0, pairs, 0),
        "full": forward_flops(c, tokens, pairs, 0),
    }[c.remat]


def cache_bytes(c: ModelConfig, *, int8: bool) -> int:
    """Keys and values of one token, in bytes: int8 with a float32 scale a head, or in compute
    dtype.
    """
    head = c.head_dim + 4 if int8 else c.head_dim * (2 if c.compute_dtype == "bfloat16" else 4)
    return 2 * c.layers * c.kv_heads * head
