"""Hugging Face configs and tensor names of Llama, Qwen2, Qwen3, Qwen3-MoE and Gemma 3. No I/O.

What the decoder cannot compute exactly is refused, never approximated.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.config import (
    Experts,
    ModelConfig,
    RopeScaling,
    Windows,
    check_model,
    flatten,
    printable,
)
from dapo_jax.model.decoder import abstract_params
from dapo_jax.types import InputError, Params

Fail = Callable[[str, str], typing.NoReturn]

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3_text",
}
_EXPERT_DIM = "moe_intermediate_size"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOW = 4096  # transformers' default of sliding_window
_GELU = "gelu_pytorch_tanh"

# ModelConfig field → Hugging Face key
_SIZES = {
    "vocab_size": "vocab_size",
    "model_dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "max_position": "max_position_embeddings",
}
_EXPERTS = {"count": "num_experts", "per_token": "num_experts_per_tok"}
_KEYS = {**_SIZES, "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}
_LLAMA3 = {  # the fields of RopeScaling, in order
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}
_CHECKED = {  # fields that `check_model` names, where the key is another
    **_KEYS,
    "rope_scaling.original_max_position": "rope_scaling.original_max_position_embeddings",
    "windows": "sliding_window",
    "windows.size": "sliding_window",
    "windows.every": "sliding_window_pattern",
    "windows.rope_theta": "rope_local_base_freq",
    "rope_factor": "rope_scaling.factor",
    **{f"experts.{field}": key for field, key in _EXPERTS.items()},
    "query_scalar": "query_pre_attn_scalar",
}

# transformers' defaults of keys that may be left out
_DEFAULTS = {"rope_theta": 1e4, "tie_word_embeddings": False, "max_window_layers": 28}
_MOE_DEFAULTS = {"decoder_sparse_step": 1, "norm_topk_prob": False}
_GEMMA_DEFAULTS = {
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": _WINDOW,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
# parameters of each rope_type besides rope_theta
_ROPE_TYPES: dict[str, dict[str, type]] = {
    "default": {},
    "linear": {"factor": float},
    "llama3": _LLAMA3,
}
_NO_QUANTIZATION = "quantized weights are not supported; use a bfloat16, float16 or float32 model"
_REFUSED = {  # keys that must be absent, null or false
    "auto_map": "the model comes with its own code, which is never run; use a model of a built-in "
    "architecture without auto_map",
    "quantization_config": _NO_QUANTIZATION,
    "quantization": _NO_QUANTIZATION,  # MLX's
    "attention_bias": "attention biases are not supported; supported: false",
    "mlp_bias": "feed-forward biases are not supported; supported: false",
    "attn_logit_softcapping": "soft-capping is not supported; supported: null",
    "final_logit_softcapping": "soft-capping is not supported; supported: null",
    "use_bidirectional_attention": "is not supported; supported: null",
}


def model_config_from_hf(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture of a Hugging Face config.json, as transformers 4 or 5 write it.

    compute_dtype and remat keep their defaults. where: the file's name, for errors.

    Raises: InputError: a key is missing or of the wrong kind, or the decoder cannot do what it asks
      for exactly.
    """

    def fail(key: str, message: str) -> typing.NoReturn:
        # the file may hold anything, of any length
        raise InputError(f"{where}: {printable(key)[:100]}: {message[:300]}")

    family = _family(hf, fail)
    own_defaults: dict[str, Mapping[str, Any]] = {
        "gemma3_text": _GEMMA_DEFAULTS,
        "qwen3_moe": _MOE_DEFAULTS,
    }
    hf = {**_DEFAULTS, **own_defaults.get(family, {}), **hf}
    _refuse_unsupported(hf, family, fail)
    hf = _with_sizes(hf, family, fail)
    keys = _SIZES | ({"ffn_dim": _EXPERT_DIM} if family == "qwen3_moe" else {})
    sizes = {field: _number(hf, key, int, fail) for field, key in keys.items()}
    gemma, tied = family == "gemma3_text", hf["tie_word_embeddings"]
    own = _gemma_fields(hf, sizes["layers"], fail) if gemma else _llama_fields(hf, fail)
    if family == "qwen3_moe":
        own |= {"experts": _experts(hf, fail)}
    if not isinstance(tied, bool):
        fail("tie_word_embeddings", f"expected true or false, got {tied!r}")
    eps = _number(hf, "rms_norm_eps", float, fail)
    config = ModelConfig(family=family, **sizes, **own, norm_eps=eps, tie_embeddings=tied)
    check_model(config, lambda field, message: fail(_CHECKED.get(field, field), message))
    return config


def model_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read: the inverse of `model_config_from_hf` but for
    compute_dtype and remat.
    """
    scaling, windows = config.rope_scaling, config.windows
    names = [name for name, family in _ARCHITECTURES.items() if family == config.family]
    common = {"architectures": names, "model_type": config.family, "rope_theta": config.rope_theta}
    common |= {key: getattr(config, field) for field, key in _KEYS.items()}
    if e := config.experts:
        common |= {key: getattr(e, field) for field, key in _EXPERTS.items()}
        common |= {_EXPERT_DIM: config.ffn_dim, "norm_topk_prob": e.normalize}
    if windows is None:
        llama3 = scaling and dict(zip(_LLAMA3, dataclasses.astuple(scaling), strict=True))
        rope = llama3 and {"rope_type": "llama3", **llama3}
        return common | {"hidden_act": "silu", "rope_scaling": rope}
    scalar, factor = config.query_scalar, config.rope_factor
    return common | {
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": config.head_dim if scalar is None else scalar,
        "rope_local_base_freq": windows.rope_theta,
        "rope_scaling": None if factor == 1 else {"rope_type": "linear", "factor": factor},
        "sliding_window": windows.size,
        "sliding_window_pattern": windows.every,
        "layer_types": _layer_types(config.layers, windows.every),
    }


def _family(hf: Mapping[str, Any], fail: Fail) -> Any:
    names, model_type = hf.get("architectures"), hf.get("model_type")
    supported = f"{_hint(hf, names)}; supported (docs/models.md): {', '.join(_ARCHITECTURES)}"
    kind = repr(model_type)[:60]
    if names is None:
        if model_type not in _ARCHITECTURES.values():
            fail("model_type", f"{kind} is not supported{supported}")
        return model_type
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(_ARCHITECTURES):
        fail("architectures", f"{repr(names)[:60]} is not supported{supported}")
    family = _ARCHITECTURES[names[0]]
    if model_type not in (None, family):
        fail("model_type", f"{kind} contradicts architectures {names!r}{supported}")
    return family


def _hint(hf: Mapping[str, Any], names: Any) -> str:
    """A hint about the kind of model, if it suggests an alternative."""
    parts = {"text_config", "vision_config", "audio_config"} & hf.keys()
    if parts or "ForConditionalGeneration" in str(names):
        return (
            ", a model of text and something else; use a text-only model of its family, or save "
            "its text part as a model"
        )
    if "Moe" in str(names) or {"num_experts", "num_local_experts"} & hf.keys():
        return ", a mixture of experts; use Qwen3-MoE or a dense model of its family"
    return ""


def _refuse_unsupported(hf: Mapping[str, Any], family: str, fail: Fail) -> None:
    """Refuses what changes the logits in a way that the decoder does not implement."""
    for key, message in _REFUSED.items():
        if hf.get(key) and (key, family) != ("attention_bias", "qwen2"):  # Qwen2 always has them
            fail(key, message)
    gemma = family == "gemma3_text"
    key, activation = ("hidden_activation", _GELU) if gemma else ("hidden_act", "silu")
    if (found := hf.get(key, activation)) != activation:
        fail(key, f"{found!r} is not supported; supported: {activation}")
    if (factor := hf.get("partial_rotary_factor")) not in (None, 1):
        fail("partial_rotary_factor", f"{factor!r} is not supported; supported: 1")
    if gemma:
        return
    types = hf.get("layer_types")
    if types and (not isinstance(types, list) or any(kind != _FULL for kind in types)):
        fail("layer_types", f"only {_FULL} in every layer is supported")
    if hf.get("use_sliding_window") and hf.get("sliding_window", _WINDOW) is not None:
        first = hf["max_window_layers"]
        some = not isinstance(first, int) or first < _number(hf, "num_hidden_layers", int, fail)
        if family == "qwen3_moe" or (some and not types):  # its windows are in all layers
            message = "sliding-window attention is not supported; supported: false"
            fail("use_sliding_window", message)


def _with_sizes(hf: Mapping[str, Any], family: str, fail: Fail) -> Mapping[str, Any]:
    """`hf` with head counts and sizes that transformers lets be left out."""
    filled = {**hf}
    if hf.get("num_key_value_heads") is None and (family == "llama" or "num_key_value_heads" in hf):
        filled["num_key_value_heads"] = hf.get("num_attention_heads")
    if hf.get("head_dim") is None and family in ("llama", "qwen2", "qwen3_moe"):
        width = _number(hf, "hidden_size", int, fail)
        heads = _number(hf, "num_attention_heads", int, fail)
        if width % heads:
            message = f"{heads} does not divide hidden_size {width}; give head_dim"
            fail("num_attention_heads", message)
        filled["head_dim"] = width // heads
    return filled


def _llama_fields(hf: Mapping[str, Any], fail: Fail) -> dict[str, Any]:
    """The rotary frequencies; `rope_scaling` wins over `rope_parameters`, as in transformers 5."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = {"rope_theta": hf["rope_theta"], **_object(hf, key, fail)}
    rope = _rope(given, key, ("default", "llama3"), fail)
    theta = rope.pop("rope_theta")
    # what is left, if anything, is llama3's
    return {"rope_theta": theta, "rope_scaling": RopeScaling(*rope.values()) if rope else None}


def _experts(hf: Mapping[str, Any], fail: Fail) -> Experts:
    """The experts, which every layer must have: the scan over layers has one kind of layer."""
    if hf["decoder_sparse_step"] != 1 or hf.get("mlp_only_layers"):
        key = "mlp_only_layers" if hf.get("mlp_only_layers") else "decoder_sparse_step"
        fail(key, "layers without experts are not supported; supported: experts in every layer")
    if not isinstance(normalize := hf["norm_topk_prob"], bool):
        fail("norm_topk_prob", f"expected true or false, got {normalize!r}")
    if "num_experts" not in hf:  # transformers 5 renames it
        hf = {**hf, "num_experts": hf.get("num_local_experts")}
    sizes = {field: _number(hf, key, int, fail) for field, key in _EXPERTS.items()}
    return Experts(**sizes, normalize=normalize)


def _gemma_fields(hf: Mapping[str, Any], layers: int, fail: Fail) -> dict[str, Any]:
    """Options that only Gemma 3 has.

    Rotary frequencies are two, spelled out flat by transformers 4 and by kind of layer by
    transformers 5.
    """
    kinds, scaling = _object(hf, "rope_parameters", fail), _object(hf, "rope_scaling", fail)
    prefix = "rope_parameters."
    if unknown := [kind for kind in kinds if kind not in (_FULL, _SLIDING)]:
        supported = f"{_FULL} and {_SLIDING}, each with its own rope_type and rope_theta"
        fail(prefix + unknown[0], f"is not supported; supported: {supported}")
    near = {"rope_theta": hf["rope_local_base_freq"], **_object(kinds, _SLIDING, fail, prefix)}
    near = _rope(near, prefix + _SLIDING, ("default",), fail)
    whole = {"rope_theta": hf["rope_theta"], **_object(kinds, _FULL, fail, prefix), **scaling}
    key = "rope_scaling" if scaling else prefix + _FULL
    whole = _rope(whole, key, ("default", "linear"), fail)
    scalar = _number(hf, "query_pre_attn_scalar", int, fail)
    size, every = _number(hf, "sliding_window", int, fail), _window_pattern(hf, layers, fail)
    return {
        "rope_theta": whole["rope_theta"],
        "rope_factor": whole.get("factor", 1.0),
        "windows": Windows(size, every, near["rope_theta"]),
        "query_scalar": None if scalar == hf.get("head_dim") else scalar,
    }


def _layer_types(layers: int, every: int) -> list[str]:
    return [_SLIDING if (i + 1) % every else _FULL for i in range(layers)]


def _window_pattern(hf: Mapping[str, Any], layers: int, fail: Fail) -> int:
    """The period of the layers without a window; layers + 1 if all have one."""
    types = hf.get("layer_types")
    if types is None:
        return min(layers + 1, _number(hf, "sliding_window_pattern", int, fail))
    if isinstance(types, list) and len(types) == layers:
        every = types.index(_FULL) + 1 if _FULL in types else layers + 1
        if types == _layer_types(layers, every):
            return every
    every_nth = f"{_FULL} in every n-th of {layers} layers and {_SLIDING} in the others"
    return fail("layer_types", f"only {every_nth} is supported")


def _rope(rope: Mapping[str, Any], key: str, types: Iterable[str], fail: Fail) -> dict[str, Any]:
    """rope_theta and the parameters of the rope_type, which is one of `types`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in types:
        fail(f"{key}.rope_type", f"{kind!r} is not supported; supported: {', '.join(types)}")
    known = {"rope_theta": float, **_ROPE_TYPES[kind]}
    unknown = [name for name in rope if name not in {"rope_type", "type", *known}]
    if unknown:  # parameters by kind of layer, too
        message = f"is not supported with rope_type {kind}; supported: {', '.join(known)}"
        fail(f"{key}.{unknown[0]}", message)
    return {name: _number(rope, name, kind, fail, f"{key}.") for name, kind in known.items()}


def _object(hf: Mapping[str, Any], key: str, fail: Fail, prefix: str = "") -> Mapping[str, Any]:
    value = hf.get(key) or {}
    return value if isinstance(value, Mapping) else fail(prefix + key, "expected an object")


def _number(hf: Mapping[str, Any], key: str, kind: type, fail: Fail, prefix: str = "") -> Any:
    """hf[key] as a positive int or float of a size that makes sense."""
    value = hf.get(key)
    if value is None:
        fail(prefix + key, "is missing; this is no complete config.json of a supported model")
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        fail(prefix + key, f"expected {'an integer' if kind is int else 'a number'}, got {value!r}")
    if not 0 < value < 2**40:
        fail(prefix + key, f"{value} is out of range")
    return kind(value)


_PARTS = ("gate", "up", "down")
# Leaf of the parameter tree → tensor of the file (*: of each expert), in the order of computation
_LAYER = {
    "attn_norm.scale": "input_layernorm.weight",
    **{
        f"attn.{part}.{leaf}": f"self_attn.{part}{name}"
        for part in "qkvo"
        for leaf, name in (("kernel", "_proj.weight"), ("bias", "_proj.bias"))
    },
    "attn.q_norm.scale": "self_attn.q_norm.weight",
    "attn.k_norm.scale": "self_attn.k_norm.weight",
    "attn_post_norm.scale": "post_attention_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    **{f"mlp.{part}.kernel": f"mlp.{part}_proj.weight" for part in _PARTS},
    "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
    "experts.router.kernel": "mlp.gate.weight",
    **{f"experts.{part}.kernel": f"mlp.experts.*.{part}_proj.weight" for part in _PARTS},
}
_GEMMA_LAYER = {**_LAYER, "mlp_norm.scale": "pre_feedforward_layernorm.weight"}


class Tensor(NamedTuple):
    """A tensor of a Hugging Face file and its place in the parameter tree."""

    name: str  # in the file
    leaf: str  # in the flattened tree
    shape: tuple[int, ...]  # in the file, heads and head size in one axis
    transposed: bool  # the file's kernels are [out, in], the leaf's [in, out]
    at: tuple[int, ...] = ()  # on the leaf's leading axes: layer, expert


def base_params(config: ModelConfig) -> Params:
    """The decoder's parameters without adapters, as shapes."""
    return abstract_params(dataclasses.replace(config, lora=None))


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the model, in the order of the computation. A tied head is no tensor."""
    shapes = {leaf: array.shape for leaf, array in flatten(base_params(config)).items()}

    def tensor(name: str, leaf: str, *index: int) -> Tensor:
        shape = shapes[leaf][len(index) :]
        if not leaf.endswith(".kernel"):
            flat = (math.prod(shape),) if leaf.endswith(".bias") else shape
            return Tensor(name, leaf, flat, False, index)
        inputs = _input_axes(leaf)
        flat = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        return Tensor(name, leaf, flat, True, index)

    layer_names = _GEMMA_LAYER if config.family == "gemma3_text" else _LAYER
    yield tensor("model.embed_tokens.weight", "embed.embedding")
    for i in range(config.layers):
        for leaf, name in layer_names.items():
            name, leaf = f"model.layers.{i}.{name}", f"layers.{leaf}"
            if leaf in shapes and "*" not in name:
                yield tensor(name, leaf, i)
            elif leaf in shapes:
                for e in range(shapes[leaf][1]):
                    yield tensor(name.replace("*", str(e)), leaf, i, e)
    yield tensor("model.norm.weight", "final_norm.scale")
    if not config.tie_embeddings:
        yield tensor("lm_head.weight", "head.kernel")


def in_file_layout(leaves: Mapping[str, Any], tensor: Tensor) -> np.ndarray:
    """The tensor's part of its leaf in the file's shape, a view to read, or to write in numpy."""
    part = np.asarray(leaves[tensor.leaf][tensor.at])
    if tensor.transposed:
        return part.reshape(tensor.shape[::-1]).T
    return part.reshape(tensor.shape)


def part_of_file(tensor: Tensor, shape: Sequence[int], part: Sequence[slice]) -> tuple[slice, ...]:
    """Where a part of the tensor's leaf is in the file; `shape` and `part` without L and E.

    Of heads and head size, one axis in the file, only the heads may be split.
    """

    def flat(first: int, end: int) -> slice:
        start, stop, _ = part[first].indices(shape[first])
        inner = math.prod(shape[first + 1 : end])
        return slice(start * inner, stop * inner)

    cuts = [0, _input_axes(tensor.leaf), len(shape)] if len(tensor.shape) == 2 else [0, len(shape)]
    found = [flat(*ends) for ends in itertools.pairwise(cuts)]
    return tuple(found[::-1] if tensor.transposed else found)


def _input_axes(leaf: str) -> int:
    return 2 if leaf.endswith(".o.kernel") else 1


def same_architecture(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configs share their weights: all but how they compute."""
    how = {name: getattr(a, name) for name in ("compute_dtype", "remat", "attention_block")}
    return a == dataclasses.replace(b, **how)
