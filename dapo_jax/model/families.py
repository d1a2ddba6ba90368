"""Hugging Face configs and tensor names of Llama, Qwen2, Qwen3 and Gemma 3. No I/O.

What the decoder cannot compute exactly is refused, never approximated.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.config import ModelConfig, RopeScaling, Windows, check_model, printable
from dapo_jax.types import InputError

Fail = Callable[[str, str], typing.NoReturn]

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3_text",
}
_FULL, _SLIDING = "full_attention", "sliding_attention"

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
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}
_KEYS = {
    **_SIZES,
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "tie_embeddings": "tie_word_embeddings",
}
_CHECKED = {
    **_KEYS,
    **{f"rope_scaling.{field}": f"rope_scaling.{key}" for field, key in _LLAMA3.items()},
    "windows": "sliding_window",
    "windows.size": "sliding_window",
    "windows.every": "sliding_window_pattern",
    "windows.rope_theta": "rope_local_base_freq",
    "rope_factor": "rope_scaling.factor",
    "query_scalar": "query_pre_attn_scalar",
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
    _refuse_unsupported(hf, family, fail)
    hf = _with_defaults(hf, family, fail)
    sizes = {field: _number(hf, key, int, fail) for field, key in _SIZES.items()}
    rope = _gemma_fields(hf, sizes["layers"], fail) if family == "gemma3_text" else _rope(hf, fail)
    tied = hf.get("tie_word_embeddings", family == "gemma3_text")  # transformers' defaults
    if not isinstance(tied, bool):
        fail("tie_word_embeddings", f"expected true or false, got {tied!r}")
    eps = _number(hf, "rms_norm_eps", float, fail)
    config = ModelConfig(family=family, **sizes, **rope, norm_eps=eps, tie_embeddings=tied)
    check_model(config, lambda field, message: fail(_CHECKED[field], message))
    return config


def model_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read: the inverse of `model_config_from_hf` but for
    compute_dtype and remat.
    """
    s, w = config.rope_scaling, config.windows
    names = [name for name, family in _ARCHITECTURES.items() if family == config.family]
    common = {"architectures": names, "model_type": config.family}
    common |= {key: getattr(config, field) for field, key in _KEYS.items()}
    if w is None:
        llama3: dict[str, Any] | None = None
        if s is not None:
            llama3 = {key: getattr(s, field) for field, key in _LLAMA3.items()}
            llama3 = {"rope_type": "llama3", **llama3}
        return common | {"hidden_act": "silu", "rope_scaling": llama3}
    scalar, factor = config.query_scalar, config.rope_factor
    return common | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.head_dim if scalar is None else scalar,
        "rope_local_base_freq": w.rope_theta,
        "rope_scaling": None if factor == 1 else {"rope_type": "linear", "factor": factor},
        "sliding_window": w.size,
        "sliding_window_pattern": w.every,
        "layer_types": _layer_types(config.layers, w.every),
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
        return ", a mixture of experts; use a dense model of its family"
    return ""


def _refuse_unsupported(hf: Mapping[str, Any], family: str, fail: Fail) -> None:
    """Refuses what changes the logits in a way that the decoder does not implement."""

    def refuse(key: str, supported: str) -> None:
        fail(key, f"{hf[key]!r} is not supported; supported: {supported}")

    gemma, quantized = family == "gemma3_text", "quantized weights are not supported; use a "
    own_code = "the model comes with its own code, which is never run; use a model of a built-in "
    if hf.get("auto_map"):
        fail("auto_map", own_code + "architecture without auto_map")
    for key in ("quantization_config", "quantization"):  # the latter is MLX's
        if hf.get(key):
            fail(key, quantized + "bfloat16, float16 or float32 model")
    key = "hidden_activation" if gemma else "hidden_act"
    activation = "gelu_pytorch_tanh" if gemma else "silu"
    if hf.get(key, activation) != activation:
        refuse(key, activation)
    if hf.get("attention_bias") and family != "qwen2":  # Qwen2 always has them
        fail("attention_bias", f"{family} with attention biases is not supported; supported: false")
    if hf.get("mlp_bias"):
        fail("mlp_bias", "feed-forward biases are not supported; supported: false")
    if hf.get("partial_rotary_factor") not in (None, 1):
        refuse("partial_rotary_factor", "1")
    if gemma:
        softcaps = ("attn_logit_softcapping", "final_logit_softcapping")
        for key in (*softcaps, "use_bidirectional_attention"):
            if hf.get(key):
                refuse(key, "null")
    elif layer_types := hf.get("layer_types"):
        if not isinstance(layer_types, list) or any(kind != _FULL for kind in layer_types):
            fail("layer_types", f"only {_FULL} in every layer is supported")
    elif hf.get("use_sliding_window") and hf.get("sliding_window") is not None:
        defaults = {"max_window_layers": 28, **hf}
        first = _number(defaults, "max_window_layers", int, fail, least=0)
        if first < _number(hf, "num_hidden_layers", int, fail):
            message = "sliding-window attention is not supported; supported: false"
            fail("use_sliding_window", message)


def _with_defaults(hf: Mapping[str, Any], family: str, fail: Fail) -> Mapping[str, Any]:
    """`hf` with head counts and sizes that transformers lets be left out."""
    filled = {**hf}
    if hf.get("num_key_value_heads") is None and (family == "llama" or "num_key_value_heads" in hf):
        filled["num_key_value_heads"] = hf.get("num_attention_heads")
    if hf.get("head_dim") is None and family in ("llama", "qwen2"):
        width, heads = (
            _number(hf, "hidden_size", int, fail),
            _number(hf, "num_attention_heads", int, fail),
        )
        if width % heads:
            fail(
                "num_attention_heads", f"{heads} does not divide hidden_size {width}; give head_dim"
            )
        filled["head_dim"] = width // heads
    return filled


def _layer_types(layers: int, every: int) -> list[str]:
    return [_SLIDING if (i + 1) % every else _FULL for i in range(layers)]


def _gemma_fields(hf: Mapping[str, Any], layers: int, fail: Fail) -> dict[str, Any]:
    """Options that only Gemma 3 has.

    Rotary frequencies are two, spelled out flat by transformers 4 and by kind of layer by
    transformers 5.
    """
    kinds, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    for key, value in (("rope_parameters", kinds), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            fail(key, f"expected an object, got {value!r}")
    for kind, value in kinds.items():
        if kind not in (_FULL, _SLIDING) or not isinstance(value or {}, Mapping):
            fail(
                f"rope_parameters.{kind}",
                f"is not supported; supported: {_FULL} and {_SLIDING}, each with its own rope_type "
                "and rope_theta",
            )
    near = {"rope_theta": hf.get("rope_local_base_freq", 1e4), **(kinds.get(_SLIDING) or {})}
    whole = {"rope_theta": hf.get("rope_theta", 1e6), **(kinds.get(_FULL) or {}), **scaling}
    types = ("default", "linear")
    for kind, rope in ((_SLIDING, near), (_FULL, whole)):
        name = rope.get("rope_type", rope.get("type", "default"))
        supported = types if kind == _FULL else types[:1]
        if name not in supported:
            fail(
                f"rope_parameters.{kind}.rope_type",
                f"{name!r} is not supported; supported: {', '.join(supported)}",
            )
        for key in rope.keys() - {
            "rope_type",
            "type",
            "rope_theta",
            *(("factor",) if name == "linear" else ()),
        }:
            fail(f"rope_parameters.{kind}.{key}", f"is not supported with rope_type {name}")
    linear = whole.get("rope_type", whole.get("type")) == "linear"
    scalar = _number({"query_pre_attn_scalar": 256, **hf}, "query_pre_attn_scalar", int, fail)
    window = _number({"sliding_window": 4096, **hf}, "sliding_window", int, fail)
    return {
        "rope_theta": _number(whole, "rope_theta", float, fail, prefix=f"rope_parameters.{_FULL}."),
        "rope_factor": _number(whole, "factor", float, fail, prefix="rope_scaling.")
        if linear
        else 1.0,
        "windows": Windows(
            window,
            _window_pattern(hf, layers, fail),
            _number(near, "rope_theta", float, fail, prefix=f"rope_parameters.{_SLIDING}."),
        ),
        "query_scalar": None if scalar == hf.get("head_dim") else scalar,
    }


def _window_pattern(hf: Mapping[str, Any], layers: int, fail: Fail) -> int:
    """The period of the layers without a window; layers + 1 if all have one."""
    types = hf.get("layer_types")
    if types is None:
        return min(
            layers + 1,
            _number({"sliding_window_pattern": 6, **hf}, "sliding_window_pattern", int, fail),
        )
    every = types.index(_FULL) + 1 if isinstance(types, list) and _FULL in types else layers + 1
    if not isinstance(types, list) or len(types) != layers or types != _layer_types(layers, every):
        fail(
            "layer_types",
            f"only {_FULL} in every n-th of {layers} layers and {_SLIDING} in the others is "
            "supported",
        )
    return every


def _rope(hf: Mapping[str, Any], fail: Fail) -> dict[str, Any]:
    """Base of the frequencies and their scaling; `rope_scaling` wins over `rope_parameters`, as in
    transformers 5.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    if not isinstance(rope, Mapping):
        fail(key, f"expected an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        fail(f"{key}.rope_type", f"{kind!r} is not supported; supported: default, llama3")
    known = {"rope_type", "type", "rope_theta", *(_LLAMA3.values() if kind == "llama3" else ())}
    for name in rope:  # also catches parameters nested by layer type
        if name not in known:
            fail(
                f"{key}.{name}",
                f"is not supported with rope_type {kind}; supported: {', '.join(sorted(known))}",
            )
    theta = _number(
        {"rope_theta": 10000.0, **hf, **rope}, "rope_theta", float, fail
    )  # transformers' default
    if kind == "default":
        return {"rope_theta": theta}
    kinds = typing.get_type_hints(RopeScaling)
    scaling = RopeScaling(
        **{
            field: _number(rope, name, kinds[field], fail, prefix=f"{key}.")
            for field, name in _LLAMA3.items()
        }
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _number(
    hf: Mapping[str, Any],
    key: str,
    kind: type,
    fail: Fail,
    least: int | None = None,
    prefix: str = "",
) -> Any:
    """hf[key] as an int or float that is positive (or at least `least`) and of a size that makes
    sense.
    """
    if hf.get(key) is None:
        fail(prefix + key, "is missing; this is no complete config.json of a supported model")
    value = hf[key]
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        fail(prefix + key, f"expected {'an integer' if kind is int else 'a number'}, got {value!r}")
    if not (value > 0 if least is None else value >= least) or not value < 2**40:
        fail(prefix + key, f"{value} is out of range")
    return kind(value)


class Tensor(NamedTuple):
    """A tensor of a Hugging Face file and its place in the parameter tree."""

    name: str  # in the file
    path: tuple[str, ...]  # of its leaf
    shape: tuple[int, ...]  # in the leaf, without the layer axis
    file_shape: tuple[int, ...]  # in the file, heads and head size in one axis
    transposed: bool = False  # the file's kernels are [out, in], the leaf's [in, out]
    layer: int | None = None  # index on the leaf's axis 0; None where the leaf is not stacked


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the model, in the order of the computation. A tied head is no tensor."""
    d, h, ffn, vocab = config.model_dim, config.head_dim, config.ffn_dim, config.vocab_size
    yield _plain("model.embed_tokens.weight", "embed/embedding", vocab, d)
    layer = [_plain("input_layernorm.weight", "attn_norm/scale", d)]
    for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        part, place = f"self_attn.{name}", f"attn/{name}"
        layer.append(_kernel(f"{part}_proj.weight", f"{place}/kernel", (d,), (heads, h)))
        if config.family == "qwen2":
            bias = _plain(f"{part}_proj.bias", f"{place}/bias", heads, h)
            layer.append(bias._replace(file_shape=(heads * h,)))
        if config.family in ("qwen3", "gemma3_text") and name != "v":
            layer.append(_plain(f"{part}_norm.weight", f"{place}_norm/scale", h))
    layer.append(_kernel("self_attn.o_proj.weight", "attn/o/kernel", (config.heads, h), (d,)))
    if config.family == "gemma3_text":  # its post-attention norm is of the branch's output
        layer.append(_plain("post_attention_layernorm.weight", "attn_post_norm/scale", d))
        layer.append(_plain("pre_feedforward_layernorm.weight", "mlp_norm/scale", d))
    else:
        layer.append(_plain("post_attention_layernorm.weight", "mlp_norm/scale", d))
    for name, inputs, outputs in (("gate", d, ffn), ("up", d, ffn), ("down", ffn, d)):
        kernel = f"mlp/{name}/kernel"
        layer.append(_kernel(f"mlp.{name}_proj.weight", kernel, (inputs,), (outputs,)))
    if config.family == "gemma3_text":
        layer.append(_plain("post_feedforward_layernorm.weight", "mlp_post_norm/scale", d))
    for i in range(config.layers):
        for t in layer:
            yield t._replace(name=f"model.layers.{i}.{t.name}", path=("layers", *t.path), layer=i)
    yield _plain("model.norm.weight", "final_norm/scale", d)
    if not config.tie_embeddings:
        yield _kernel("lm_head.weight", "head/kernel", (d,), (vocab,))


def _plain(name: str, path: str, *shape: int) -> Tensor:
    return Tensor(name, tuple(path.split("/")), shape, shape)


def _kernel(name: str, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
    file_shape = (math.prod(outputs), math.prod(inputs))
    return Tensor(name, tuple(path.split("/")), inputs + outputs, file_shape, transposed=True)


def in_file_layout(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """A view of a leaf in the file's shape, to write into (loading) or to read from (saving)."""
    if tensor.transposed:
        return array.reshape(tensor.file_shape[::-1]).T
    return array.reshape(tensor.file_shape)


def same_architecture(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configs share their weights: all but how they compute."""
    how = {name: getattr(a, name) for name in ("compute_dtype", "remat", "attention_block")}
    return a == dataclasses.replace(b, **how)
