"""8-bit rollout weights: the kernels that they stand for, where they are, and who gets exact ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from paging import pack
from refusals import refusal
from runs import run_train, steady

from dapo_jax.config import ConfigError, LoraConfig, MeshSection, load_config
from dapo_jax.model.decoder import abstract_params, decode_step, hidden_states, make_cache
from dapo_jax.model.lora import merge
from dapo_jax.model.quantization import Quantized, product, quantize, quantize_layer
from dapo_jax.runtime.mesh import make_mesh, params_sharding
from dapo_jax.training.programs import train_programs

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")


def whole(params):
    """The kernels that 8-bit ones stand for."""

    def each(path, leaf):
        if not isinstance(leaf, Quantized):
            return leaf
        lost = leaf.values.ndim - leaf.scale.ndim  # axes that a product sums over
        first = 2 if "experts" in jax.tree_util.keystr(path) else 1  # after L, or L and E
        return leaf.values * np.expand_dims(leaf.scale, tuple(range(first, first + lost)))

    is_kernel = {"is_leaf": lambda x: isinstance(x, Quantized)}
    return jax.tree_util.tree_map_with_path(each, params, **is_kernel)


def shrunk(params):
    return {**params, "layers": quantize_layer(params["layers"])}


def test_a_kernel_by_hand():
    """A scale for each output channel: the largest of a column is 127."""
    kernel = jnp.asarray([[1.0, -0.5], [-2.0, 0.1], [0.5, 0.0]])
    found = quantize_layer({"mlp": {"up": {"kernel": kernel}}})["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(found.scale, [2 / 127, 0.5 / 127], rtol=1e-6)
    # 1 / (2/127) = 63.5 to even; 0.1 / (0.5/127) = 25.4
    np.testing.assert_array_equal(found.values, [[64, -127], [-127, 25], [32, 0]])


def test_kernels_of_experts_by_hand():
    """A scale for each expert and output channel; routers stay."""
    kernel = jnp.asarray([[[1.0, -0.5], [-2.0, 0.1]], [[0.5, 0.0], [0.1, 3.0]]])  # [E, D, F]
    router = jnp.ones((2, 2))
    layer = {"experts": {"gate": {"kernel": kernel}, "router": {"kernel": router}}}
    found = quantize_layer(layer)["experts"]
    assert found["router"]["kernel"] is router
    scale = np.divide([[2, 0.5], [0.5, 3]], 127)
    np.testing.assert_allclose(found["gate"]["kernel"].scale, scale, rtol=1e-6)
    expected = [[[64, -127], [-127, 25]], [[127, 0], [25, 127]]]
    np.testing.assert_array_equal(found["gate"]["kernel"].values, expected)


@pytest.mark.parametrize(
    ("spec", "shape", "axes"),
    [("td,dnh->tnh", (6, 3, 4), (-3,)), ("tnh,nhd->td", (3, 4, 5), (-3, -2))],
)
def test_a_product_is_that_of_the_kernel_it_stands_for(spec, shape, axes):
    rng = np.random.default_rng(0)
    kernel = quantize(jnp.asarray(rng.normal(size=shape), jnp.float32), axes)
    x = rng.normal(size=(7, *shape[: len(axes)]))
    exact = np.einsum(spec, x, np.float64(kernel.values) * np.float64(kernel.scale))
    np.testing.assert_allclose(product(spec, jnp.float32(x), kernel), exact, rtol=0, atol=1e-6)
    rounded = product(spec, jnp.bfloat16(x), kernel)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(rounded), exact, rtol=0, atol=0.05)


@pytest.mark.default("llama")
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decoding_compute_with_the_kernels_that_they_stand_for(family):
    config = tiny.model(family)
    params = shrunk(tiny.params(config))
    kept = jax.tree.leaves({k: v for k, v in params.items() if k != "layers"})
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}
    tokens = np.random.default_rng(0).integers(0, 40, (3, 9)).astype(np.int32)
    run = jax.jit(hidden_states, static_argnums=1)
    rows, kv = run(params, config, tokens)
    exact, _ = run(whole(params), config, tokens)
    np.testing.assert_allclose(rows, exact, rtol=0, atol=2e-5)
    cache = make_cache(*(jnp.swapaxes(x, 2, 3)[:, :, :, :8] for x in kv[:2]), int8=False)
    seen = pack(cache, np.full(3, 8))
    hidden, *_ = jax.jit(decode_step, static_argnums=1)(params, config, tokens[:, 8], seen)
    np.testing.assert_allclose(hidden, exact[:, 8], rtol=0, atol=2e-5)


@pytest.mark.default("sizes1-lora1")
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, targets=("q", "o", "down"))])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_published_weights_are_quantized_from_merged_masters_and_split_over_tensor(sizes, lora):
    config = tiny.model(compute_dtype="bfloat16", lora=lora)
    mesh = make_mesh(MeshSection(*sizes), jax.devices()[: np.prod(sizes)])
    made = load_config("configs/tiny_cpu.yaml")
    programs = train_programs(config, mesh, made.dapo, made.optim, 1.0, True)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), abstract_params(config)
    )
    params = jax.device_put(params, params_sharding(params, mesh))
    found, exact = programs.publish(params), programs.publish_exact(params)
    expected = jax.jit(lambda p: shrunk(merge(p, lora)))(jax.device_get(params))
    for name in ("q", "k", "v", "o"):
        a, b = (x["layers"]["attn"][name]["kernel"] for x in (found, expected))
        assert a.values.dtype == jnp.int8 and a.scale.dtype == jnp.float32
        assert np.abs(np.int32(a.values) - np.int32(b.values)).max() <= (1 if lora else 0)
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-5)
        for leaf in a:
            used = {axis for axis in leaf.sharding.spec if axis}
            assert used <= {"tensor"}, "whole on every row shard"
        split = mesh.shape["tensor"]
        local = a.values.addressable_shards[0].data.size
        assert local * split == a.values.size
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {
        jnp.dtype("bfloat16"),
        jnp.dtype("float32"),  # norms
    }


@pytest.mark.slow
def test_published_experts_are_split_over_tensor_with_their_scales():
    config = tiny.model("qwen3_moe")
    mesh = make_mesh(MeshSection(1, 2, 2), jax.devices()[:4])
    made = load_config("configs/tiny_cpu.yaml")
    programs = train_programs(config, mesh, made.dapo, made.optim, 1.0, True)
    params = tiny.params(config)
    found = programs.publish(jax.device_put(params, params_sharding(params, mesh)))
    expected = jax.jit(shrunk)(params)["layers"]["experts"]
    for name in ("gate", "up", "down"):
        a, b = found["layers"]["experts"][name]["kernel"], expected[name]["kernel"]
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-6)
        for leaf in a:
            assert {axis for axis in leaf.sharding.spec if axis} == {"tensor"}
            assert leaf.addressable_shards[0].data.shape[1] == config.experts.count // 2
    tokens = np.random.default_rng(0).integers(0, 40, (4, 9)).astype(np.int32)
    run = jax.jit(hidden_states, static_argnums=1, static_argnames="mesh")
    rows, _ = run(found, config, tokens, mesh=mesh)
    exact, _ = run(whole(shrunk(params)), config, tokens)
    np.testing.assert_allclose(rows, exact, rtol=0, atol=2e-5)


def test_without_a_correction_it_is_refused(tmp_path):
    with refusal("...rollout.weights: int8 ...dapo.importance_cap", ConfigError):
        load_config("configs/tiny_cpu.yaml", ["rollout.weights=int8"])
    for correction in ("importance_cap=2", "token_mask=[0.5,2]", "sequence_mask=[0.9,1.1]"):
        given = ["rollout.weights=int8", f"dapo.{correction}", "dapo.old_logprobs=recompute"]
        assert load_config("configs/tiny_cpu.yaml", given).rollout.weights == "int8"


@pytest.mark.slow
def test_a_run_samples_from_8_bit_weights_and_evaluates_exact_ones(config, tmp_path):
    """It resumes with the same numbers, too."""
    shared = ("dapo.importance_cap=2", "train.steps=2", "train.save_every=1", "eval.every=1")
    assert run_train(config, tmp_path / "compute", *shared) == 0
    assert run_train(config, tmp_path / "int8", *shared, "rollout.weights=int8") == 0
    compute, int8 = (steady(tmp_path / name) for name in ("compute", "int8"))
    assert compute[0] == int8[0] and any(key.startswith("eval/") for key in int8[0])
    key = "policy/sampler_gap_mean"
    assert compute[1][key] < 1e-5 < 1e-4 < int8[1][key] < 0.1
    stopped = tmp_path / "stopped"
    for steps in (1, 2):
        options = (*shared, "rollout.weights=int8", f"train.steps={steps}")
        assert run_train(config, stopped, *options) == 0
    assert steady(stopped) == int8
