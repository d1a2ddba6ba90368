"""One decoder for Llama, Qwen2, Qwen3 and Gemma 3, in Flax NNX; plain pytrees of parameters outside
this file.

    tokens ─▶ embed ─▶ L × [ x + attn(norm(x)) ; x + mlp(norm(x)) ] ─▶ norm ─▶ head

Parameters are a nested dict, layers stacked on axis 0 and scanned:

    embed/embedding [V,D] · final_norm/scale [D] · head/kernel [D,V] (absent if tied) · layers/
      attn_norm/scale, mlp_norm/scale [L,D] · attn/{q,k,v}/kernel [L,D,heads,h], bias [L,heads,h]
      (qwen2) · attn/o/kernel [L,H,h,D] · attn/{q_norm,k_norm}/scale [L,h] (qwen3, gemma3) ·
      mlp/{gate,up}/kernel [L,D,F], down [L,F,D] beside a kernel [L,*in,*out] that LoRA adapts:
      adapter/a [L,*in,r], adapter/b [L,r,*out] attn_post_norm/scale, mlp_post_norm/scale [L,D]
      (gemma3)

Gemma 3 norms what a branch adds, too, has GELU instead of SiLU, scales by 1 + what its norms hold,
multiplies embeddings by √D, and looks back only so far in most of its layers (`Windows`): which
these are is scanned along.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import ArrayLike, Bool, Float, Float32, Int, Int32, Num, PRNGKeyArray

from dapo_jax.config import LoraConfig, ModelConfig
from dapo_jax.model.attention import Window, attend_cached, attend_rows, quantize
from dapo_jax.model.embedding import embed
from dapo_jax.model.logprobs import ROW_AXES, VOCAB_AXIS
from dapo_jax.model.lora import Adapter, adapter_of, stored
from dapo_jax.types import Params

Rope = tuple[Float32[Array, "*rows half"], Float32[Array, "*rows half"]]  # cosine and sine


class Cache(NamedTuple):
    """Keys and values of every layer, [L, B, K, S, h].

    How much of S is filled is the caller's to know.

    In compute dtype, or int8 with float32 scales [L, B, K, S] (`quantize`): a quarter of float32
    and about half of bfloat16.
    """

    k: Num[Any, "L B K S h"]
    v: Num[Any, "L B K S h"]
    scale_k: Float32[Any, "L B K S"] | None = None
    scale_v: Float32[Any, "L B K S"] | None = None


def _same(x: Array) -> Array:
    return x


class Layout(NamedTuple):
    """How activations lie on a mesh.

    Weights are split over axes that rows are split over too: left to itself, the compiler splits
    activations like the weights, and holds the rows of all devices on each.
    """

    whole: Callable[[Array], Array] = _same  # [N, T, D], what goes into a block's matmuls
    inner: Callable[[Array], Array] = _same  # [N, T, F], the feed-forward's hidden layer
    spread: Callable[[Array], Array] = _same  # [N, T, D], the residual stream between them

    @classmethod
    def over(cls, mesh: Mesh | None, length: int) -> "Layout":
        """Rows over ROW_AXES, F over "tensor", and so is T of the residual stream where that
        divides it: norms, sums and what the backward pass keeps are then no device's whole.
        """
        if mesh is None:
            return cls()

        def pin(*axes: Any) -> Callable[[Array], Array]:
            return lambda x: jax.lax.with_sharding_constraint(
                x, NamedSharding(mesh, PartitionSpec(ROW_AXES, *axes))
            )

        return cls(
            pin(),
            pin(None, VOCAB_AXIS),
            pin(VOCAB_AXIS) if splits_sequence(mesh, length) else pin(),
        )


def splits_sequence(mesh: Mesh | None, length: int) -> bool:
    """Whether the residual stream of rows of this length is split over "tensor" along T."""
    return mesh is not None and mesh.shape[VOCAB_AXIS] > 1 and length % mesh.shape[VOCAB_AXIS] == 0


def _lead(x: Array, ndim: int) -> Array:
    """x with leading axes of size 1, `ndim` axes in all."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


class Norm(nnx.Module):
    """RMS norm, x / √(mean x² + ε) · scale, in float32.

    Gemma's scale is 1 + what it holds, here times `gain`.
    """

    def __init__(self, dim: int, c: ModelConfig, gain: float = 1.0):
        self.gain = gain if c.family == "gemma3_text" else None
        self.scale = nnx.Param(jnp.ones(dim) if self.gain is None else jnp.zeros(dim))
        self.eps = c.norm_eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        scale = (
            self.scale[...]
            if self.gain is None
            else self.gain * (1 + self.scale[...].astype(jnp.float32))
        )
        return (wide * _lead(scale, x.ndim)).astype(x.dtype)


class Linear(nnx.Module):
    """A projection written as an einsum over tokens t, its kernel cast to the dtype of what it
    multiplies.
    """

    def __init__(
        self,
        spec: str,
        shape: tuple[int, ...],
        fan_in: int,
        rngs: nnx.Rngs,
        bias: tuple[int, ...] | None = None,
        gain: float = 1.0,
        lora: LoraConfig | None = None,
    ):
        self.spec = spec
        inputs = spec.index(",") - 1
        self.adapter = Adapter(shape[:inputs], shape[inputs:], fan_in, lora, rngs) if lora else None
        self.kernel = nnx.Param(gain * fan_in**-0.5 * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(bias)) if bias else None

    def __call__(self, x: Array) -> Array:
        # All leading axes become the one axis t: XLA's CPU backward pass of a product with two of
        # them is slow.
        lead = x.ndim - self.spec.index(",") + 1
        rows = x.reshape(-1, *x.shape[lead:])
        y = jnp.einsum(self.spec, rows, self.kernel[...].astype(x.dtype))
        if self.adapter is not None:
            y += self.adapter(rows)
        y = y.reshape(*x.shape[:lead], *y.shape[1:])
        return y if self.bias is None else y + _lead(self.bias[...].astype(x.dtype), y.ndim)


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        def project(name, heads):
            bias = (heads, c.head_dim) if c.family == "qwen2" else None
            return Linear(
                "td,dnh->tnh",
                (c.model_dim, heads, c.head_dim),
                c.model_dim,
                rngs,
                bias=bias,
                lora=adapter_of(c.lora, name),
            )

        self.q, self.k, self.v = (
            project("q", c.heads),
            project("k", c.kv_heads),
            project("v", c.kv_heads),
        )
        # Residual branches start small, so that depth does not blow up the stream at
        # initialisation.
        fan_in, gain = c.heads * c.head_dim, (2 * c.layers) ** -0.5
        self.o = Linear(
            "tnh,nhd->td",
            (c.heads, c.head_dim, c.model_dim),
            fan_in,
            rngs,
            gain=gain,
            lora=adapter_of(c.lora, "o"),
        )
        normed = c.family in ("qwen3", "gemma3_text")
        # Attention divides scores by √head_dim; queries make up for what they are to be divided by
        # instead.
        self.q_norm = (
            Norm(c.head_dim, c, (c.head_dim / (c.query_scalar or c.head_dim)) ** 0.5)
            if normed
            else None
        )
        self.k_norm = Norm(c.head_dim, c) if normed else None

    def qkv(self, x: Array, rope: Rope) -> tuple[Array, Array, Array]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rope), rotate(k, rope), v


class Mlp(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        d, f = c.model_dim, c.ffn_dim
        self.gate = Linear("td,df->tf", (d, f), d, rngs, lora=adapter_of(c.lora, "gate"))
        self.up = Linear("td,df->tf", (d, f), d, rngs, lora=adapter_of(c.lora, "up"))
        self.down = Linear(
            "tf,fd->td",
            (f, d),
            f,
            rngs,
            gain=(2 * c.layers) ** -0.5,
            lora=adapter_of(c.lora, "down"),
        )
        self.gelu = c.family == "gemma3_text"  # by tanh

    def __call__(self, x: Array, layout: Layout) -> Array:
        activation = jax.nn.gelu if self.gelu else jax.nn.silu
        return self.down(activation(layout.inner(self.gate(x))) * layout.inner(self.up(x)))


class Block(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.attn_norm, self.mlp_norm = Norm(c.model_dim, c), Norm(c.model_dim, c)
        self.attn, self.mlp = Attention(c, rngs), Mlp(c, rngs)
        post = c.family == "gemma3_text"
        self.attn_post_norm, self.mlp_post_norm = (
            Norm(c.model_dim, c) if post else None for _ in range(2)
        )

    def __call__(
        self, x: Array, rope: Rope, mix, layout: Layout
    ) -> tuple[Array, tuple[Array, Array]]:
        """`mix(q, k, v)` is the attention itself: over a row, or over a cache."""
        with jax.named_scope("attention"):
            q, k, v = self.attn.qkv(layout.whole(self.attn_norm(x)), rope)
            mixed = layout.spread(self.attn.o(mix(q, k, v)))
            x = x + (mixed if self.attn_post_norm is None else self.attn_post_norm(mixed))
        with jax.named_scope("mlp"):
            fed = layout.spread(self.mlp(layout.whole(self.mlp_norm(x)), layout))
            return x + (fed if self.mlp_post_norm is None else self.mlp_post_norm(fed)), (k, v)


class Ends(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.embed = Embed(c, rngs)
        self.final_norm = Norm(c.model_dim, c)
        self.head = (
            None
            if c.tie_embeddings
            else Linear("td,dv->tv", (c.model_dim, c.vocab_size), c.model_dim, rngs)
        )


class Embed(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (c.vocab_size, c.model_dim))
        )


def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Random float32 parameters; residual branches scaled by 1/√(2L).

    With LoRA the same, adapters beside them, as training holds them.
    """
    ends_key, layers_key = jax.random.split(key)

    def pure(module):
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def layer(params_key, adapter_key):
        return pure(Block(config, nnx.Rngs(params=params_key, adapter=adapter_key)))

    layers = jax.vmap(layer)(
        *(
            jax.random.split(k, config.layers)
            for k in (layers_key, jax.random.fold_in(layers_key, 0))
        )
    )
    return stored(
        {**pure(Ends(config, nnx.Rngs(ends_key))), "layers": layers},
        config.lora,
        config.compute_dtype,
    )


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree as shapes and dtypes, without making any."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


@functools.cache
def _skeleton(module: Any, config: ModelConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: module(config, nnx.Rngs(0))))


def _bind(module: type[nnx.Module], config: ModelConfig, params: Params) -> Any:
    """The module holding `params`; only shapes of its own are ever made."""
    graphdef, abstract = _skeleton(module, config)
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: binding writes into it
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graphdef, state)


def rotary(config: ModelConfig, positions: Int[Array, "*rows"]) -> Rope:
    """Cosine and sine of the rotary angles, float32 [..., h/2].

    angle_j = position · θ^(-2j/h); with Llama-3 scaling, long wavelengths are stretched by
    `factor`, short ones kept, and those between interpolated (Llama 3.1 release). With Gemma's
    `rope_factor`, all are stretched alike.
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = config.rope_theta**-exponent
    if s := config.rope_scaling:
        wavelength = 2 * math.pi / frequency
        smooth = (s.original_max_position / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        smooth = jnp.clip(smooth, 0.0, 1.0)
        frequency = frequency * (smooth + (1 - smooth) / s.factor)
    if config.rope_factor != 1:
        frequency = frequency / config.rope_factor
    angle = positions[..., None].astype(jnp.float32) * _lead(frequency, positions.ndim + 1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "*rows heads h"], rope: Rope) -> Float[Array, "*rows heads h"]:
    """Rotates [..., heads, h]: the first half of h pairs with the second (Hugging Face's order)."""
    cos, sin = (r[..., None, :].astype(x.dtype) for r in rope)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def windowed_layers(config: ModelConfig) -> Bool[Array, " L"] | None:
    """Which layers see only a window, bool [L]; None where no layer of the family does, and nothing
    is to be scanned along.
    """
    return (
        None
        if config.windows is None
        else (jnp.arange(config.layers) + 1) % config.windows.every != 0
    )


def layer_views(
    config: ModelConfig, positions: Int[Array, "*rows"]
) -> Callable[[Any], tuple[Rope, Window | None]]:
    """Rotary angles and window of a layer, as a function of its entry of `windowed_layers`."""
    rope, w = rotary(config, positions), config.windows
    if w is None:
        return lambda on: (rope, None)
    near = rotary(dataclasses.replace(config, rope_theta=w.rope_theta, rope_factor=1.0), positions)
    return lambda on: (
        jax.tree.map(functools.partial(jnp.where, on), near, rope),
        Window(w.size, on),
    )


def scale_embedded(config: ModelConfig, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Gemma's embeddings times √D, which is rounded to compute dtype first."""
    return x * jnp.asarray(config.model_dim**0.5, x.dtype) if config.family == "gemma3_text" else x


def segment_positions(segment_ids: Int[Array, "N T"]) -> Int32[Array, "N T"]:
    """Positions that restart at 0 where the segment changes, int32 [N, T]."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index[None] - jax.lax.cummax(jnp.where(starts, index[None], 0), axis=1)


def head_kernel(params: Params) -> Float[Array, "D V"]:
    """The output projection [D, V], tied or not."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T


_REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"] | None = None,
    segment_ids: Int[Array, "N T"] | None = None,
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "N T D"], tuple[Float[Array, "L N T K h"], Float[Array, "L N T K h"]]]:
    """Final hidden states of packed rows, and the keys and values of every layer.

    Args: tokens: int [N, T]. positions: int [N, T], by default counted in each segment.
      segment_ids: int [N, T], by
        default one segment a row. mesh: set if rows are sharded over ("data", "fsdp").

    Returns:
      hidden [N, T, D] after the final norm, in compute dtype; (k, v), each [L, N, T, K, h].
    """
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    positions = segment_positions(segment_ids) if positions is None else positions
    ends = _bind(Ends, config, {k: v for k, v in params.items() if k != "layers"})
    view = layer_views(config, positions)
    layout = Layout.over(mesh, tokens.shape[1])
    with jax.named_scope("embed"):
        x = embed(
            ends.embed.embedding[...],
            tokens,
            config.compute_dtype,
            mesh,
            splits_sequence(mesh, tokens.shape[1]),
        )
        x = scale_embedded(config, x)

    @jax.named_scope("layer")
    def layer(x, inputs):
        layer_params, on = inputs
        rope, window = view(on)
        block = _bind(Block, config, layer_params)
        mix = functools.partial(
            attend_rows,
            segment_ids=segment_ids,
            window=window,
            mesh=mesh,
            block=config.attention_block,
        )
        return block(x, rope, mix, layout)

    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=_REMAT[config.remat], prevent_cse=False)
    x, kv = jax.lax.scan(layer, x, (params["layers"], windowed_layers(config)))
    return layout.whole(ends.final_norm(x)), kv


def make_cache(k: Float[Array, "*rows h"], v: Float[Array, "*rows h"], *, int8: bool) -> Cache:
    """Keys and values [..., h] as a cache holds them."""
    if not int8:
        return Cache(k, v)
    (k, scale_k), (v, scale_v) = quantize(k), quantize(v)
    return Cache(k, v, scale_k, scale_v)


def _write(old: Array, new: Array, lengths: Array) -> Array:
    """new [L, b, K, ...] into old [L, B, K, S, ...] at (i, lengths[i]) for i < b, in place.

    Beyond S nothing is written.

    A GPU, which starts a program for every step of a loop, scatters all at once. A TPU takes a
    sequence at a time: for one scatter of all, its compiler lays the cache out another way, and
    copies all of it.
    """

    def each(old, new, lengths):
        def one(i, old):
            at = (0, i, 0, jnp.minimum(lengths[i], old.shape[3] - 1), *(0,) * (old.ndim - 4))
            fresh = jax.lax.dynamic_slice_in_dim(new, i, 1, axis=1)[:, :, :, None]
            kept = jax.lax.dynamic_slice(old, at, fresh.shape)
            return jax.lax.dynamic_update_slice(
                old, jnp.where(lengths[i] < old.shape[3], fresh, kept), at
            )

        return jax.lax.fori_loop(0, len(lengths), one, old)

    def at_once(old, new, lengths):
        # Two index arrays with a slice between them: their common axis comes first in the values.
        return old.at[:, jnp.arange(len(lengths)), :, lengths].set(
            jnp.moveaxis(new, 1, 0), mode="drop"
        )

    return jax.lax.platform_dependent(old, new, jnp.asarray(lengths), cuda=at_once, default=each)


def decode_step(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, " b"],
    lengths: Int[Array, " b"],
    cache: Cache,
    read: int | None = None,
) -> tuple[Float[Array, "b D"], Cache]:
    """Hidden state of one new token a sequence, and the cache with that token in it.

    Args: tokens: int [b], the new tokens of the first b ≤ B sequences in the cache. lengths: int
      [b], tokens of theirs in it
        already; the new token's position. read: how much of S is looked at; at least every length.
        None is all.

    Returns:
      hidden [b, D] after the final norm; the cache, written at `lengths`.
    """
    ends = _bind(Ends, config, {k: v for k, v in params.items() if k != "layers"})
    view = layer_views(config, lengths)
    with jax.named_scope("embed"):
        x = scale_embedded(config, ends.embed.embedding[...].astype(config.compute_dtype)[tokens])

    @jax.named_scope("layer")
    def layer(x, inputs):
        index, layer_params, on = inputs
        rope, window = view(on)

        def part(
            whole,
        ):  # what is looked at, cut out of the whole cache at once: nothing else of it is touched
            size = (
                1,
                len(tokens),
                whole.shape[2],
                whole.shape[3] if read is None else read,
                *whole.shape[4:],
            )
            return jax.lax.dynamic_slice(whole, (index, *(0,) * (whole.ndim - 1)), size)[0]

        seen = jax.tree.map(part, cache)
        block = _bind(Block, config, layer_params)
        return block(
            x,
            rope,
            lambda q, k, v: attend_cached(
                q, k, v, seen.k, seen.v, lengths, seen.scale_k, seen.scale_v, window
            ),
            Layout(),
        )

    x, kv = jax.lax.scan(
        layer, x, (jnp.arange(config.layers), params["layers"], windowed_layers(config))
    )
    new = make_cache(*kv, int8=cache.scale_k is not None)
    with jax.named_scope("cache"):
        cache = jax.tree.map(
            lambda old, new: _write(old, new.astype(old.dtype), lengths), cache, new
        )
    return ends.final_norm(x), cache


@jax.named_scope("head")
def logits_of(params: Params, hidden: Float[Array, "*rows D"]) -> Float32[Array, "*rows V"]:
    """hidden [..., D] times the head: float32 [..., V].

    For sampling and small checks; the loss never makes these.
    """
    head = head_kernel(params).astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def apply(
    params: Params,
    config: ModelConfig,
    tokens: Int[ArrayLike, "N T"],
    positions: Int[ArrayLike, "N T"] | None = None,
    segment_ids: Int[ArrayLike, "N T"] | None = None,
) -> Float32[Array, "N T V"]:
    """Logits of every next token, float32 [N, T, V]: entry t predicts token t + 1.

    Arguments as in `hidden_states`.
    """
    rows = jax.tree.map(jnp.asarray, (tokens, positions, segment_ids))
    return logits_of(params, hidden_states(params, config, *rows)[0])
