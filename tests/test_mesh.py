"""Where arrays lie: meshes, the partition of every parameter, arrays put on devices and fetched
back.
"""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from refusals import refusal

from dapo_jax.config import LoraConfig, MeshSection, OptimSection
from dapo_jax.dapo.update import init_state, make_optimizer
from dapo_jax.model.decoder import abstract_params, apply
from dapo_jax.model.quantization import quantize_layer
from dapo_jax.runtime import mesh as runtime_mesh
from dapo_jax.runtime import multihost
from dapo_jax.runtime.mesh import (
    PARTITION_RULES,
    is_published_unchanged,
    make_mesh,
    params_sharding,
    partition_of,
    publisher,
    put,
    put_rows,
    rollout_sharding,
    row_shards,
    state_sharding,
)

CUBE = MeshSection(2, 2, 2)


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# --------------------------------------------------------------------------------------------------------------------
# Meshes
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((2, 1, -1), (2, 1, 4)),
        ((8, 1, 1), (8, 1, 1)),
    ],
)
def test_a_mesh_covers_all_devices(sizes, shape):
    mesh = make_mesh(MeshSection(*sizes))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert row_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize("sizes", [(2, 2, 1), (3, -1, 1), (16, -1, 1), (1, 16, 1)])
def test_a_mesh_that_does_not_cover_the_devices_is_refused(sizes):
    with refusal(f"mesh: data {sizes[0]} x ...8 devices"):
        make_mesh(MeshSection(*sizes))


def test_a_mesh_over_some_devices():
    assert make_mesh(MeshSection(1, -1, 1), jax.devices()[:2]).shape["fsdp"] == 2


def chip(slice_index, i, platform="tpu"):
    """A chip as `mesh_utils` sees it: its slice, and its place in a slice of 2 x 2."""
    where = {
        "id": 10 * slice_index + i,
        "coords": (i % 2, i // 2, 0),
        "slice_index": slice_index,
        "process_index": slice_index,
    }
    return types.SimpleNamespace(platform=platform, device_kind="TPU v5e", core_on_chip=0, **where)


@pytest.mark.parametrize(
    "sizes, slices",
    [
        ((2, 2, 2), 2),
        ((-1, 4, 1), 2),
        ((2, 1, -1), 2),
        ((3, 4, 1), 3),
        ((6, 1, 2), 3),
        ((4, 2, 1), 2),
    ],
)
def test_only_data_goes_over_slices(monkeypatch, sizes, slices):
    devices = [chip(n, i) for i in range(4) for n in range(slices)]  # not in order
    monkeypatch.setattr(runtime_mesh, "Mesh", lambda laid, axes, axis_types: laid)
    laid = make_mesh(MeshSection(*sizes), devices)
    assert len({d.id for d in laid.flat}) == 4 * slices
    assert all(asked in (-1, size) for asked, size in zip(sizes, laid.shape, strict=True))
    for (data, _, _), device in np.ndenumerate(laid):
        assert device.slice_index == data * slices // laid.shape[0]


@pytest.mark.parametrize("sizes", [(1, -1, 1), (1, 4, 2), (3, 4, 1)])
def test_a_mesh_whose_data_axis_slices_do_not_divide_is_refused(sizes):
    slices = 2
    devices = [chip(n, i) for n in range(slices) for i in range(4 if sizes[0] == 1 else 6)]
    with refusal(f"mesh.data: {sizes[0]} ...2 slices"):
        make_mesh(MeshSection(*sizes), devices)


def test_devices_of_other_kinds_have_no_slices():
    """A GPU's slice_index is its host or rack: its mesh is laid over all of them."""
    assert runtime_mesh.slice_count([chip(n, i, "gpu") for n in range(2) for i in range(4)]) == 1
    assert runtime_mesh.slice_count(jax.devices()) == 1
    assert (
        runtime_mesh.slice_count([types.SimpleNamespace(platform="tpu")] * 4) == 1
    )  # of a topology of one slice


# --------------------------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_its_partition(family, tied):
    """Matrices are split over fsdp and tensor, each once; vectors of norms are whole, biases follow
    their heads.
    """
    shapes = by_path(abstract_params(tiny.model(family, tie_embeddings=tied)))
    specs = {
        path: s.spec
        for path, s in by_path(
            params_sharding(
                abstract_params(tiny.model(family, tie_embeddings=tied)), make_mesh(CUBE)
            )
        ).items()
    }
    assert specs.keys() == shapes.keys()
    for path, spec in specs.items():
        axes = sorted(axis for axis in spec if axis)
        kind = "router" if "router" in path else path.split("/")[-1]
        assert (
            axes
            == {
                "kernel": ["fsdp", "tensor"],
                "router": ["fsdp"],
                "embedding": ["fsdp", "tensor"],
                "bias": ["tensor"],
                "scale": [],
            }[kind]
        ), path
        assert len(spec) == len(shapes[path].shape)
        assert not path.startswith("layers/") or spec[0] is None  # layers are scanned, never split


def test_partitions_of_a_block_alternate_between_columns_and_rows():
    """What one matmul splits over tensor, the next one sums over: one reduction for attention and
    one for the MLP.
    """
    spec = {
        path: s.spec
        for path, s in by_path(
            params_sharding(abstract_params(tiny.model(tie_embeddings=False)), make_mesh(CUBE))
        ).items()
    }
    assert (
        spec["layers/attn/q/kernel"]
        == spec["layers/attn/k/kernel"]
        == P(None, "fsdp", "tensor", None)
    )
    assert spec["layers/attn/o/kernel"] == P(None, "tensor", None, "fsdp")
    assert spec["layers/mlp/gate/kernel"] == P(None, "fsdp", "tensor") and spec[
        "layers/mlp/down/kernel"
    ] == P(None, "tensor", "fsdp")
    assert spec["embed/embedding"] == P("tensor", "fsdp") and spec["head/kernel"] == P(
        "fsdp", "tensor"
    )


def test_an_axis_that_does_not_divide_stays_whole():
    config = tiny.model("qwen2", kv_heads=1, vocab_size=41)
    spec = {
        path: s.spec
        for path, s in by_path(params_sharding(abstract_params(config), make_mesh(CUBE))).items()
    }
    assert spec["layers/attn/k/kernel"] == P(None, "fsdp", None, None) and spec[
        "layers/attn/k/bias"
    ] == P(None, None, None)
    assert spec["layers/attn/q/kernel"] == P(None, "fsdp", "tensor", None)
    assert spec["embed/embedding"] == P(None, "fsdp")


def test_every_rule_is_used_by_some_family():
    mesh, used = make_mesh(CUBE), set()
    for family in ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"):
        params = abstract_params(tiny.model(family, tie_embeddings=False, lora=LoraConfig(rank=2)))
        quantized = jax.eval_shape(quantize_layer, params["layers"])
        leaves = *by_path(params).items(), *by_path({"layers": quantized}).items()
        for path, leaf in leaves:
            matching = [
                rule for rule in PARTITION_RULES if partition_matches(rule, path, leaf.shape, mesh)
            ]
            assert len(matching) == 1, path
            used.add(matching[0][0])
    assert used == {pattern for pattern, _ in PARTITION_RULES}


def partition_matches(rule, path, shape, mesh):
    return re.fullmatch(rule[0], path) is not None and len(partition_of(path, shape, mesh)) == len(
        shape
    )


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
    mesh, strange = make_mesh(CUBE), jax.ShapeDtypeStruct((2, 4), np.float32)
    params = abstract_params(tiny.model())
    unknown = {**params, "layers": {**params["layers"], "router": {"kernel": strange}}}
    with pytest.raises(ValueError, match=r"layers/router/kernel \(2, 4\) matches no rule"):
        params_sharding(unknown, mesh)
    with pytest.raises(ValueError, match="adapter/kernel"):
        state_sharding(
            jax.eval_shape(
                lambda p: init_state(p, make_optimizer(OptimSection())),
                {"adapter": {"kernel": strange}},
            ),
            mesh,
        )
    with pytest.raises(ValueError, match=r"final_norm/scale has shape \(2, 4\)"):
        params_sharding({"final_norm": {"scale": strange}}, mesh)


@pytest.mark.parametrize("tied", [True, False])
def test_state_sharding_lays_optimizer_moments_like_their_parameters(tied):
    mesh, optimizer = make_mesh(CUBE), make_optimizer(OptimSection())
    params = abstract_params(tiny.model("qwen2", tie_embeddings=tied))
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    found, own = state_sharding(state, mesh), params_sharding(params, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    moments = [part for part in found.opt_state if hasattr(part, "mu")]
    assert len(moments) == 1 and found.params == moments[0].mu == moments[0].nu == own
    assert found.updates.spec == moments[0].count.spec == P()
    made = jax.jit(lambda p: init_state(p, optimizer), out_shardings=found)(
        tiny.params(tiny.model("qwen2", tie_embeddings=tied))
    )
    for leaf, sharding in zip(jax.tree.leaves(made), jax.tree.leaves(found), strict=True):
        assert leaf.addressable_shards[0].data.shape == sharding.shard_shape(leaf.shape)


def test_rollout_weights_are_split_over_tensor_only():
    config = tiny.model(tie_embeddings=False)
    mesh, params = make_mesh(CUBE), tiny.params(config)
    trained = jax.tree.map(
        lambda p, s: put(np.asarray(p), s), params, params_sharding(params, mesh)
    )
    publish = publisher(abstract_params(config), mesh, "bfloat16")
    published = publish(trained)
    for path, leaf in by_path(published).items():
        axes = [axis for axis in leaf.sharding.spec if axis]
        assert axes == ([] if path.endswith("scale") else ["tensor"]), path
        assert leaf.dtype == (jnp.float32 if path.endswith("scale") else jnp.bfloat16)
        np.testing.assert_array_equal(leaf, np.asarray(by_path(params)[path]).astype(leaf.dtype))
    assert jax.tree.map(lambda p: p.sharding, published) == rollout_sharding(params, mesh)
    publish(trained)
    assert publish._cache_size() == 1


@pytest.mark.default("qwen3*")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "gemma3_text"])
def test_rollout_weights_compute_what_the_master_weights_do(family):
    """To the bit: the trainer casts kernels to bfloat16 for every use, and multiplies by the scales
    of norms in float32.
    """
    config = tiny.model(family, compute_dtype="bfloat16")
    params, tokens = tiny.params(config), np.arange(8, dtype=np.int32)[None]
    published = publisher(
        abstract_params(config), make_mesh(MeshSection(1, 1, 1), jax.devices()[:1]), "bfloat16"
    )(params)
    run = jax.jit(apply, static_argnums=1)
    np.testing.assert_array_equal(run(published, config, tokens), run(params, config, tokens))


# --------------------------------------------------------------------------------------------------------------------
# To devices and back
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        np.arange(48, dtype=np.int32).reshape(8, 6),
        np.arange(48).reshape(8, 6) % 2 == 0,
        np.float32(3.5),
    ],
    ids=["int", "bool", "scalar"],
)
def test_put_gives_every_device_its_part_and_fetch_brings_it_back(value):
    mesh = make_mesh(CUBE)
    array = put(
        np.asarray(value),
        NamedSharding(mesh, P(("data", "fsdp"), "tensor") if np.ndim(value) else P()),
    )
    assert array.dtype == value.dtype and len(array.addressable_shards) == 8
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(value)[shard.index])
    assert np.ndim(value) == 0 or array.addressable_shards[0].data.shape == (2, 3)
    back = multihost.fetch({"a": array})["a"]
    assert isinstance(back, np.ndarray) and back.dtype == value.dtype
    np.testing.assert_array_equal(back, value)


def test_put_rows_splits_one_axis_over_the_row_shards():
    mesh = make_mesh(CUBE)
    tree = {
        "a": np.arange(2 * 4 * 3).reshape(2, 4, 3).astype(np.int32),
        "b": np.ones((2, 4), np.float32),
    }
    placed = put_rows(tree, mesh, axis=1)
    assert placed["a"].addressable_shards[0].data.shape == (2, 1, 3) and placed[
        "b"
    ].addressable_shards[0].data.shape == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, multihost.fetch(placed), tree)
    assert put_rows(np.zeros((4, 2)), mesh, axis=0).addressable_shards[0].data.shape == (1, 2)


@pytest.mark.parametrize(
    "platforms, attached, libtpu, joins",
    [
        (None, ["/dev/accel0"], True, True),
        ("tpu,cpu", ["/dev/vfio/0"], True, True),
        (None, [], True, False),  # libtpu alone, as for planning
        (None, ["/dev/vfio/0"], False, False),  # chips of another kind
        ("cpu", ["/dev/accel0"], True, False),
    ],
)
def test_a_process_joins_the_others_where_tpu_chips_are_attached(
    monkeypatch, platforms, attached, libtpu, joins
):
    """Without arguments: the pod's metadata say who the others are."""
    calls = []
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(
        multihost.glob,
        "glob",
        lambda pattern: [name for name in attached if name.startswith(pattern.split("[")[0])],
    )
    monkeypatch.setattr(
        multihost.importlib.util,
        "find_spec",
        lambda name: object() if libtpu and name == "libtpu" else None,
    )
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append(args))
    monkeypatch.setattr(
        jax, "devices", lambda: [types.SimpleNamespace(platform="tpu" if joins else "cpu")]
    )
    multihost.initialize()
    assert calls == ([()] if joins else []) and multihost.is_main()


@pytest.mark.parametrize(
    "layout, dtype, same",
    [
        ((1, 1, 1), "float32", True),
        ((8, 1, 1), "float32", True),
        ((2, 1, 4), "float32", True),
        ((1, 8, 1), "float32", False),
    ]
    + [((8, 1, 1), "bfloat16", False)],
)
def test_weights_are_published_without_a_copy_where_layout_and_dtype_allow(layout, dtype, same):
    mesh = make_mesh(MeshSection(*layout), jax.devices()[: np.prod(layout)])
    assert is_published_unchanged(abstract_params(tiny.model()), mesh, dtype) == same
