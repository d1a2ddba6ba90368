"""One decoder for Llama, Qwen2, Qwen3, Qwen3-MoE and Gemma 3, in Flax NNX; plain pytrees of
parameters outside this file.

    tokens ─▶ embed ─▶ L × [ x + attn(norm(x)) ; x + mlp(norm(x)) ] ─▶ norm ─▶ head

Parameters are a nested dict; layers are stacked on axis 0 and scanned:

    embed/embedding [V,D] · final_norm/scale [D] · head/kernel [D,V] (absent if tied) · layers/
      attn_norm/scale, mlp_norm/scale [L,D] · attn_post_norm/scale, mlp_post_norm/scale (gemma3)
      attn/{q,k,v}/kernel [L,D,heads,h], bias [L,heads,h] (qwen2) · attn/o/kernel [L,H,h,D]
      attn/{q_norm,k_norm}/scale [L,h] (qwen3, qwen3_moe, gemma3)
      mlp/{gate,up}/kernel [L,D,F], down [L,F,D], or
      experts/router/kernel [L,D,E], {gate,up}/kernel [L,E,D,F], down [L,E,F,D] (qwen3_moe)
      of rollouts in 8 bits (not routers): kernel/values [L,*in,*out], kernel/scale [L,*out]
      adapter/a [L,*in,r], adapter/b [L,r,*out] next to each kernel [L,*in,*out] that LoRA adapts

Gemma 3 also normalizes the output of each branch, uses GELU instead of SiLU, scales norms by
1 + scale and embeddings by √D, and has sliding windows (`Windows`) in most layers: the
scan over layers has a flag for each.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int, Int32, PRNGKeyArray, UInt8

from dapo_jax.config import LoraConfig, ModelConfig
from dapo_jax.model.attention import (
    SAVED,
    Cache,
    PagedCache,
    Window,
    attend_pages,
    attend_rows,
)
from dapo_jax.model.embedding import embed
from dapo_jax.model.experts import OfLayer, Routing, mixture, mixture_decoded, mixture_over
from dapo_jax.model.logprobs import ROW_AXES, VOCAB_AXIS, split_axis
from dapo_jax.model.lora import Adapter, adapter_of, stored
from dapo_jax.model.quantization import product, quantize
from dapo_jax.model.ragged_attention import attend_paged_over, is_ragged, turns_of
from dapo_jax.runtime.mesh import gather_layer
from dapo_jax.types import Params

Rope = tuple[Float32[Array, "*N half"], Float32[Array, "*N half"]]  # cosine and sine
_REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _same(x: Array) -> Array:
    return x


def _saved(x: Array) -> Array:
    """x, which `remat: dots` keeps. By then it has its sharding: without, XLA replicates rows."""
    return checkpoint_name(x, SAVED)


class Layout(NamedTuple):
    """Sharding of activations on a mesh.

    Weights are split over axes that rows are split over too. Without these constraints XLA splits
    activations like the weights, and every device holds all rows.
    """

    whole: Callable[[Array], Array] = _same  # [N, T, D], the input of a block's matmuls
    heads: Callable[[Array], Array] = _saved  # [N, T, heads, h], queries, keys and values
    inner: Callable[[Array], Array] = _saved  # [N, T, F], the feed-forward's hidden layer
    spread: Callable[[Array], Array] = _saved  # [N, T, D], the residual stream between them
    mixture: Callable[..., tuple[Array, Routing]] = mixture  # of experts

    @classmethod
    def over(cls, mesh: Mesh | None, length: int) -> "Layout":
        """Rows over ROW_AXES, F over "tensor", and T of the residual stream too where it divides:
        norms, sums and saved activations are then split too.
        """
        if mesh is None:
            return cls()

        def pin(*axes: Any) -> Callable[[Array], Array]:
            sharding = NamedSharding(mesh, PartitionSpec(ROW_AXES, *axes))
            return lambda x: jax.lax.with_sharding_constraint(x, sharding)

        def heads(x: Array) -> Array:
            return _saved(pin(None, split_axis(mesh, VOCAB_AXIS, x.shape[2]))(x))

        def inner(x: Array) -> Array:
            return _saved(pin(None, VOCAB_AXIS)(x))

        spread = pin(VOCAB_AXIS) if splits_sequence(mesh, length) else pin()
        mixed = functools.partial(mixture_over, mesh)
        return cls(pin(), heads, inner, lambda x: _saved(spread(x)), mixed)


def splits_sequence(mesh: Mesh | None, length: int) -> bool:
    """Whether the residual stream of rows of this length is split over "tensor" along T."""
    return split_axis(mesh, VOCAB_AXIS, length) is not None


def _lead(x: Array, ndim: int) -> Array:
    """x with leading axes of size 1, `ndim` axes in all."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


class Norm(nnx.Module):
    """RMS norm x / √(mean x² + ε) · scale, in float32; Gemma's is · gain · (1 + scale)."""

    def __init__(self, dim: int, c: ModelConfig, gain: float = 1.0):
        self.gain = gain if c.family == "gemma3_text" else None
        self.scale = nnx.Param(jnp.ones(dim) if self.gain is None else jnp.zeros(dim))
        self.eps = c.norm_eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...]
        if self.gain is not None:
            scale = self.gain * (1 + scale.astype(jnp.float32))
        return (wide * _lead(scale, x.ndim)).astype(x.dtype)


class Linear(nnx.Module):
    """A projection, an einsum over tokens t. The kernel is cast to the dtype of the input."""

    def __init__(
        self,
        spec: str,
        shape: tuple[int, ...],
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        gain: float = 1.0,
        lora: LoraConfig | None = None,
    ):
        self.spec = spec
        inputs = spec.index(",") - 1  # axes of the kernel that are summed over
        fan_in = math.prod(shape[:inputs])
        self.adapter = Adapter(shape[:inputs], shape[inputs:], lora, rngs) if lora else None
        self.kernel = nnx.Param(gain * fan_in**-0.5 * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(shape[inputs:])) if bias else None

    def __call__(self, x: Array) -> Array:
        # All leading axes become the axis t: with two of them, XLA's CPU backward pass is slow.
        lead = x.ndim - self.spec.index(",") + 1
        rows = x.reshape(-1, *x.shape[lead:])
        y = product(self.spec, rows, self.kernel.get_value())
        if self.adapter is not None:
            y += self.adapter(rows)
        y = y.reshape(*x.shape[:lead], *y.shape[1:])
        return y if self.bias is None else y + _lead(self.bias[...].astype(x.dtype), y.ndim)


def _branch_gain(c: ModelConfig) -> float:
    """Residual branches start small, so that the stream does not grow with depth."""
    return (2 * c.layers) ** -0.5


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        def project(name: str, heads: int) -> Linear:
            shape, lora = (c.model_dim, heads, c.head_dim), adapter_of(c.lora, name)
            return Linear("td,dnh->tnh", shape, rngs, bias=c.family == "qwen2", lora=lora)

        self.q = project("q", c.heads)
        self.k = project("k", c.kv_heads)
        self.v = project("v", c.kv_heads)
        shape, lora = (c.heads, c.head_dim, c.model_dim), adapter_of(c.lora, "o")
        self.o = Linear("tnh,nhd->td", shape, rngs, gain=_branch_gain(c), lora=lora)
        normed = c.family in ("qwen3", "qwen3_moe", "gemma3_text")
        # Attention divides scores by √head_dim; Gemma's norm of queries makes that √query_scalar.
        gain = (c.head_dim / (c.query_scalar or c.head_dim)) ** 0.5
        self.q_norm = Norm(c.head_dim, c, gain) if normed else None
        self.k_norm = Norm(c.head_dim, c) if normed else None

    def qkv(self, x: Array, rope: Rope | None, layout: Layout) -> tuple[Array, Array, Array]:
        q, k, v = (layout.heads(project(x)) for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is None:  # attention rotates them
            return q, k, v
        return rotate(q, rope), rotate(k, rope), v


class Mlp(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        def linear(name: str, spec: str, *shape: int, gain: float = 1.0) -> Linear:
            return Linear(spec, shape, rngs, gain=gain, lora=adapter_of(c.lora, name))

        self.gate = linear("gate", "td,df->tf", c.model_dim, c.ffn_dim)
        self.up = linear("up", "td,df->tf", c.model_dim, c.ffn_dim)
        self.down = linear("down", "tf,fd->td", c.ffn_dim, c.model_dim, gain=_branch_gain(c))
        self.gelu = c.family == "gemma3_text"  # by tanh

    def __call__(self, x: Array, layout: Layout) -> Array:
        activation = jax.nn.gelu if self.gelu else jax.nn.silu
        return self.down(activation(layout.inner(self.gate(x))) * layout.inner(self.up(x)))


class Stack(nnx.Module):
    """A projection of every expert."""

    def __init__(self, experts: int, inputs: int, outputs: int, rngs: nnx.Rngs, gain: float = 1.0):
        drawn = jax.random.normal(rngs.params(), (experts, inputs, outputs))
        self.kernel = nnx.Param(gain * inputs**-0.5 * drawn)


class Mixture(nnx.Module):
    """Experts in place of the feed-forward (`model.experts`)."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        assert c.experts is not None
        self.config, count = c.experts, c.experts.count
        self.router = Linear("td,de->te", (c.model_dim, count), rngs)
        self.gate = Stack(count, c.model_dim, c.ffn_dim, rngs)
        self.up = Stack(count, c.model_dim, c.ffn_dim, rngs)
        self.down = Stack(count, c.ffn_dim, c.model_dim, rngs, _branch_gain(c))

    def __call__(self, x: Array, layout: Layout, replayed: Any) -> tuple[Array, Routing]:
        names = ("router", "gate", "up", "down")
        kernels = {name: getattr(self, name).kernel.get_value() for name in names}
        return layout.mixture(x, kernels, self.config, replayed)


class Entries(NamedTuple):
    """What a layer computes of each token besides the residual stream."""

    k: Array
    v: Array
    cache: Cache | None = None  # with these in it, where attention writes them
    routing: Routing | None = None


class Block(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.attn_norm, self.mlp_norm = Norm(c.model_dim, c), Norm(c.model_dim, c)
        self.attn = Attention(c, rngs)
        self.mlp = None if c.experts else Mlp(c, rngs)
        self.experts: Any = Mixture(c, rngs) if c.experts else None
        post = c.family == "gemma3_text"
        self.attn_post_norm = Norm(c.model_dim, c) if post else None
        self.mlp_post_norm = Norm(c.model_dim, c) if post else None

    def __call__(
        self, x: Array, rope: Rope | None, attend: Callable[..., Any], layout: Layout, replayed: Any
    ) -> tuple[Array, Entries]:
        """`attend(q, k, v)` is over a row or a cache, and may return the cache with k and v.
        replayed: as `experts.route`.
        """
        with jax.named_scope("attention"):
            q, k, v = self.attn.qkv(layout.whole(self.attn_norm(x)), rope, layout)
            mixed, cache = attend(q, k, v)
            mixed = layout.spread(self.attn.o(mixed))
            x = x + (mixed if self.attn_post_norm is None else self.attn_post_norm(mixed))
        with jax.named_scope("mlp"):
            inputs, routing = layout.whole(self.mlp_norm(x)), None
            if self.mlp is not None:
                fed = self.mlp(inputs, layout)
            else:
                fed, routing = self.experts(inputs, layout, replayed)
            fed = layout.spread(fed)
            x = x + (fed if self.mlp_post_norm is None else self.mlp_post_norm(fed))
            return x, Entries(k, v, cache, routing)


class Embed(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (c.vocab_size, c.model_dim))
        self.embedding = nnx.Param(0.02 * table)


class Ends(nnx.Module):
    """Embedding, final norm and head."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.embed = Embed(c, rngs)
        self.final_norm = Norm(c.model_dim, c)
        shape = (c.model_dim, c.vocab_size)
        self.head = None if c.tie_embeddings else Linear("td,dv->tv", shape, rngs)


def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Random float32 parameters; residual branches scaled by 1/√(2L).

    With LoRA the same base weights in the dtypes of training (`lora.stored`), and adapters.
    """
    ends_key, layers_key = jax.random.split(key)

    def pure(module: nnx.Module) -> Any:
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def layer(params_key, adapter_key):
        return pure(Block(config, nnx.Rngs(params=params_key, adapter=adapter_key)))

    keys = (layers_key, jax.random.fold_in(layers_key, 0))
    layers = jax.vmap(layer)(*(jax.random.split(k, config.layers) for k in keys))
    params = {**pure(Ends(config, nnx.Rngs(ends_key))), "layers": layers}
    return stored(params, config.lora, config.compute_dtype)


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree as shapes and dtypes; computes nothing."""
    return jax.tree.map(lambda leaf: leaf, _traced_params(config))  # a copy, to be changed at will


@functools.cache
def _traced_params(config: ModelConfig) -> Params:
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


@functools.cache
def _skeleton(module: Any, config: ModelConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: module(config, nnx.Rngs(0))))


def _bind(module: type[nnx.Module], config: ModelConfig, params: Params) -> Any:
    """The module with `params`."""
    graphdef, abstract = _skeleton(module, config)
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: binding writes into it
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graphdef, state)


def _bind_ends(config: ModelConfig, params: Params) -> Ends:
    return _bind(Ends, config, {k: v for k, v in params.items() if k != "layers"})


def rotary(config: ModelConfig, positions: Int[Array, "*N"]) -> Rope:
    """Cosine and sine of the rotary angles, float32 [..., h/2].

    angle_j = position · θ^(-2j/h). Llama-3 scaling stretches long wavelengths by `factor`, keeps
    short ones and interpolates between (Llama 3.1 release). Gemma's `rope_factor` stretches all.
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = config.rope_theta**-exponent
    if s := config.rope_scaling:
        wavelength = 2 * math.pi / frequency
        smooth = s.original_max_position / wavelength - s.low_freq_factor
        smooth = jnp.clip(smooth / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
        frequency = frequency * (smooth + (1 - smooth) / s.factor)
    if config.rope_factor != 1:
        frequency = frequency / config.rope_factor
    angle = positions[..., None].astype(jnp.float32) * _lead(frequency, positions.ndim + 1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "*N heads h"], rope: Rope) -> Float[Array, "*N heads h"]:
    """Rotates the first half of h against the second (Hugging Face's order)."""
    cos, sin = (r[..., None, :].astype(x.dtype) for r in rope)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def windowed_layers(config: ModelConfig) -> Bool[Array, " L"] | None:
    """Which layers have a sliding window; None for families without."""
    if config.windows is None:
        return None
    return (jnp.arange(config.layers) + 1) % config.windows.every != 0


def layer_views(
    config: ModelConfig, positions: Int[Array, "*N"], form: Callable[[Rope], Any] | None = None
) -> Callable[[Any], tuple[Any, Window | None]]:
    """Rotary angles, in any form, and window of a layer, by its entry of `windowed_layers`."""
    form = form or (lambda rope: rope)
    rope, w = form(rotary(config, positions)), config.windows
    if w is None:
        return lambda on: (rope, None)
    local = dataclasses.replace(config, rope_theta=w.rope_theta, rope_factor=1.0)
    near = form(rotary(local, positions))

    def view(on: Array) -> tuple[Any, Window]:
        return jax.tree.map(functools.partial(jnp.where, on), near, rope), Window(w.size, on)

    return view


def scale_embedded(config: ModelConfig, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Gemma's embeddings times √D, which is rounded to compute dtype first."""
    return x * jnp.asarray(config.model_dim**0.5, x.dtype) if config.family == "gemma3_text" else x


def segment_positions(segment_ids: Int[Array, "N T"]) -> Int32[Array, "N T"]:
    """Positions that restart at 0 where the segment changes."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    first = jnp.ones_like(segment_ids[:, :1], bool)
    starts = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def head_kernel(params: Params) -> Float[Array, "D V"]:
    """The output projection, tied or not."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"] | None = None,
    segment_ids: Int[Array, "N T"] | None = None,
    *,
    replayed: tuple[UInt8[Array, "L N T k"], Bool[Array, "N T"]] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "N T D"], Entries]:
    """Final hidden states of packed rows, and keys and values [L, N, T, K, h] of every layer.

    Args:
      positions: by default counted within each segment. segment_ids: by default one per row.
      replayed: experts chosen earlier, and of which tokens they replace the router's choice.
      mesh: given where rows are sharded over ("data", "fsdp").

    Returns: hidden states after the final norm, and `Entries`, in compute dtype.
    """
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    positions = segment_positions(segment_ids) if positions is None else positions
    ends, view = _bind_ends(config, params), layer_views(config, positions)
    length = tokens.shape[1]
    layout = Layout.over(mesh, length)
    with jax.named_scope("embed"):
        table, dtype = ends.embed.embedding[...], config.compute_dtype
        x = embed(table, tokens, dtype, mesh, splits_sequence(mesh, length))
        x = scale_embedded(config, x)

    @jax.named_scope("layer")
    def layer(x, inputs):
        layer_params, on, chosen = inputs
        if mesh is not None:
            layer_params = gather_layer(layer_params, mesh, config.compute_dtype)
        rope, window = view(on)
        options: dict[str, Any] = {"mesh": mesh, "block": config.attention_block}

        def attend(q, k, v):
            return attend_rows(q, k, v, segment_ids, window, **options), None

        replay = None if replayed is None else (chosen, replayed[1])
        return _bind(Block, config, layer_params)(x, rope, attend, layout, replay)

    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=_REMAT[config.remat], prevent_cse=False)
    chosen = None if replayed is None else replayed[0]
    x, entries = jax.lax.scan(layer, x, (params["layers"], windowed_layers(config), chosen))
    return layout.whole(ends.final_norm(x)), entries


def make_cache(k: Float[Array, "*S h"], v: Float[Array, "*S h"], *, int8: bool) -> Cache:
    """Keys and values as a cache stores them."""
    if not int8:
        return Cache(k, v)
    (k, scale_k), (v, scale_v) = quantize(k), quantize(v)
    return Cache(k, v, scale_k, scale_v)


def write_cache(
    cache: Cache, new: Cache, page: Int[Array, "N b"], offset: Int[Array, "N b"]
) -> Cache:
    """Writes an entry a sequence: new [N, L, b, K, ...] into pages [N, L, C, K, p, ...].

    On a TPU one scatter would change the cache's layout and copy all of it, so it writes a sequence
    at a time. A GPU launches a program for every step of a loop, so there one scatter writes all.
    """

    def each(cache, new, page, offset):
        def sequence(i, cache, n):
            at = (n, 0, page[n, i], 0, offset[n, i])

            def write(old, new):
                entry = jax.lax.dynamic_slice_in_dim(new[n : n + 1], i, 1, axis=2)
                entry = jnp.expand_dims(entry, 4)
                return jax.lax.dynamic_update_slice(old, entry, (*at, *(0,) * (old.ndim - 5)))

            return jax.tree.map(write, cache, new)

        for n, slots in enumerate(page):
            cache = jax.lax.fori_loop(0, len(slots), functools.partial(sequence, n=n), cache)
        return cache

    @jax.vmap
    def at_once(cache, new, page, offset):
        def write(old, new):
            # Two indices with a slice between them: their common axis comes first in the values.
            return old.at[:, page, :, offset].set(jnp.moveaxis(new, 1, 0))

        return jax.tree.map(write, cache, new)

    return jax.lax.platform_dependent(cache, new, page, offset, cuda=at_once, default=each)


def decode_step(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, " b"],
    seen: PagedCache,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "b D"], Cache, Routing | None]:
    """Hidden state of one new token per sequence, and its entry for the cache.

    Args:
      tokens: new tokens. Their positions are `seen.lengths`.
      mesh: given where this is vmapped over row shards, with `spmd_axis_name`.

    Returns: hidden states after the final norm; the cache with the new entries where attention
      writes them (`is_ragged`), else the entries [L, b, K, h] alone, for `write_cache`; routing
      [L, b, ...] of a mixture of experts.
    """
    ends = _bind_ends(config, params)
    over: Callable[..., Any] = _attend_cached
    layout = Layout()
    if mesh is not None:
        over = functools.partial(attend_paged_over, mesh)
        layout = layout._replace(mixture=functools.partial(mixture_decoded, mesh))
    writes = is_ragged(mesh, config.head_dim)
    view = layer_views(config, seen.lengths, turns_of if writes else None)
    scanned, stacks = dict(params["layers"]), {}
    if config.experts:
        stacks = scanned.pop("experts")
        scanned["router"] = stacks["router"]
    with jax.named_scope("embed"):
        x = scale_embedded(config, ends.embed.embedding[...].astype(config.compute_dtype)[tokens])

    @jax.named_scope("layer")
    def layer(carry, inputs):
        (x, pages), (index, layer_params, on) = carry, inputs
        if config.experts:
            own = {n: {"kernel": OfLayer(part["kernel"], index)} for n, part in stacks.items()}
            layer_params["experts"] = own | {"router": layer_params.pop("router")}
        rope, window = view(on)
        cached = seen._replace(layer=index, pages=pages if writes else seen.pages)
        attend = functools.partial(over, seen=cached, window=window)
        if writes:
            attend, rope = functools.partial(attend, turns=rope), None
        x, new = _bind(Block, config, layer_params)(x, rope, attend, layout, None)
        return (x, new.cache), (None if writes else new[:2], new.routing)

    layers = (jnp.arange(config.layers), scanned, windowed_layers(config))
    first = x, seen.pages if writes else None
    (x, pages), (entries, routing) = jax.lax.scan(layer, first, layers)
    new: Any = pages
    if entries is not None:
        new = make_cache(*entries, int8=seen.pages.scale_k is not None)
        new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, seen.pages)
    return ends.final_norm(x), new, routing


def _attend_cached(*inputs: Any, **options: Any) -> tuple[Array, None]:
    return attend_pages(*inputs, **options), None


@jax.named_scope("head")
def logits_of(params: Params, hidden: Float[Array, "*N D"]) -> Float32[Array, "*N V"]:
    """Logits of hidden states. For sampling and small checks; the loss never computes these."""
    head = head_kernel(params).astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def apply(
    params: Params,
    config: ModelConfig,
    tokens: Int[ArrayLike, "N T"],
    positions: Int[ArrayLike, "N T"] | None = None,
    segment_ids: Int[ArrayLike, "N T"] | None = None,
) -> Float32[Array, "N T V"]:
    """Logits of every next token: entry t predicts token t + 1. Arguments as `hidden_states`."""
    rows = jax.tree.map(jnp.asarray, (tokens, positions, segment_ids))
    return logits_of(params, hidden_states(params, config, *rows)[0])
