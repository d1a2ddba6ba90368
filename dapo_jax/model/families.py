"""Hugging Face configs and tensor names of Llama, Qwen2 and Qwen3, read and written. Pure: no I/O.

What the decoder cannot compute exactly is refused, never approximated.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dapo_jax.config import ModelConfig, RopeScaling, check_model, printable
from dapo_jax.types import Array, InputError

Fail = Callable[[str, str], typing.NoReturn]

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

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


def model_config_from_hf(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that a Hugging Face config.json describes, in the spelling of transformers 4 or 5.

    Args:
      hf: the parsed file. where: its name, for errors. compute_dtype and remat keep their defaults.

    Raises:
      InputError: a key is missing or of the wrong kind, or asks for what the decoder cannot do exactly.
    """

    def fail(key: str, message: str) -> typing.NoReturn:
        raise InputError(f"{where}: {printable(key)[:100]}: {message[:300]}")  # the file may say anything, at any length

    family = _family(hf, fail)
    _refuse_unsupported(hf, family, fail)
    hf = _with_defaults(hf, family, fail)
    sizes = {field: _number(hf, key, int, fail) for field, key in _SIZES.items()}
    theta, scaling = _rope(hf, fail)
    tied = hf.get("tie_word_embeddings", False)  # transformers' default for all three families
    if not isinstance(tied, bool):
        fail("tie_word_embeddings", f"expected true or false, got {tied!r}")
    config = ModelConfig(
        family=family,
        **sizes,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(hf, "rms_norm_eps", float, fail),
        tie_embeddings=tied,
    )
    check_model(config, lambda field, message: fail(_KEYS[field], message))
    return config


def model_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read: the inverse of `model_config_from_hf` but for compute_dtype and remat."""
    s = config.rope_scaling
    return {
        "architectures": [name for name, family in _ARCHITECTURES.items() if family == config.family],
        "model_type": config.family,
        **{key: getattr(config, field) for field, key in _KEYS.items()},
        "hidden_act": "silu",
        "rope_scaling": None if s is None else {"rope_type": "llama3", **{key: getattr(s, field) for field, key in _LLAMA3.items()}},
    }


def _family(hf: Mapping[str, Any], fail: Fail) -> Any:
    names, model_type = hf.get("architectures"), hf.get("model_type")
    supported = f"{_hint(hf, names)}; supported (docs/models.md): {', '.join(_ARCHITECTURES)}"
    if names is None:
        if model_type not in _ARCHITECTURES.values():
            fail("model_type", f"{repr(model_type)[:60]} is not supported{supported}")
        return model_type
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(_ARCHITECTURES):
        fail("architectures", f"{repr(names)[:60]} is not supported{supported}")
    family = _ARCHITECTURES[names[0]]
    if model_type not in (None, family):
        fail("model_type", f"{repr(model_type)[:60]} contradicts architectures {names!r}{supported}")
    return family


def _hint(hf: Mapping[str, Any], names: Any) -> str:
    """What kind of model it is, where that says what to do instead."""
    if "ForConditionalGeneration" in str(names) or {"text_config", "vision_config", "audio_config"} & hf.keys():
        return ", a model of text and something else; use a text-only model of its family, or save its text part as a model"
    if "Moe" in str(names) or {"num_experts", "num_local_experts"} & hf.keys():
        return ", a mixture of experts; use a dense model of its family"
    return ""


def _refuse_unsupported(hf: Mapping[str, Any], family: str, fail: Fail) -> None:
    """What changes the logits in a way that the decoder does not know."""
    if hf.get("auto_map"):
        fail("auto_map", "the model comes with its own code, which is never run; use a model of a built-in architecture without auto_map")
    if hf.get("quantization_config"):
        fail("quantization_config", "quantised weights are not supported; use a bfloat16, float16 or float32 model")
    if hf.get("hidden_act", "silu") != "silu":
        fail("hidden_act", f"{hf['hidden_act']!r} is not supported; supported: silu")
    if hf.get("attention_bias") and family != "qwen2":  # Qwen2 has its biases whatever this key says
        fail("attention_bias", f"{family} with attention biases is not supported; supported: false")
    if hf.get("mlp_bias"):
        fail("mlp_bias", "feed-forward biases are not supported; supported: false")
    if hf.get("partial_rotary_factor") not in (None, 1):
        fail("partial_rotary_factor", f"{hf['partial_rotary_factor']!r} is not supported; supported: 1")
    if layer_types := hf.get("layer_types"):
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            fail("layer_types", "only full_attention in every layer is supported")
    elif hf.get("use_sliding_window") and hf.get("sliding_window") is not None:
        if _number({"max_window_layers": 28, **hf}, "max_window_layers", int, fail, least=0) < _number(hf, "num_hidden_layers", int, fail):
            fail("use_sliding_window", "sliding-window attention is not supported; supported: false")


def _with_defaults(hf: Mapping[str, Any], family: str, fail: Fail) -> Mapping[str, Any]:
    """`hf` with head counts and sizes that transformers lets be left out."""
    filled = {**hf}
    if hf.get("num_key_value_heads") is None and (family == "llama" or "num_key_value_heads" in hf):
        filled["num_key_value_heads"] = hf.get("num_attention_heads")
    if hf.get("head_dim") is None and family != "qwen3":
        width, heads = _number(hf, "hidden_size", int, fail), _number(hf, "num_attention_heads", int, fail)
        if width % heads:
            fail("num_attention_heads", f"{heads} does not divide hidden_size {width}; give head_dim")
        filled["head_dim"] = width // heads
    return filled


def _rope(hf: Mapping[str, Any], fail: Fail) -> tuple[float, RopeScaling | None]:
    """Base of the frequencies and their scaling; `rope_scaling` wins over `rope_parameters`, as in transformers 5."""
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
            fail(f"{key}.{name}", f"is not supported with rope_type {kind}; supported: {', '.join(sorted(known))}")
    theta = _number({"rope_theta": 10000.0, **hf, **rope}, "rope_theta", float, fail)  # transformers' default
    if kind == "default":
        return theta, None
    kinds = typing.get_type_hints(RopeScaling)
    return theta, RopeScaling(**{field: _number(rope, name, kinds[field], fail, prefix=f"{key}.") for field, name in _LLAMA3.items()})


def _number(hf: Mapping[str, Any], key: str, kind: type, fail: Fail, least: float | None = None, prefix: str = "") -> Any:
    """hf[key] as an int or float that is positive (or at least `least`) and of a size that makes sense."""
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
    path: tuple[str, ...]  # of the leaf that holds it
    layer: int | None  # index on the leaf's axis 0; None where the leaf is not stacked
    shape: tuple[int, ...]  # in the leaf, without the layer axis
    file_shape: tuple[int, ...]  # in the file, heads and head_dim in one axis
    transposed: bool  # the file's kernels are [out, in], the leaf's [in, out]


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the model, in the order of the computation. A tied head is no tensor."""
    d, h, ffn, vocab = config.model_dim, config.head_dim, config.ffn_dim, config.vocab_size

    yield _plain("model.embed_tokens.weight", "embed/embedding", (vocab, d))
    layer = [_plain("input_layernorm.weight", "attn_norm/scale", (d,))]
    for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        layer.append(_kernel(f"self_attn.{name}_proj.weight", f"attn/{name}/kernel", (d,), (heads, h)))
        if config.family == "qwen2":
            layer.append(_plain(f"self_attn.{name}_proj.bias", f"attn/{name}/bias", (heads, h))._replace(file_shape=(heads * h,)))
        if config.family == "qwen3" and name != "v":
            layer.append(_plain(f"self_attn.{name}_norm.weight", f"attn/{name}_norm/scale", (h,)))
    layer += [
        _kernel("self_attn.o_proj.weight", "attn/o/kernel", (config.heads, h), (d,)),
        _plain("post_attention_layernorm.weight", "mlp_norm/scale", (d,)),
        _kernel("mlp.gate_proj.weight", "mlp/gate/kernel", (d,), (ffn,)),
        _kernel("mlp.up_proj.weight", "mlp/up/kernel", (d,), (ffn,)),
        _kernel("mlp.down_proj.weight", "mlp/down/kernel", (ffn,), (d,)),
    ]
    for i in range(config.layers):
        for t in layer:
            yield t._replace(name=f"model.layers.{i}.{t.name}", path=("layers", *t.path), layer=i)
    yield _plain("model.norm.weight", "final_norm/scale", (d,))
    if not config.tie_embeddings:
        yield _kernel("lm_head.weight", "head/kernel", (d,), (vocab,))


def _plain(name: str, path: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, tuple(path.split("/")), None, shape, shape, False)


def _kernel(name: str, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
    return Tensor(name, tuple(path.split("/")), None, inputs + outputs, (math.prod(outputs), math.prod(inputs)), True)


def in_file_layout(array: Array, tensor: Tensor) -> Array:
    """`array` of the leaf's shape, seen in the file's: a view, to write into when loading and to read from when saving."""
    return array.reshape(tensor.file_shape[::-1]).T if tensor.transposed else array.reshape(tensor.file_shape)


def same_architecture(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configs share their weights: all but how they compute."""
    return a == dataclasses.replace(b, compute_dtype=a.compute_dtype, remat=a.remat, attention_block=a.attention_block)
