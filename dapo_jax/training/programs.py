"""The jitted programs of training, and the shapes of what they take: for running them, and for
compiling them without devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dapo_jax.config import Config, ModelConfig
from dapo_jax.dapo.loss import LossFn, batch_logprobs, cross_entropy_loss_fn, loss_fn
from dapo_jax.dapo.packing import max_microbatches
from dapo_jax.dapo.update import init_state, make_optimizer, map_microbatches, update_step
from dapo_jax.model.decoder import abstract_params
from dapo_jax.model.lora import merge_layer
from dapo_jax.rollout.token_sampling import Sampling
from dapo_jax.runtime.chips import loss_chunk
from dapo_jax.runtime.mesh import ROWS, publisher, state_sharding
from dapo_jax.training.setup import adapted, row_len
from dapo_jax.types import Params, TrainBatch, TrainState


class TrainPrograms(NamedTuple):
    """What a training step runs on its devices, the rollout engine's programs aside.

    Each is compiled once for the whole run.
    """

    state: Any  # a TrainState of shapes and shardings
    init_optimizer: Callable[[Params], TrainState]  # donates the parameters
    update: Callable[
        ..., Any
    ]  # (state, batch [M, N, T], learning rate) → (state, metric sums); donates the state
    old_logprobs: Callable[[Params, TrainBatch], Any]  # float32 [M, N, T]
    publish: Callable[[Params], Params]  # rollout weights


def train_programs(config: Config, model: ModelConfig, mesh: Mesh) -> TrainPrograms:
    """The programs of DAPO training on a mesh. model: as it samples.

    Nothing is computed or put on a device.
    """
    optimizer, rollout_params = make_optimizer(config.optim), abstract_params(model)
    model = adapted(model, config.model.lora)
    state = abstract_state(model, optimizer, mesh)
    head: dict[str, Any] = {
        "temperature": config.rollout.temperature,
        "chunk_size": loss_chunk(mesh),
        "mesh": mesh,
    }
    score = functools.partial(batch_logprobs, model=model, **head)
    return TrainPrograms(
        state=state,
        init_optimizer=_init_optimizer(model, optimizer, state),
        update=_update(
            functools.partial(loss_fn, model=model, algo=config.dapo, **head),
            model,
            optimizer,
            state,
            mesh,
        ),
        old_logprobs=jax.jit(
            functools.partial(map_microbatches, function=score),
            out_shardings=NamedSharding(mesh, P(None, ROWS)),
        ),
        publish=publisher(
            rollout_params,
            mesh,
            model.compute_dtype,
            functools.partial(merge_layer, lora=model.lora),
        ),
    )


def supervised_programs(
    config: Config, model: ModelConfig, mesh: Mesh
) -> tuple[Callable[..., TrainState], Callable[..., Any]]:
    """`init_optimizer` and `update` as in `TrainPrograms`, of supervised warm-up."""
    optimizer, model = make_optimizer(config.optim), adapted(model, config.model.lora)
    state = abstract_state(model, optimizer, mesh)
    loss = functools.partial(
        cross_entropy_loss_fn, model=model, chunk_size=loss_chunk(mesh), mesh=mesh
    )
    return _init_optimizer(model, optimizer, state), _update(loss, model, optimizer, state, mesh)


def update_program(
    loss: LossFn, config: Config, model: ModelConfig, mesh: Mesh
) -> Callable[..., Any]:
    """`update` as in `TrainPrograms`, of another loss. model: as it is trained."""
    optimizer = make_optimizer(config.optim)
    return _update(loss, model, optimizer, abstract_state(model, optimizer, mesh), mesh)


def _init_optimizer(
    model: ModelConfig, optimizer: optax.GradientTransformation, state: TrainState
) -> Callable[[Params], TrainState]:
    return jax.jit(
        lambda p: init_state(p, optimizer, model.lora),
        out_shardings=_shardings(state),
        donate_argnums=0,
    )


def _update(
    loss: LossFn,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
) -> Callable[..., Any]:
    return jax.jit(
        functools.partial(update_step, loss_fn=loss, optimizer=optimizer, lora=model.lora),
        donate_argnums=0,
        out_shardings=(_shardings(state), NamedSharding(mesh, P())),
    )


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, tree)


def abstract_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState."""
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, model.lora), abstract_params(model))
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        state_sharding(shapes, mesh),
    )


def microbatches(config: Config) -> int:
    """M of every mini-batch: what suffices however long its responses are."""
    longest = config.data.max_prompt_len + config.rollout.max_response_len
    rows = config.train.rows_per_microbatch
    return max_microbatches(
        config.dapo.responses_per_update,
        row_len=row_len(config),
        max_item_len=longest,
        rows_per_microbatch=rows,
    )


def abstract_batch(config: Config, mesh: Mesh) -> TrainBatch:
    """Shapes, dtypes and shardings of a mini-batch, [M, N, T] each."""
    shape = (microbatches(config), config.train.rows_per_microbatch, row_len(config))
    rows = NamedSharding(mesh, P(None, ROWS))
    kinds = {
        "tokens": jnp.int32,
        "segment_ids": jnp.int32,
        "positions": jnp.int32,
        "target_mask": jnp.bool_,
    }
    return TrainBatch(
        *(
            jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.float32), sharding=rows)
            for name in TrainBatch._fields
        )
    )


def train_sampling(config: Config) -> Sampling:
    """How training responses are drawn."""
    return Sampling(config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
