"""The device mesh, and the partition of every array over its axes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_map_with_path

from dapo_jax.config import MeshSection
from dapo_jax.types import InputError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what rows of a batch and decode slots are split over

# Path of a parameter → its partition. Axis 0 of layers is L. The first match wins.
PARTITION_RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),  # [V, D]
    (r"head/kernel", P("fsdp", "tensor")),  # [D, V]
    (r"layers/attn/[qkv]/kernel(/values)?", P(None, "fsdp", "tensor", None)),  # [L, D, heads, h]
    (r"layers/attn/[qkv]/(bias|kernel/scale)", P(None, "tensor", None)),  # [L, heads, h]
    (r"layers/attn/o/kernel(/values)?", P(None, "tensor", None, "fsdp")),  # [L, H, h, D]
    (r"layers/mlp/(gate|up)/kernel(/values)?", P(None, "fsdp", "tensor")),  # [L, D, F]
    (r"layers/mlp/down/kernel(/values)?", P(None, "tensor", "fsdp")),  # [L, F, D]
    (r"layers/mlp/(gate|up)/kernel/scale", P(None, "tensor")),  # [L, F]
    (r"layers/(attn/o|mlp/down)/kernel/scale", P(None, None)),  # [L, D]
    (r"layers/experts/router/kernel", P(None, "fsdp", None)),  # [L, D, E]
    (r"layers/experts/(gate|up)/kernel(/values)?", P(None, "tensor", "fsdp", None)),  # [L, E, D, F]
    (r"layers/experts/down/kernel(/values)?", P(None, "tensor", None, "fsdp")),  # [L, E, F, D]
    (r"layers/experts/\w+/kernel/scale", P(None, "tensor", None)),  # [L, E, F or D]
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
_TOPS = ("embed", "head", "layers", "final_norm")


def make_mesh(section: MeshSection, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices. Raises InputError if the axes do not multiply to their number.

    Over several TPU slices only `data` is split, as the data centre network connects them;
    InputError if the slices do not divide it.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [section.data, section.fsdp, section.tensor]
    shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh: {shape} does not cover {len(devices)} devices; change the mesh section"
        )
    slices = slice_count(devices)
    if sizes[0] % slices:
        raise InputError(
            f"mesh.data: {sizes[0]} cannot be split over {slices} slices, and fsdp and tensor stay "
            f"inside one; set mesh.data to {slices} or a multiple, mesh.fsdp and mesh.tensor to "
            f"the devices of a slice ({len(devices) // slices})"
        )
    inside = [sizes[0] // slices, *sizes[1:]]
    # Splitting physical axes: 16x16 chips cannot hold fsdp 32 x tensor 8 otherwise.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def slice_count(devices: Sequence[Any]) -> int:
    """How many TPU slices the devices belong to; 1 for devices of other kinds."""
    tpu = devices[0].platform == "tpu"
    return len({getattr(d, "slice_index", 0) for d in devices}) if tpu else 1


def row_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def partition_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The partition of one parameter. An axis that its mesh axis does not divide is not split.

    Raises ValueError, naming the parameter, if no rule of its rank matches.
    """
    spec = next((rule for pattern, rule in PARTITION_RULES if re.fullmatch(pattern, path)), None)
    if spec is None:
        table = "PARTITION_RULES in runtime/mesh.py"
        raise ValueError(f"parameter {path} {shape} matches no rule of {table}; add one")
    if len(spec) != len(shape):
        rank = f"its partition rule {spec} is of another rank"
        raise ValueError(f"parameter {path} has shape {shape}; {rank}")
    axes = zip(spec, shape, strict=True)
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in axes))


def _place(mesh: Mesh, path: Any, leaf: Any, kept: tuple[str, ...] = AXES) -> NamedSharding:
    """The sharding of a parameter, of the axes in `kept`."""
    spec = partition_of(keystr(path, simple=True, separator="/"), leaf.shape, mesh)
    return NamedSharding(mesh, P(*(axis if axis in kept else None for axis in spec)))


def params_sharding(params: Mapping[str, Any], mesh: Mesh) -> Any:
    return tree_map_with_path(lambda path, leaf: _place(mesh, path, leaf), params)


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Shardings of a TrainState: moments are split like their parameters, scalars replicated."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = [keystr((key,), simple=True) for key in path]  # ends like the parameter's path
        tops = (i for i, name in enumerate(names) if name in _TOPS)
        return _place(mesh, path[next(tops, 0) :], leaf) if leaf.shape else NamedSharding(mesh, P())

    return tree_map_with_path(place, state)


def gather_layer(layer: Mapping[str, Any], mesh: Mesh, dtype: str) -> Any:
    """One layer's weights, without axis L, in compute dtype and gathered over `fsdp`; gradients are
    reduce-scattered.

    Without this XLA on TPU splits each product with such a weight into one loop step a shard
    (a windowed einsum), which adds to the whole result in HBM every time.
    """

    def gather(path: Any, leaf: Array) -> Array:
        name = "layers/" + keystr(path, simple=True, separator="/")
        split = partition_of(name, (1, *leaf.shape), mesh)[1:]
        if "fsdp" not in split or mesh.shape["fsdp"] == 1 or leaf.dtype == np.int8:
            return leaf  # 8-bit weights are of rollouts, gathered
        own = NamedSharding(mesh, P(*split))
        whole = NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in split)))
        pin = jax.lax.with_sharding_constraint

        @jax.custom_vjp
        def gathered(weight: Array) -> Array:
            if weight.dtype != dtype:  # cast first: half the bytes to gather
                weight = pin(weight.astype(dtype), own)
            return pin(weight, whole)

        def forward(weight: Array) -> tuple[Array, None]:
            return gathered(weight), None

        def backward(_: None, gradient: Array) -> tuple[Array]:
            return (pin(pin(gradient, whole), own).astype(leaf.dtype),)

        gathered.defvjp(forward, backward)
        return gathered(leaf)

    return tree_map_with_path(gather, layer)


def rollout_sharding(params: Mapping[str, Any], mesh: Mesh) -> Any:
    """Shardings of rollout weights: split over `tensor` only, whole on every row shard."""
    return tree_map_with_path(lambda path, leaf: _place(mesh, path, leaf, ("tensor",)), params)


def rollout_dtype(path: Any, dtype: str) -> str:
    """Dtype of a parameter in rollouts; norms and scales compute in float32."""
    name = keystr(path[-1:], simple=True)
    return {"scale": "float32", "values": "int8"}.get(name, dtype)


def publisher(
    params: Mapping[str, Any],
    mesh: Mesh,
    dtype: str,
    merge_layer: Callable[[Any], Any] = lambda layer: layer,
) -> Callable[[Any], Any]:
    """A jitted function from master weights to rollout weights: cast, and gathered from the fsdp
    shards once per step.

    params: of rollouts (arrays or shapes). merge_layer: from a trained layer to one of rollouts.
    Works a layer at a time: for all layers at once XLA's buffer would double the memory.
    """
    shardings = rollout_sharding(params, mesh)

    def place(path: Any, leaf: Array, sharding: NamedSharding) -> Array:
        spec = sharding.spec[len(sharding.spec) - leaf.ndim :]  # without the axis of the layers
        cast = leaf.astype(rollout_dtype(path, dtype))
        return jax.lax.with_sharding_constraint(cast, NamedSharding(mesh, P(*spec)))

    def publish(params: Any) -> Any:
        whole = {name: part for name, part in params.items() if name != "layers"}
        layers = jax.lax.map(
            lambda layer: tree_map_with_path(place, merge_layer(layer), shardings["layers"]),
            params["layers"],
        )
        rest = {name: shardings[name] for name in whole}
        return {**tree_map_with_path(place, whole, rest), "layers": layers}

    return jax.jit(publish, out_shardings=shardings)


def is_published_unchanged(params: Mapping[str, Any], mesh: Mesh, dtype: str) -> bool:
    """Whether rollout weights are the master weights, by dtype and devices."""

    def same(path: Any, leaf: Any, master: NamedSharding, rollout: NamedSharding) -> bool:
        alike = master.is_equivalent_to(rollout, len(leaf.shape))
        return alike and leaf.dtype == rollout_dtype(path, dtype)

    places = params_sharding(params, mesh), rollout_sharding(params, mesh)
    return all(jax.tree.leaves(tree_map_with_path(same, params, *places)))


def put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from a numpy array that every process has; each sends its own shards."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put_rows(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Every numpy array of a tree, split over the mesh's row axes along `axis`."""
    sharding = NamedSharding(mesh, P(*(None,) * axis, ROWS))
    return jax.tree.map(lambda a: put(np.asarray(a), sharding), tree)
