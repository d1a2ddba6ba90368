"""Counts of work against numbers worked out by hand, and against the parameter tree."""

import dataclasses

import jax
import pytest
import tiny

from dapo_jax.config import ModelConfig, Windows
from dapo_jax.model import flops
from dapo_jax.model.decoder import abstract_params

SMALL = ModelConfig(
    "llama",
    vocab_size=10,
    model_dim=4,
    layers=3,
    heads=2,
    kv_heads=1,
    head_dim=2,
    ffn_dim=5,
    tie_embeddings=False,
)


def test_weights_by_hand():
    # q 4·4, k and v 4·2 each, o 4·4, three of the feed-forward 4·5: 48 + 60 a layer
    assert flops.layer_weights(SMALL) == 3 * 108
    assert flops.head_weights(SMALL) == 40 and flops.weights(SMALL) == 3 * 108 + 80
    assert flops.weights(dataclasses.replace(SMALL, tie_embeddings=True)) == 3 * 108 + 40


@pytest.mark.parametrize(
    "family, tied",
    [
        ("llama", False),
        ("qwen2", True),
        ("qwen3", True),
        ("qwen3_moe", True),
        ("gemma3_text", True),
    ],
)
def test_weights_are_the_matrices_of_the_parameter_tree(family, tied):
    config = tiny.model(family, tie_embeddings=tied)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    assert flops.weights(config) == sum(
        leaf.size for path, leaf in leaves if path[-1].key in ("kernel", "embedding")
    )


def test_a_published_size():
    """Qwen2.5-7B has 7,615,616,512 parameters, of them 333,312 in norms and biases."""
    sizes = {
        "vocab_size": 152064,
        "model_dim": 3584,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "head_dim": 128,
        "ffn_dim": 18944,
    }
    assert (
        flops.weights(ModelConfig("qwen2", **sizes, tie_embeddings=False))
        == 7_615_616_512 - 333_312
    )


def test_a_published_size_of_gemma():
    """Gemma 3 1B has 999,885,952 parameters, of them 134,272 in norms."""
    sizes = {
        "vocab_size": 262144,
        "model_dim": 1152,
        "layers": 26,
        "heads": 4,
        "kv_heads": 1,
        "head_dim": 256,
        "ffn_dim": 6912,
    }
    assert (
        flops.weights(ModelConfig("gemma3_text", **sizes, windows=Windows()))
        == 999_885_952 - 134_272
    )


def test_flops_by_hand():
    # 7 tokens through 324 weights; 5 pairs in 3 layers of 2 heads, 2·2 for the score and 2·2 for
    # the sum; 2 targets of 40 weights
    forward = 2 * 7 * 324 + 5 * 3 * 2 * 8 + 2 * 2 * 40
    assert flops.forward_flops(SMALL, tokens=7, pairs=5, targets=2) == forward
    assert flops.train_flops(SMALL, 7, 5, 2) == 3 * forward
    # 3 products more a pair in the attention kernels, 2·2 each; 4 x 5 weights of 3 layers not again
    kernels, down = 5 * 3 * 2 * 3 * 4, 3 * 4 * 5
    again = {"none": kernels, "dots": kernels}
    again["full"] = kernels + 2 * 7 * (324 - down) + 5 * 3 * 2 * 8
    for remat, expected in again.items():
        assert flops.recomputed_flops(dataclasses.replace(SMALL, remat=remat), 7, 5) == expected
    assert flops.visible_pairs(SMALL, 4) == 1 + 2 + 3 + 4 and flops.visible_keys(SMALL, 4) == 4


def test_windows_by_hand():
    """Three layers, the second sees everything: of 4 tokens in windows of 2 the first sees 1, the
    others 2.
    """
    windowed = dataclasses.replace(SMALL, family="gemma3_text", windows=Windows(2, 2))
    assert flops.visible_pairs(windowed, 4) == pytest.approx((2 * (1 + 2 + 2 + 2) + 10) / 3)
    assert flops.visible_pairs(windowed, 2) == 3 and flops.visible_keys(
        windowed, 4
    ) == pytest.approx((2 + 2 + 4) / 3)
    assert flops.visible_pairs(dataclasses.replace(windowed, windows=Windows(2, 4)), 4) == 7


def test_cache_bytes_by_hand():
    """Keys and values of 3 layers, one head of 2 numbers."""
    assert flops.cache_bytes(SMALL, int8=False) == 2 * 3 * 2 * 4
    assert (
        flops.cache_bytes(dataclasses.replace(SMALL, compute_dtype="bfloat16"), int8=False)
        == 2 * 3 * 2 * 2
    )
    assert flops.cache_bytes(SMALL, int8=True) == 2 * 3 * (2 + 4)
