"""The jitted programs of training, and their abstract inputs: `plan` compiles without devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dapo_jax.config import DapoSection, ModelConfig, OptimSection
from dapo_jax.dapo.loss import LossFn, batch_logprobs, cross_entropy_loss_fn, loss_fn
from dapo_jax.dapo.update import init_state, make_optimizer, map_microbatches, update_step
from dapo_jax.model.decoder import abstract_params
from dapo_jax.model.lora import merge_layer
from dapo_jax.model.quantization import quantize_layer
from dapo_jax.runtime.chips import loss_chunk
from dapo_jax.runtime.mesh import ROWS, publisher, state_sharding
from dapo_jax.training.setup import BatchShape, on_devices
from dapo_jax.types import Params, TrainBatch, TrainState


class StatePrograms(NamedTuple):
    """Initialization and update of a TrainState for one loss."""

    state: Any  # a TrainState of shapes and shardings
    init_optimizer: Callable[[Params], TrainState]  # donates the parameters
    # (state, batch [M, N, T], learning rate) → (state, metric sums); donates the state
    update: Callable[..., Any]


class TrainPrograms(NamedTuple):
    """Device programs of a training step, without the rollout engine's. Compiled once per run."""

    state: Any
    init_optimizer: Callable[[Params], TrainState]
    update: Callable[..., Any]
    old_logprobs: Callable[[Params, TrainBatch], Any]  # float32 [M, N, T]
    publish: Callable[[Params], Params]  # rollout weights
    publish_exact: Callable[[Params], Params] | None  # for evaluation; None: `publish`


def train_programs(
    model: ModelConfig,
    mesh: Mesh,
    algo: DapoSection,
    optim: OptimSection,
    temperature: float,
    int8: bool = False,
) -> TrainPrograms:
    """The programs of DAPO training. model: with adapters, if any. Nothing is computed.

    temperature, int8: of rollouts, as `rollout.temperature` and `weights`.
    """
    head: dict[str, Any] = {"temperature": temperature, "chunk_size": loss_chunk(mesh)}
    head |= {"mesh": mesh, "model": model}
    old_logprobs = functools.partial(
        map_microbatches, function=functools.partial(batch_logprobs, **head)
    )
    rollout_params = abstract_params(dataclasses.replace(model, lora=None))
    merge = functools.partial(merge_layer, lora=model.lora)
    exact = publish = publisher(rollout_params, mesh, model.compute_dtype, merge)
    if int8:
        layers = jax.eval_shape(quantize_layer, rollout_params["layers"])
        publish = publisher(
            {**rollout_params, "layers": layers},
            mesh,
            model.compute_dtype,
            lambda layer: quantize_layer(merge(layer)),
        )
    return TrainPrograms(
        *state_programs(functools.partial(loss_fn, algo=algo, **head), model, mesh, optim),
        old_logprobs=jax.jit(old_logprobs, out_shardings=NamedSharding(mesh, P(None, ROWS))),
        publish=publish,
        publish_exact=exact if int8 else None,
    )


def supervised_programs(model: ModelConfig, mesh: Mesh, optim: OptimSection) -> StatePrograms:
    """The programs of supervised warm-up. model: with adapters, if any."""
    head: dict[str, Any] = {"model": model, "chunk_size": loss_chunk(mesh), "mesh": mesh}
    return state_programs(functools.partial(cross_entropy_loss_fn, **head), model, mesh, optim)


def state_programs(
    loss: LossFn, model: ModelConfig, mesh: Mesh, optim: OptimSection
) -> StatePrograms:
    """The programs of any loss. model: with adapters, if any."""
    optimizer = make_optimizer(optim)
    init = functools.partial(init_state, optimizer=optimizer, lora=model.lora)
    shapes = jax.eval_shape(init, abstract_params(model))
    shardings = state_sharding(shapes, mesh)
    state = on_devices(shapes, shardings)
    update = functools.partial(update_step, loss_fn=loss, optimizer=optimizer, lora=model.lora)
    places = (shardings, NamedSharding(mesh, P()))
    return StatePrograms(
        state,
        jax.jit(init, out_shardings=shardings, donate_argnums=0),
        jax.jit(update, out_shardings=places, donate_argnums=0),
    )


def abstract_batch(shape: BatchShape, mesh: Mesh, experts: int = 0) -> TrainBatch:
    """Shapes, dtypes and shardings of a mini-batch, [M, N, T] each. experts: recorded a token."""
    kinds = dict.fromkeys(("tokens", "segment_ids", "positions"), jnp.int32)
    kinds |= dict.fromkeys(("target_mask", "current"), jnp.bool_)
    rows = NamedSharding(mesh, P(None, ROWS))
    size = (shape.microbatches, shape.rows_per_microbatch, shape.row_len)
    fields = {
        name: jax.ShapeDtypeStruct(size, kinds.get(name, jnp.float32), sharding=rows)
        for name in TrainBatch._fields
    }
    chosen = jax.ShapeDtypeStruct((*size, experts), jnp.uint8, sharding=rows)
    return TrainBatch(**fields | {"experts": chosen if experts else None})
