"""The device mesh, and which axis of which array lies on which of its axes."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dapo_jax.config import MeshSection
from dapo_jax.types import Array, InputError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what rows of a batch and decode slots are split over

# Path of a parameter → its partition. Layers are stacked: their axis 0 is L. First match counts.
PARTITION_RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),  # [V, D]
    (r"head/kernel", P("fsdp", "tensor")),  # [D, V]
    (r"layers/attn/[qkv]/kernel", P(None, "fsdp", "tensor", None)),  # [L, D, heads, h]
    (r"layers/attn/[qkv]/bias", P(None, "tensor", None)),  # [L, heads, h]
    (r"layers/attn/o/kernel", P(None, "tensor", None, "fsdp")),  # [L, H, h, D]
    (r"layers/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),  # [L, D, F]
    (r"layers/mlp/down/kernel", P(None, "tensor", "fsdp")),  # [L, F, D]
    (r"layers/(attn/[qkv]|mlp/(gate|up))/adapter/a", P(None, "fsdp", None)),  # [L, D, r]
    (r"layers/attn/[qkv]/adapter/b", P(None, None, "tensor", None)),  # [L, r, heads, h]
    (r"layers/mlp/(gate|up)/adapter/b", P(None, None, "tensor")),  # [L, r, F]
    (r"layers/attn/o/adapter/a", P(None, "tensor", None, None)),  # [L, H, h, r]
    (r"layers/mlp/down/adapter/a", P(None, "tensor", None)),  # [L, F, r]
    (r"layers/(attn/o|mlp/down)/adapter/b", P(None, None, "fsdp")),  # [L, r, D]
    (r"layers/attn/[qk]_norm/scale", P(None, None)),  # [L, h]
    (r"layers/(attn|mlp)(_post)?_norm/scale", P(None, None)),  # [L, D]
    (r"final_norm/scale", P(None)),  # [D]
)


def make_mesh(section: MeshSection, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices. InputError if the axes do not multiply to their number.

    Of several TPU slices, `data` goes over them, and the other axes stay inside one: between slices
    lies the data centre network. InputError if the slices do not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [section.data, section.fsdp, section.tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices) or 0 in sizes:
        shape = " x ".join(
            f"{a} {s}"
            for a, s in zip(AXES, (section.data, section.fsdp, section.tensor), strict=True)
        )
        raise InputError(
            f"mesh: {shape} does not cover {len(devices)} devices; change the mesh section"
        )
    slices = slice_count(devices)
    if sizes[0] % slices:
        raise InputError(
            f"mesh.data: {sizes[0]} cannot go over {slices} slices, and fsdp and tensor stay inside one; "
            f"set mesh.data to {slices} or a multiple, mesh.fsdp and mesh.tensor to the devices of a slice ({len(devices) // slices})"
        )
    inside = [sizes[0] // slices, *sizes[1:]]
    # An axis may take part of a side of the torus: fsdp 32 x tensor 8 fits 16x16 chips in no other
    # way.
    if slices == 1:
        laid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:
        laid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * 3)


def slice_count(devices: Sequence[Any]) -> int:
    """How many TPU slices the devices belong to; 1 for devices of other kinds."""
    return (
        len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    )


def row_shards(mesh: Mesh) -> int:
    """How many pieces rows are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def partition_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The partition of one parameter. An axis that its mesh axis does not divide is left whole.

    Raises ValueError, naming the parameter, if no rule matches or the rule is of another rank.
    """
    for pattern, spec in PARTITION_RULES:
        if re.fullmatch(pattern, path):
            if len(spec) != len(shape):
                raise ValueError(
                    f"parameter {path} has shape {shape}; its partition rule {spec} is of another rank"
                )
            return P(
                *(
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(spec, shape, strict=True)
                )
            )
    raise ValueError(
        f"parameter {path} {shape} matches no rule of PARTITION_RULES in runtime/mesh.py; add one"
    )


def _join(path) -> str:
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def params_sharding(params: Mapping[str, Any], mesh: Mesh) -> Any:
    """A NamedSharding for every parameter (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_of(_join(path), leaf.shape, mesh)), params
    )


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Shardings of a TrainState: optimizer moments lie like the parameters they belong to, scalars
    everywhere.

    The moments' paths end like their parameters' paths, which is how they find their rule.
    """

    def place(path, leaf):
        if not leaf.shape:
            return NamedSharding(mesh, P())
        keys = _join(path).split("/")
        start = next(
            (i for i, key in enumerate(keys) if key in ("embed", "head", "layers", "final_norm")), 0
        )
        return NamedSharding(mesh, partition_of("/".join(keys[start:]), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def rollout_sharding(params: Mapping[str, Any], mesh: Mesh) -> Any:
    """Where weights lie for rollouts: split over `tensor` only, whole on every row shard."""

    def place(path, leaf):
        spec = partition_of(_join(path), leaf.shape, mesh)
        return NamedSharding(mesh, P(*("tensor" if axis == "tensor" else None for axis in spec)))

    return jax.tree_util.tree_map_with_path(place, params)


def rollout_dtype(path: Any, dtype: str) -> str:
    """Dtype of a parameter in rollouts: what it is cast to for every use anyway.

    Norms compute in float32, in sampler and trainer alike.
    """
    return "float32" if path[-1].key == "scale" else dtype


def publisher(
    params: Mapping[str, Any],
    mesh: Mesh,
    dtype: str,
    merge_layer: Callable[[Any], Any] = lambda layer: layer,
) -> Callable[[Any], Any]:
    """A jitted function from master weights to rollout weights: cast (`rollout_dtype`), and
    gathered from the fsdp shards once a step.

    params: those of rollouts (arrays or shapes); `merge_layer` makes a layer of theirs of a trained
    one. A layer at a time: the compiler gathers into other memory than the result's, which for all
    layers would take as much again.
    """
    shardings = rollout_sharding(params, mesh)

    def place(path: Any, leaf: Array, sharding: NamedSharding) -> Array:
        spec = sharding.spec[len(sharding.spec) - leaf.ndim :]  # without the axis of the layers
        return jax.lax.with_sharding_constraint(
            leaf.astype(rollout_dtype(path, dtype)), NamedSharding(mesh, P(*spec))
        )

    def placed(part: Any, name: str) -> Any:
        return jax.tree_util.tree_map_with_path(place, part, shardings[name])

    def publish(params: Any) -> Any:
        layers = jax.lax.map(lambda layer: placed(merge_layer(layer), "layers"), params["layers"])
        return {
            **{name: placed(part, name) for name, part in params.items() if name != "layers"},
            "layers": layers,
        }

    return jax.jit(publish, out_shardings=shardings)


def published_as_it_is(params: Mapping[str, Any], mesh: Mesh, dtype: str) -> bool:
    """Whether rollout weights are the master weights: the same dtype, on the same devices.

    Publishing then copies nothing.
    """

    def same(path: Any, leaf: Any, master: NamedSharding, rollout: NamedSharding) -> bool:
        return leaf.dtype == rollout_dtype(path, dtype) and master.is_equivalent_to(
            rollout, len(leaf.shape)
        )

    places = params_sharding(params, mesh), rollout_sharding(params, mesh)
    return all(jax.tree.leaves(jax.tree_util.tree_map_with_path(same, params, *places)))


def put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from a numpy array that every process holds alike; each gives only its own
    shards to its devices.
    """
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put_rows(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Every numpy array of a tree, split over the mesh's row axes along `axis`."""
    sharding = NamedSharding(mesh, P(*(None,) * axis, ROWS))
    return jax.tree.map(lambda a: put(np.asarray(a), sharding), tree)
