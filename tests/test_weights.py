"""Hugging Face folders in and out: layout against the safetensors library, round trips, and every
folder that must be refused.
"""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from dapo_jax.config import Experts, MeshSection, ModelConfig, RopeScaling, Windows, flatten
from dapo_jax.model import flops
from dapo_jax.model.families import model_config_from_hf, model_config_to_hf, tensors
from dapo_jax.model.weights import load_pretrained, save_pretrained
from dapo_jax.runtime.mesh import make_mesh, params_sharding
from dapo_jax.types import InputError

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))

# As published on the model pages.
LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN25_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# Qwen3-30B-A3B, as transformers 4 wrote it
QWEN3_MOE: dict[str, Any] = QWEN3_06B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}

GEMMA3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
# The text part of the 27B model, whose own config.json names its image part, too.
GEMMA3_27B: dict[str, Any] = {
    **GEMMA3_1B,
    "head_dim": 128,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "vocab_size": 262208,
}


def without(tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in tree.items() if k not in keys}


def assert_refused(call, *parts):
    """`call` raises InputError in one line that contains all of `parts`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def assert_same_params(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


# --------------------------------------------------------------------------------------------------------------------
# Configs
# --------------------------------------------------------------------------------------------------------------------


def test_config_of_published_models():
    assert model_config_from_hf(LLAMA_31_8B, "c") == ModelConfig(
        family="llama",
        vocab_size=128256,
        model_dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        tie_embeddings=False,
        max_position=131072,
    )
    assert model_config_from_hf(QWEN25_7B, "c") == ModelConfig(
        family="qwen2",
        vocab_size=152064,
        model_dim=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        ffn_dim=18944,
        tie_embeddings=False,
        max_position=32768,
    )
    assert model_config_from_hf(QWEN3_06B, "c") == ModelConfig()  # the defaults are Qwen3-0.6B
    mixture = model_config_from_hf(QWEN3_MOE, "c")
    assert (mixture.experts, mixture.ffn_dim) == (Experts(128, 8, True), 768)
    assert flops.weights(mixture) == 30_532_122_624 - 210_944  # of Qwen3-30B-A3B; of its norms
    renamed = {**without(QWEN3_MOE, "num_experts"), "num_local_experts": 128}  # transformers 5
    assert model_config_from_hf(renamed, "c") == mixture
    gemma = model_config_from_hf(GEMMA3_27B, "c")
    assert (gemma.family, gemma.windows, gemma.rope_theta, gemma.rope_factor) == (
        "gemma3_text",
        Windows(1024, 6, 1e4),
        1e6,
        8.0,
    )
    assert gemma.tie_embeddings and gemma.query_scalar == 168
    small = model_config_from_hf(GEMMA3_1B, "c")
    assert (small.windows, small.rope_factor, small.query_scalar) == (
        Windows(512, 6, 1e4),
        1.0,
        None,
    )


@pytest.mark.parametrize("hf", [GEMMA3_1B, GEMMA3_27B])
def test_gemma_in_the_spelling_of_transformers_5_means_the_same(hf):
    old = (
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "sliding_window_pattern",
        "torch_dtype",
    )
    full = {"rope_type": "default", **(hf["rope_scaling"] or {}), "rope_theta": 1e6}
    new = {
        **without(hf, *old),
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    new["layer_types"] = [
        "full_attention" if i % 6 == 5 else "sliding_attention"
        for i in range(hf["num_hidden_layers"])
    ]
    assert model_config_from_hf(new, "c") == model_config_from_hf(hf, "c")


def test_gemma_defaults_are_those_of_transformers():
    left_out = (
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "sliding_window",
        "sliding_window_pattern",
        "query_pre_attn_scalar",
    )
    config = model_config_from_hf(without(GEMMA3_27B, *left_out), "c")
    assert (config.windows, config.rope_theta, config.rope_factor, config.query_scalar) == (
        Windows(4096, 6, 1e4),
        1e6,
        1.0,
        256,
    )


@pytest.mark.parametrize("full, every", [((0, 1, 2), 1), ((1,), 2), ((2,), 3), ((), 4)])
def test_layer_types_of_any_period(full, every):
    types = ["full_attention" if i in full else "sliding_attention" for i in range(3)]
    hf = {
        **without(GEMMA3_1B, "sliding_window_pattern"),
        "num_hidden_layers": 3,
        "layer_types": types,
    }
    config = model_config_from_hf(hf, "c")
    assert config.windows == Windows(512, every)
    written = model_config_to_hf(config)
    assert written["layer_types"] == types and model_config_from_hf(written, "c") == config
    assert model_config_from_hf(without(written, "layer_types"), "c") == config


@pytest.mark.parametrize("hf", [LLAMA_31_8B, QWEN25_7B, QWEN3_06B])
def test_transformers_5_spelling_means_the_same(hf):
    rope: dict[str, Any] = {
        "rope_type": "default",
        **(hf.get("rope_scaling") or {}),
        "rope_theta": hf["rope_theta"],
    }
    new = {
        **without(hf, "rope_theta", "rope_scaling", "torch_dtype"),
        "rope_parameters": rope,
        "dtype": "bfloat16",
    }
    new["layer_types"] = ["full_attention"] * hf["num_hidden_layers"]
    assert model_config_from_hf(new, "c") == model_config_from_hf(hf, "c")


def test_config_defaults_are_those_of_transformers():
    config = model_config_from_hf(
        without(
            LLAMA_31_8B, "num_key_value_heads", "tie_word_embeddings", "rope_scaling", "rope_theta"
        ),
        "c",
    )
    assert (config.kv_heads, config.head_dim, config.tie_embeddings, config.rope_scaling) == (
        32,
        128,
        False,
        None,
    )
    assert config.rope_theta == 10000.0
    assert model_config_from_hf(without(QWEN3_06B, "architectures"), "c").family == "qwen3"


@pytest.mark.parametrize("hf", [LLAMA_31_8B, QWEN25_7B, QWEN3_06B, GEMMA3_1B, GEMMA3_27B])
def test_config_round_trip(hf):
    config = model_config_from_hf(hf, "c")
    written = json.loads(json.dumps(model_config_to_hf(config)))
    assert model_config_from_hf(written, "c") == config
    shared = written.keys() & hf.keys()
    assert len(shared) >= 13
    assert {key: written[key] for key in shared} == {key: hf[key] for key in shared}


ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")
BY_KIND = {
    "full_attention": {"rope_type": "default"},
    "sliding_attention": {"rope_type": "default"},
}
ROPE: dict[str, Any] = LLAMA_31_8B["rope_scaling"]
REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "architecture": (LLAMA_31_8B, {"architectures": ["MistralForCausalLM"]}, "architectures"),
    "classifier": (
        LLAMA_31_8B,
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures",
    ),
    "architecture-text": (LLAMA_31_8B, {"architectures": "LlamaForCausalLM"}, "architectures"),
    "architecture-nested": (LLAMA_31_8B, {"architectures": [{}]}, "architectures"),
    "model-type": (LLAMA_31_8B, {"model_type": "mistral"}, "model_type"),
    "no-architecture": (LLAMA_31_8B, {"architectures": None, "model_type": "gemma"}, "model_type"),
    "remote-code": (
        LLAMA_31_8B,
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
        "auto_map",
    ),
    "quantized": (
        LLAMA_31_8B,
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config",
    ),
    "quantized-mlx": (LLAMA_31_8B, {"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
    "gelu": (LLAMA_31_8B, {"hidden_act": "gelu"}, "hidden_act"),
    "llama-bias": (LLAMA_31_8B, {"attention_bias": True}, "attention_bias"),
    "qwen3-bias": (QWEN3_06B, {"attention_bias": True}, "attention_bias"),
    "dense-layer": (QWEN3_MOE, {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "sparse-step": (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    "no-experts": (QWEN3_MOE, {"num_experts": None}, "num_experts"),
    "many-experts": (QWEN3_MOE, {"num_experts": 512}, "num_experts"),
    "few-experts": (QWEN3_MOE, {"num_experts": 4}, "num_experts_per_tok"),
    "topk-norm": (QWEN3_MOE, {"norm_topk_prob": 1}, "norm_topk_prob"),
    "mlp-bias": (LLAMA_31_8B, {"mlp_bias": True}, "mlp_bias"),
    "partial-rotary": (LLAMA_31_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "window": (
        QWEN25_7B,
        {"use_sliding_window": True, "max_window_layers": 10},
        "use_sliding_window",
    ),
    "window-default": (
        without(QWEN25_7B, "sliding_window"),
        {"use_sliding_window": True, "max_window_layers": 10},
        "use_sliding_window",
    ),
    "window-experts": (  # transformers applies it to all layers, whatever these keys hold
        QWEN3_MOE,
        {
            "use_sliding_window": True,
            "sliding_window": 4096,
            "max_window_layers": 48,
            "layer_types": ["full_attention"] * 48,
        },
        "use_sliding_window",
    ),
    "window-layer": (
        QWEN25_7B,
        {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
        "layer_types",
    ),
    "rope-yarn": (
        QWEN25_7B,
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope_scaling.rope_type",
    ),
    "rope-linear": (
        LLAMA_31_8B,
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "rope_scaling.rope_type",
    ),
    "rope-dynamic": (
        QWEN3_06B,
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_parameters.rope_type",
    ),
    "rope-by-layer": (
        QWEN3_06B,
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters.full_attention",
    ),
    "rope-key": (
        LLAMA_31_8B,
        {"rope_scaling": {**ROPE, "attention_factor": 2.0}},
        "rope_scaling.attention_factor",
    ),
    "rope-incomplete": (
        LLAMA_31_8B,
        {"rope_scaling": without(ROPE, "high_freq_factor")},
        "rope_scaling.high_freq_factor",
    ),
    "rope-crossed": (
        LLAMA_31_8B,
        {"rope_scaling": {**ROPE, "high_freq_factor": 0.5}},
        "rope_scaling",
    ),
    "rope-small-factor": (
        LLAMA_31_8B,
        {"rope_scaling": {**ROPE, "factor": 0.5}},
        "rope_scaling.factor",
    ),
    "rope-text": (LLAMA_31_8B, {"rope_scaling": "llama3"}, "rope_scaling"),
    "gemma-activation": (GEMMA3_1B, {"hidden_activation": "gelu"}, "hidden_activation"),
    "gemma-bias": (GEMMA3_1B, {"attention_bias": True}, "attention_bias"),
    "gemma-softcap": (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "gemma-final-softcap": (
        GEMMA3_1B,
        {"final_logit_softcapping": 30.0},
        "final_logit_softcapping",
    ),
    "gemma-bidirectional": (
        GEMMA3_1B,
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention",
    ),
    "gemma-no-window": (GEMMA3_1B, {"sliding_window": None}, "sliding_window"),
    "gemma-zero-window": (GEMMA3_1B, {"sliding_window": 0}, "sliding_window"),
    "gemma-huge-window": (GEMMA3_1B, {"sliding_window": 2**35}, "sliding_window"),
    "gemma-layers": (
        GEMMA3_1B,
        {"layer_types": ["full_attention"] + ["sliding_attention"] * 25},
        "layer_types",
    ),
    "gemma-few-layers": (GEMMA3_1B, {"layer_types": ["sliding_attention"] * 5}, "layer_types"),
    "gemma-endless-layers": (
        GEMMA3_1B,
        {"num_hidden_layers": 2**39, "layer_types": ["full_attention"]},
        "layer_types",
    ),
    "gemma-layers-text": (GEMMA3_1B, {"layer_types": "full_attention"}, "layer_types"),
    "gemma-pattern": (GEMMA3_1B, {"sliding_window_pattern": "LLG"}, "sliding_window_pattern"),
    "gemma-head-dim": (GEMMA3_1B, {"head_dim": None}, "head_dim"),
    "gemma-llama3": (GEMMA3_1B, {"rope_scaling": ROPE}, "rope_scaling.rope_type"),
    "gemma-no-factor": (
        GEMMA3_1B,
        {"rope_scaling": {"rope_type": "linear"}},
        "rope_scaling.factor",
    ),
    "gemma-small-factor": (
        GEMMA3_1B,
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        "rope_scaling.factor",
    ),
    "gemma-rope-flat": (
        GEMMA3_1B,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_parameters.rope_type",
    ),
    "gemma-rope-text": (GEMMA3_1B, {"rope_parameters": "default"}, "rope_parameters"),
    "gemma-rope-kind-text": (
        GEMMA3_1B,
        {"rope_parameters": {"full_attention": "default"}},
        "rope_parameters.full_attention",
    ),
    "gemma-local-scaling": (
        GEMMA3_1B,
        {
            "rope_parameters": BY_KIND
            | {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
        },
        "rope_parameters.sliding_attention.rope_type",
    ),
    "gemma-rope-key": (
        GEMMA3_1B,
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}},
        "rope_scaling.x",
    ),
    "gemma-scalar": (GEMMA3_1B, {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
    "gemma-local-base": (
        GEMMA3_1B,
        {"rope_local_base_freq": "x"},
        "rope_parameters.sliding_attention.rope_theta",
    ),
    "missing": (LLAMA_31_8B, {"hidden_size": None}, "hidden_size"),
    "missing-qwen3-head-dim": (QWEN3_06B, {"head_dim": None}, "head_dim"),
    "text": (LLAMA_31_8B, {"hidden_size": "4096"}, "hidden_size"),
    "fraction": (LLAMA_31_8B, {"num_hidden_layers": 32.0}, "num_hidden_layers"),
    "bool": (LLAMA_31_8B, {"num_hidden_layers": True}, "num_hidden_layers"),
    "zero": (LLAMA_31_8B, {"vocab_size": 0}, "vocab_size"),
    "huge": (LLAMA_31_8B, {"max_position_embeddings": 2**35}, "max_position_embeddings"),
    "nan": (LLAMA_31_8B, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "infinite": (LLAMA_31_8B, {"rope_theta": float("inf")}, "rope_theta"),
    "indivisible-heads": (LLAMA_31_8B, {"num_key_value_heads": 5}, "num_key_value_heads"),
    "indivisible-width": (LLAMA_31_8B, {"num_attention_heads": 30}, "num_attention_heads"),
    "odd-head-dim": (LLAMA_31_8B, {"head_dim": 65}, "head_dim"),
    "tie": (LLAMA_31_8B, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_config_refused(name):
    hf, change, key = REFUSED_CONFIGS[name]
    model_config_from_hf(hf, "x/config.json")
    assert_refused(
        lambda: model_config_from_hf({**hf, **change}, "x/config.json"),
        "x/config.json: ",
        f"{key}: ",
    )


@pytest.mark.parametrize(
    "hf, hint",
    [
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
            "'] is not supported; supported",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
            "'] is not supported; supported",
        ),
        ({"model_type": "t5"}, "'t5' is not supported; supported"),
        ({}, "None is not supported; supported"),
        ({"architectures": []}, "[] is not supported; supported"),
        (
            {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]},
            "is not supported; supported",
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"},
            "contradicts architectures ['LlamaForCausalLM']; supported",
        ),
        (
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "model_type": "gemma3",
                "text_config": {},
            },
            "save its text part as a model; ",
        ),
        (
            {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"},
            "use a text-only model of its family",
        ),
        (
            {"model_type": "llava", "text_config": {}, "vision_config": {}},
            "use a text-only model of its family",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
            "a mixture of experts; use Qwen3-MoE or a dense model of its family; ",
        ),
        ({"architectures": ["x" * 1000]}, "is not supported; supported"),
    ],
)
def test_another_architecture_is_told_what_there_is_instead(hf, hint):
    """Whatever is wrong with it, the line has every name that would have been right."""
    assert_refused(lambda: model_config_from_hf(hf, "c"), "c: ", hint, *ARCHITECTURES)


def test_window_that_no_layer_uses_is_accepted():
    assert model_config_from_hf(
        {**QWEN25_7B, "use_sliding_window": True}, "c"
    ) == model_config_from_hf(QWEN25_7B, "c")


# --------------------------------------------------------------------------------------------------------------------
# Loading and saving
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.default("qwen*_untied-(2, 2, 2)", "llama_tied-(1, 2, 4)")
@pytest.mark.parametrize("layout", [(1, 8, 1), (1, 2, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shards_are_read_alone_and_equal_the_whole(name, layout, monkeypatch):
    """Over 8 devices, each way to split them, bit for bit; each byte of a shard is read once."""
    _, whole = load_pretrained(GOLDENS / name)
    monkeypatch.setattr("dapo_jax.model.weights.safe_open", tiny.CountedReads)
    shardings = params_sharding(whole, make_mesh(MeshSection(*layout)))
    for dtype in ("float32", "bfloat16"):
        tiny.CountedReads.total = 0
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, dtype, sharding=s),  # noqa: B023
            whole,
            shardings,
        )
        found = load_pretrained(GOLDENS / name, target)[1]
        assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)),  # noqa: B023
            found,
            whole,
        )
        assert tiny.CountedReads.total * np.dtype(dtype).itemsize == 4 * tiny.shard_bytes(found)


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    """Leaves against the file by index arithmetic: file kernels are [out, in], heads major in `out`
    of q, k, v and in `in` of o.
    """
    config, params = load_pretrained(GOLDENS / name)
    file = load_file(GOLDENS / name / "model.safetensors")
    assert {t.name for t in tensors(config)} == set(file)
    np.testing.assert_array_equal(params["embed"]["embedding"], file["model.embed_tokens.weight"])
    assert ("head" in params) == (not config.tie_embeddings) == ("lm_head.weight" in file)
    if "head" in params:
        np.testing.assert_array_equal(params["head"]["kernel"], file["lm_head.weight"].T)
    np.testing.assert_array_equal(params["final_norm"]["scale"], file["model.norm.weight"])
    h, layers = config.head_dim, params["layers"]
    for i in range(config.layers):

        def stored(part, i=i):
            return file[f"model.layers.{i}.{part}"]

        np.testing.assert_array_equal(
            layers["attn_norm"]["scale"][i], stored("input_layernorm.weight")
        )
        if config.family == "gemma3_text":
            np.testing.assert_array_equal(
                layers["attn_post_norm"]["scale"][i], stored("post_attention_layernorm.weight")
            )
            np.testing.assert_array_equal(
                layers["mlp_norm"]["scale"][i], stored("pre_feedforward_layernorm.weight")
            )
            np.testing.assert_array_equal(
                layers["mlp_post_norm"]["scale"][i], stored("post_feedforward_layernorm.weight")
            )
        else:
            np.testing.assert_array_equal(
                layers["mlp_norm"]["scale"][i], stored("post_attention_layernorm.weight")
            )
        for part in ("gate", "up", "down"):
            if config.experts is None:
                found = layers["mlp"][part]["kernel"][i]
                np.testing.assert_array_equal(found, stored(f"mlp.{part}_proj.weight").T)
            for e in range(config.experts.count if config.experts else 0):
                found = layers["experts"][part]["kernel"][i, e]
                np.testing.assert_array_equal(
                    found, stored(f"mlp.experts.{e}.{part}_proj.weight").T
                )
        if config.experts:
            router = layers["experts"]["router"]["kernel"][i]
            np.testing.assert_array_equal(router, stored("mlp.gate.weight").T)
        for part, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
            for head in range(heads):
                rows = slice(head * h, head * h + h)
                np.testing.assert_array_equal(
                    layers["attn"][part]["kernel"][i][:, head],
                    stored(f"self_attn.{part}_proj.weight")[rows].T,
                )
                if config.family == "qwen2":
                    np.testing.assert_array_equal(
                        layers["attn"][part]["bias"][i][head],
                        stored(f"self_attn.{part}_proj.bias")[rows],
                    )
        for head in range(config.heads):
            columns = stored("self_attn.o_proj.weight")[:, head * h : head * h + h]
            np.testing.assert_array_equal(layers["attn"]["o"]["kernel"][i][head], columns.T)
        if config.family in ("qwen3", "qwen3_moe", "gemma3_text"):
            for part in ("q_norm", "k_norm"):
                np.testing.assert_array_equal(
                    layers["attn"][part]["scale"][i], stored(f"self_attn.{part}.weight")
                )


@pytest.mark.default("*-False")
@pytest.mark.parametrize("as_jax", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(name, as_jax, tmp_path):
    config, params = load_pretrained(GOLDENS / name)
    given = jax.tree.map(jnp.asarray, params) if as_jax else params
    save_pretrained(tmp_path / "out", config, given)
    again_config, again = load_pretrained(tmp_path / "out")
    assert again_config == config
    assert_same_params(again, params)
    source, out = (
        load_file(GOLDENS / name / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert source.keys() == out.keys()
    for key in source:
        np.testing.assert_array_equal(out[key], source[key])
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {
        "format": "pt"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sharded_round_trip(tmp_path):
    config, params = load_pretrained(GOLDENS / "qwen3_untied")
    save_pretrained(tmp_path / "out", config, params, max_shard_bytes=20_000)
    assert_same_params(load_pretrained(tmp_path / "out")[1], params)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 3 and set(shards) == {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    }
    assert index["weight_map"] == {name: shard for shard, held in shards.items() for name in held}
    sizes = [sum(values.nbytes for values in held.values()) for held in shards.values()]
    assert max(sizes) <= 20_000 and index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_weights_become_float32(dtype, tmp_path):
    folder = copy_golden("llama_tied", tmp_path)
    halves = {
        name: values.astype(dtype)
        for name, values in load_file(folder / "model.safetensors").items()
    }
    save_file(halves, folder / "model.safetensors")
    params = load_pretrained(folder)[1]
    embedding = params["embed"]["embedding"]
    assert embedding.dtype == np.float32
    np.testing.assert_array_equal(embedding, halves["model.embed_tokens.weight"].astype(np.float32))
    assert (
        np.abs(embedding - load_pretrained(GOLDENS / "llama_tied")[1]["embed"]["embedding"]).max()
        > 0
    )


@pytest.mark.slow
def test_memory_holds_the_model_once(tmp_path):
    config = ModelConfig(
        vocab_size=256, model_dim=64, layers=40, heads=4, kv_heads=2, head_dim=16, ffn_dim=256
    )
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(model_config_to_hf(config)))
    file = {t.name: rng.standard_normal(t.shape, np.float32) for t in tensors(config)}
    save_file(file, tmp_path / "in" / "model.safetensors")
    size = sum(values.nbytes for values in file.values())
    # Modules are imported, and small programs compiled, before memory is counted.
    save_pretrained(tmp_path / "first", config, load_pretrained(tmp_path / "in")[1])
    tracemalloc.start()
    try:
        params = load_pretrained(tmp_path / "in")[1]
        assert size <= tracemalloc.get_traced_memory()[1] < 1.1 * size
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        save_pretrained(tmp_path / "out", config, params)
        assert tracemalloc.get_traced_memory()[1] - before < 0.1 * size
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size >= size


def test_source_folder_is_kept_but_for_the_dtype(tmp_path):
    source = copy_golden("llama_scaled_untied", tmp_path)
    hf = json.loads((source / "config.json").read_text())
    hf |= {"dtype": "bfloat16", "eos_token_id": [7, 8], "of_the_user": {"note": "kept"}}
    (source / "config.json").write_text(json.dumps(hf))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "modeling_evil.py",
        "pytorch_model.bin",
    ):
        (source / name).write_text(f"content of {name}")
    config, params = load_pretrained(source)
    trained = dataclasses.replace(config, compute_dtype="bfloat16", remat="full")
    save_pretrained(tmp_path / "out", trained, params, source_folder=source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**hf, "dtype": "float32"}
    copied = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied | {
        "config.json",
        "model.safetensors",
    }
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert load_pretrained(tmp_path / "out")[0] == config


class FakeTokenizer:
    eos_token_id = 5
    bos_token_id = None

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("its own")


def test_tokenizer_is_saved_where_there_is_no_source(tmp_path):
    """A source's own files stay as they are: transformers would name a class of its own in them,
    which earlier releases do not know.
    """
    config, params = load_pretrained(GOLDENS / "qwen2_tied")
    source = copy_golden("qwen2_tied", tmp_path)
    for name in ("tokenizer.json", "vocab.json"):
        (source / name).write_text("the source's")
    save_pretrained(tmp_path / "a", config, params, source_folder=source, tokenizer=FakeTokenizer())
    assert {(tmp_path / "a" / name).read_text() for name in ("tokenizer.json", "vocab.json")} == {
        "the source's"
    }
    save_pretrained(tmp_path / "b", config, params, tokenizer=FakeTokenizer())
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "its own"
    hf = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (hf["eos_token_id"], hf["bos_token_id"], hf["torch_dtype"]) == (5, None, "float32")


def test_failed_save_leaves_nothing(tmp_path):
    class Failing:
        def __init__(self, error):
            self.error = error

        def save_pretrained(self, folder):
            raise self.error

    config, params = load_pretrained(GOLDENS / "qwen2_tied")
    for error, raised in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), InputError),
    ):
        with pytest.raises(raised):
            save_pretrained(tmp_path / "out", config, params, tokenizer=Failing(error))
        assert list(tmp_path.iterdir()) == []


def test_save_refuses_what_it_would_overwrite(tmp_path):
    config, params = load_pretrained(GOLDENS / "qwen2_tied")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        assert_refused(lambda name=name: save_pretrained(tmp_path / name, config, params), name)
    assert_refused(
        lambda: save_pretrained(tmp_path / "file" / "below", config, params), "cannot write"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file"}
    assert (
        (tmp_path / "full" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    )
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", config, params)
    assert_same_params(load_pretrained(tmp_path / "empty")[1], params)


def test_save_refuses_what_does_not_belong_together(tmp_path):
    config, params = load_pretrained(GOLDENS / "qwen2_tied")
    assert_refused(
        lambda: save_pretrained(
            tmp_path / "out", config, params, source_folder=GOLDENS / "qwen2_untied"
        ),
        "architecture",
    )
    assert_refused(
        lambda: save_pretrained(
            tmp_path / "out", config, params, source_folder=tmp_path / "nowhere"
        ),
        "nowhere",
    )
    with pytest.raises(ValueError, match="head.kernel"):
        save_pretrained(
            tmp_path / "out", config, {**params, "head": {"kernel": np.zeros((32, 96), np.float32)}}
        )
    with pytest.raises(ValueError, match="embed.embedding"):
        save_pretrained(
            tmp_path / "out",
            config,
            {**params, "embed": {"embedding": params["embed"]["embedding"].T}},
        )
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------------
# Folders that must be refused, and what in them must not
# --------------------------------------------------------------------------------------------------------------------


def copy_golden(name, tmp_path):
    return Path(shutil.copytree(GOLDENS / name, tmp_path / name))


def change_tensors(folder, change):
    file = load_file(folder / "model.safetensors")
    change(file)
    save_file(
        {name: np.ascontiguousarray(values) for name, values in file.items()},
        folder / "model.safetensors",
    )


def change_bytes(path, change):
    path.write_bytes(change(path.read_bytes()))


def shard(folder):
    """Splits the folder's weights in two, with an index; returns the index."""
    file = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(file)
    weight_map = {name: f"model-{1 + (i % 2)}.safetensors" for i, name in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({name: file[name] for name in names if weight_map[name] == part}, folder / part)
    return {"metadata": {}, "weight_map": weight_map}


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def redirect(folder, to):
    index = shard(folder)
    index["weight_map"]["model.norm.weight"] = to
    write_index(folder, index)


def index_without_map(folder):
    write_index(folder, {**shard(folder), "weight_map": []})


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder):
    write_index(folder, shard(folder))
    (folder / "model-2.safetensors").unlink()


def tensor_in_two_shards(folder):
    write_index(folder, shard(folder))
    shutil.copyfile(folder / "model-1.safetensors", folder / "model-2.safetensors")


def outside(folder, to):
    """An index to a file that exists, outside the folder."""
    shutil.copyfile(folder / "model.safetensors", folder.parent / "outside.safetensors")
    redirect(folder, to)


def quantized(tensors):
    """As MLX does it: eight weights of 4 bits in a word, and a scale for every group of them."""
    name = "model.embed_tokens.weight"
    tensors[name] = np.zeros((tensors[name].shape[0], tensors[name].shape[1] // 8), np.uint32)
    tensors["model.embed_tokens.scales"] = np.ones((tensors[name].shape[0], 1), np.float16)


def misshapen(file):
    file["model.layers.1.mlp.up_proj.weight"] = file["model.layers.1.mlp.up_proj.weight"].T


def poisoned(value):
    def change(file):
        file["model.layers.1.self_attn.o_proj.weight"][3, 5] = value

    return change


def weights(path):
    return path / "model.safetensors"


NORM = "model.norm.weight"
BAD_FOLDERS = {
    "no-folder": (lambda f: shutil.rmtree(f), ["no such folder"]),
    "a-file": (a_file, ["no such folder"]),
    "no-config": (lambda f: (f / "config.json").unlink(), ["config.json: cannot read"]),
    "config-cut": (
        lambda f: change_bytes(f / "config.json", lambda b: b[:100]),
        ["config.json: no valid JSON"],
    ),
    "config-binary": (
        lambda f: change_bytes(f / "config.json", lambda b: b"\xff\x00\xfe"),
        ["config.json: no valid JSON"],
    ),
    "config-list": (
        lambda f: change_bytes(f / "config.json", lambda b: b"[]"),
        ["config.json: expected a JSON object"],
    ),
    "config-deep": (
        lambda f: change_bytes(f / "config.json", lambda b: b"[" * 200_000),
        ["config.json: no valid JSON"],
    ),
    "config-twice": (
        lambda f: change_bytes(
            f / "config.json", lambda b: b.replace(b"{", b'{"vocab_size": 7,', 1)
        ),
        ["config.json", "occurs twice"],
    ),
    "remote-code": (
        lambda f: change_bytes(
            f / "config.json",
            lambda b: b.replace(b"{", b'{"auto_map": {"AutoModel": "evil.M"},', 1),
        ),
        ["config.json: auto_map"],
    ),
    "no-weights": (no_weights, ["no model.safetensors"]),
    "only-pickle": (only_pickle, ["pickled", "convert"]),
    "missing-shard": (missing_shard, ["index.json", "model-2.safetensors", "missing"]),
    "tensor-in-two-shards": (
        tensor_in_two_shards,
        ["model-2.safetensors", "also in model-1.safetensors"],
    ),
    "shard-above": (
        lambda f: outside(f, "../outside.safetensors"),
        ["index.json", NORM, "../outside.safetensors"],
    ),
    "shard-absolute": (
        lambda f: outside(f, str(f.parent / "outside.safetensors")),
        ["index.json", NORM, "outside.safetensors"],
    ),
    "shard-below": (
        lambda f: redirect(f, "sub/model-1.safetensors"),
        ["index.json", NORM, "sub/model-1.safetensors"],
    ),
    "shard-number": (lambda f: redirect(f, 3), ["index.json", NORM]),
    "shard-pickle": (
        lambda f: redirect(f, "pytorch_model.bin"),
        ["index.json", NORM, "pytorch_model.bin"],
    ),
    "shard-newline": (lambda f: redirect(f, "a.safetensors\n"), ["index.json", NORM]),
    "index-without-map": (index_without_map, ["index.json: weight_map"]),
    "empty-file": (
        lambda f: change_bytes(weights(f), lambda b: b""),
        ["model.safetensors: truncated or corrupt"],
    ),
    "truncated": (
        lambda f: change_bytes(weights(f), lambda b: b[:-100]),
        ["model.safetensors: truncated or corrupt"],
    ),
    "truncated-header": (
        lambda f: change_bytes(weights(f), lambda b: b[:300]),
        ["model.safetensors: truncated or corrupt"],
    ),
    "corrupt-header": (
        lambda f: change_bytes(weights(f), lambda b: b[:8] + b"#" + b[9:]),
        ["model.safetensors: truncated or corrupt"],
    ),
    "huge-header": (
        lambda f: change_bytes(weights(f), lambda b: b"\xff" * 8 + b[8:]),
        ["model.safetensors: truncated or corrupt"],
    ),
    "git-lfs-pointer": (
        lambda f: change_bytes(
            weights(f), lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        ["model.safetensors: truncated or corrupt"],
    ),
    "missing-tensor": (
        lambda f: change_tensors(f, lambda t: t.pop(NORM)),
        [f"{NORM}: tensor missing", "(32,)"],
    ),
    "missing-head": (
        lambda f: change_tensors(f, lambda t: t.pop("lm_head.weight")),
        ["lm_head.weight: tensor missing", "(96, 32)"],
    ),
    "extra-tensor": (
        lambda f: change_tensors(f, lambda t: t.update(score=t[NORM])),
        ["score: tensor has no place"],
    ),
    "extra-layer": (
        lambda f: change_tensors(
            f, lambda t: t.update({"model.layers.3.input_layernorm.weight": t[NORM]})
        ),
        ["model.layers.3.input_layernorm.weight: tensor has no place"],
    ),
    "quantized": (
        lambda f: change_tensors(f, quantized),
        ["model.embed_tokens.scales: quantized weights are not supported; use a bfloat16"],
    ),
    "misshapen": (
        lambda f: change_tensors(f, misshapen),
        ["model.layers.1.mlp.up_proj.weight", "(40, 32)", "(32, 40)"],
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
        [f"{NORM}: dtype I8", "BF16, F16, F32"],
    ),
    "nan": (
        lambda f: change_tensors(f, poisoned(np.nan)),
        ["model.layers.1.self_attn.o_proj.weight", "NaN or infinite"],
    ),
    "inf": (
        lambda f: change_tensors(f, poisoned(-np.inf)),
        ["model.layers.1.self_attn.o_proj.weight", "NaN or infinite"],
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folder_is_refused(name, tmp_path):
    spoil, parts = BAD_FOLDERS[name]
    folder = copy_golden("qwen2_untied", tmp_path)
    spoil(folder)
    assert_refused(lambda: load_pretrained(folder), str(folder), *parts)


def test_sharded_folder_loads(tmp_path):
    """The good twin of the bad indices above."""
    folder = copy_golden("qwen2_untied", tmp_path)
    write_index(folder, shard(folder))
    assert_same_params(load_pretrained(folder)[1], load_pretrained(GOLDENS / "qwen2_untied")[1])


@pytest.mark.parametrize(
    "missing", [["config.json", "model.safetensors"], ["config.json"], ["model.safetensors"]]
)
def test_an_adapter_is_no_model(tmp_path, missing):
    folder = copy_golden("qwen2_tied", tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    load_pretrained(folder)  # a whole model that was trained with one
    for name in missing:
        (folder / name).unlink()
    assert_refused(
        lambda: load_pretrained(folder),
        f"{folder}: is a PEFT adapter, not a whole model; merge it into its base model first",
    )


def test_tied_head_is_ignored_if_equal_and_refused_if_not(tmp_path):
    folder = copy_golden("qwen2_tied", tmp_path)
    change_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    assert_same_params(load_pretrained(folder)[1], load_pretrained(GOLDENS / "qwen2_tied")[1])
    change_tensors(folder, lambda t: t["lm_head.weight"].__setitem__((2, 3), 1.0))
    assert_refused(lambda: load_pretrained(folder), "lm_head.weight", "tie_word_embeddings")
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T}))
    assert_refused(lambda: load_pretrained(folder), "lm_head.weight", "(96, 32)", "(32, 96)")


def test_stored_rotary_frequencies_are_ignored(tmp_path):
    folder = copy_golden("llama_tied", tmp_path)
    frequencies = np.ones(4, np.float32)
    change_tensors(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies})
    )
    assert_same_params(load_pretrained(folder)[1], load_pretrained(GOLDENS / "llama_tied")[1])
