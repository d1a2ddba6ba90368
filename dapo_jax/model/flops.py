"""FLOPs, weights and cache bytes of a model, counted from its architecture.

A multiplication and an addition are two FLOPs. XLA's own count sees the body of the scan over
layers once, and nothing of a custom kernel.
"""

from dapo_jax.config import ModelConfig


def layer_weights(c: ModelConfig, *, active: bool = True) -> int:
    """Matmul weights of all layers, D(2H + 2K)h + 3DF each.

    Of a mixture of experts D(2H + 2K)h + DE + 3DFk: those that a token uses; with E for k: all.
    """
    attention = c.model_dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    router, copies = 0, 1
    if e := c.experts:
        router, copies = c.model_dim * e.count, e.per_token if active else e.count
    return c.layers * (attention + router + 3 * copies * c.model_dim * c.ffn_dim)


def head_weights(c: ModelConfig) -> int:
    """Weights of the output projection, DV."""
    return c.model_dim * c.vocab_size


def adapter_weights(c: ModelConfig) -> int:
    """LoRA weights of all layers, r · (inputs + outputs) of each adapted projection; else 0."""
    if c.lora is None:
        return 0
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = {"q": queries, "k": keys, "v": keys, "o": queries}
    widths = [c.model_dim + attention.get(name, c.ffn_dim) for name in c.lora.targets]
    return c.layers * c.lora.rank * sum(widths)


def weights(c: ModelConfig) -> int:
    """Weights of all matrices; norms and biases, below a thousandth of them, are left out."""
    return layer_weights(c, active=False) + head_weights(c) * (1 if c.tie_embeddings else 2)


def window_share(c: ModelConfig) -> float:
    """Share of the layers that have a window."""
    return (c.layers - c.layers // c.windows.every) / c.layers if c.windows else 0.0


def _mean_over_layers(c: ModelConfig, windowed: float, full: float) -> float:
    share = window_share(c)
    return share * windowed + (1 - share) * full


def visible_keys(c: ModelConfig, length: float) -> float:
    """Keys that the last of n tokens sees: n, or W with a window. Mean over layers."""
    return _mean_over_layers(c, min(length, c.windows.size) if c.windows else length, length)


def visible_pairs(c: ModelConfig, length: float) -> float:
    """Pairs of query and key in a causal segment of n tokens. Mean over layers.

    n(n + 1) / 2, or W(W + 1) / 2 + (n - W)W with a window.
    """
    w = min(length, c.windows.size) if c.windows else length
    return _mean_over_layers(c, w * (w + 1) / 2 + (length - w) * w, length * (length + 1) / 2)


def forward_flops(c: ModelConfig, tokens: float, pairs: float, targets: float) -> float:
    """2 a weight and token, 4LHh a pair of query and key (scores and values), 2DV a target."""
    attention = 4 * c.layers * c.heads * c.head_dim * pairs
    layers = 2 * (layer_weights(c) + adapter_weights(c)) * tokens
    return layers + attention + 2 * head_weights(c) * targets


def backward_flops(c: ModelConfig, tokens: float, pairs: float, targets: float) -> float:
    """Twice the forward pass; with LoRA frozen weights get no gradient and count once."""
    both = 2 * forward_flops(c, tokens, pairs, targets)
    frozen = 2 * layer_weights(c) * tokens + 2 * head_weights(c) * targets
    return both - frozen if c.lora else both


def train_flops(c: ModelConfig, tokens: float, pairs: float, targets: float) -> float:
    """Forward and backward, without what remat recomputes."""
    return forward_flops(c, tokens, pairs, targets) + backward_flops(c, tokens, pairs, targets)


def recomputed_flops(c: ModelConfig, tokens: float, pairs: float) -> float:
    """What the backward pass computes again on a TPU.

    The attention kernels take 7 products a pair where `backward_flops` has 4, for they compute
    scores and probabilities' gradients twice. Remat "full" computes the layers again, without the
    product with `down`, which no gradient needs; "dots" saves all products.
    """
    product = 2 * c.layers * c.heads * c.head_dim * pairs
    copies = c.experts.per_token if c.experts else 1
    down = 2 * c.layers * copies * c.model_dim * c.ffn_dim * tokens
    layers = forward_flops(c, tokens, pairs, 0) - down if c.remat == "full" else 0.0
    return 3 * product + layers


def cache_bytes(c: ModelConfig, *, int8: bool) -> int:
    """Bytes of one token's keys and values; int8 has a float32 scale a head."""
    head = c.head_dim + 4 if int8 else c.head_dim * (2 if c.compute_dtype == "bfloat16" else 4)
    return 2 * c.layers * c.kv_heads * head
