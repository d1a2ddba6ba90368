"""From a config to a policy on a mesh: architecture, tokenizer, weights. Shared by the verbs."""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dapo_jax.config import (
    Architecture,
    Config,
    ConfigError,
    LoraConfig,
    ModelConfig,
    ModelSection,
    check_context,
    flatten,
    to_dict,
)
from dapo_jax.dapo.packing import max_microbatches
from dapo_jax.data.inputs import Encoding
from dapo_jax.data.prompts import check_embedded, load_tokenizer, prompts_digest, stop_tokens
from dapo_jax.model import weights
from dapo_jax.model.decoder import abstract_params, init
from dapo_jax.model.lora import join, merge, split
from dapo_jax.rollout.engine import Engine, Limits
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime import multihost
from dapo_jax.runtime.chips import prefill_tokens
from dapo_jax.runtime.files import DESCRIPTION_FILES, Folder, is_id, local_model, read, same_commit
from dapo_jax.runtime.mesh import params_sharding, row_shards
from dapo_jax.runtime.same_run import stored_config
from dapo_jax.types import Params, Prompt


class Policy(NamedTuple):
    """A policy without its weights."""

    model: ModelConfig  # as used for sampling: without adapters
    tokenizer: Any  # a transformers tokenizer
    stop: tuple[int, ...]  # token ids that end a response
    source: str | None = None  # of weights and tokenizer, as `local_model` takes it; None: random
    folder: str | None = None  # on this machine: all files of the source but weights

    @property
    def encoding(self) -> Encoding:
        return self.tokenizer, self.model.vocab_size


class BatchShape(NamedTuple):
    """Static shape of every mini-batch, as `build_batch` takes it: [M, N, T]."""

    row_len: int  # T
    rows_per_microbatch: int  # N
    microbatches: int  # M: enough for responses of any length
    row_shards: int  # devices that each micro-batch's rows are split over


def batch_shape(
    config: Config, mesh: Mesh, responses: int | None = None, longest: int | None = None
) -> BatchShape:
    """The shape for `responses` (default: of an update) of `longest` tokens, prompt included."""
    limit = config.data.max_prompt_len + config.rollout.max_response_len
    row_len, rows = config.train.row_len or limit, config.train.rows_per_microbatch
    microbatches = max_microbatches(
        responses or config.dapo.responses_per_update,
        row_len=row_len,
        max_item_len=longest or limit,
        rows_per_microbatch=rows,
    )
    return BatchShape(row_len, rows, microbatches, row_shards(mesh))


def with_computation(config: Config, model: Architecture) -> ModelConfig:
    """The architecture and compute options. Raises ConfigError if its context is too short."""
    check_context(config, model)
    c = config.model
    if config.dapo.replay_routing and not model.experts:
        raise ConfigError(f"dapo.replay_routing: {model.family} has no experts; set it to false")
    if model.experts and c.lora and (found := {*c.lora.targets} & {"gate", "up", "down"}):
        raise ConfigError(
            f"model.lora.targets: experts have no adapters, got {', '.join(sorted(found))}; use "
            "[q, k, v, o]"
        )
    options = {"compute_dtype": c.compute_dtype, "remat": c.remat}
    return ModelConfig(**vars(model) | options | {"attention_block": c.attention_block})


def adapted(model: ModelConfig, lora: LoraConfig | None) -> ModelConfig:
    """The model as it is trained: with adapters, if any."""
    return dataclasses.replace(model, lora=lora)


def with_commit(config: Config, run_dir: Folder | None = None) -> Config:
    """Pins a hub id in `model.folder` to ID@COMMIT: that of the run in `run_dir`, or today's."""
    name = config.model.folder
    if name is None or not is_id(name):
        return config
    if run_dir is not None and (stored := stored_config(run_dir)):
        name = same_commit(name, stored.model.folder)
    name = local_model(name).name
    return dataclasses.replace(config, model=dataclasses.replace(config.model, folder=name))


def load_policy(config: Config, source: str | None = None) -> Policy:
    """Architecture and tokenizer of `source` or the config's model section. Touches no device."""
    source, folder = source or config.model.folder, None
    if source:
        source, folder = local_model(source)
    model = weights.load_model_config(folder) if folder else config.model.architecture
    assert model is not None  # the config's own check
    model = with_computation(config, model)
    tokenizer = load_tokenizer(folder)
    stop = stop_tokens(tokenizer, folder, config.data, config.rollout.stop_tokens)
    where = f"{folder or 'model.architecture'}: stop tokens"
    check_embedded(stop, model.vocab_size, tokenizer, where)
    return Policy(model, tokenizer, stop, source, folder)


def check_same_start(
    config: Config, policy: Policy, sets: Mapping[str, Sequence[Prompt]], facts: Mapping[str, Any]
) -> None:
    """Raises InputError, on every process, unless all have the same config, software, model
    description, prompts and further `facts`. sets: prompts by config key."""

    def all_facts() -> dict[str, Any]:
        allowed = config.reward.allowed_modules
        modules = importlib.metadata.packages_distributions() if allowed else {}
        packages = {p for module in allowed for p in modules.get(module.partition(".")[0], ())}
        return (
            multihost.software()
            | {package: multihost.version(package) for package in packages}
            | flatten(to_dict(config))
            | {"the model": policy.source}
            | _file_facts(policy.folder, DESCRIPTION_FILES)
            | dict(facts)
            | {f"the digest of {name}": prompts_digest(prompts) for name, prompts in sets.items()}
        )

    multihost.check_alike(all_facts)


def check_weights(folder: str) -> None:
    """Raises InputError unless the folder's weights are readable and the same on every process."""
    weights.check_pretrained(folder)
    multihost.check_alike(lambda: _file_facts(folder, weights.WEIGHT_FILES))


def check_first_weights(policy: Policy, run_dir: Folder) -> None:
    """Checks the weights that a new run starts from; a resumed run restores its own.

    Process 0 decides whether the run is new: processes that do not share the folder may disagree.
    """
    resumed = multihost.from_main("" if read(run_dir / "config.yaml") is None else "resumed")
    if not resumed and (folder := weights_folder(policy)):
        check_weights(folder)


def _file_facts(folder: str | None, patterns: tuple[str, ...]) -> dict[str, str]:
    digests = weights.file_digests(folder, patterns) if folder else {}
    return {f"the digest of the model's {name}": digest for name, digest in digests.items()}


def weights_folder(policy: Policy) -> str | None:
    """The local folder of the weights, downloaded if needed; None for random weights."""
    files = (*DESCRIPTION_FILES, *weights.WEIGHT_FILES)
    return local_model(policy.source, files).folder if policy.source else None


def load_params(
    config: Config, policy: Policy, mesh: Mesh, *, lora: LoraConfig | None = None
) -> Params:
    """Weights on the mesh, of the policy's folder or random from `seed`: float32. With `lora`, new
    float32 adapters and frozen weights in compute dtype.
    """
    model, key = adapted(policy.model, lora), jax.random.key(config.seed)
    abstract = abstract_params(model)
    shardings = params_sharding(abstract, mesh)
    if not (folder := weights_folder(policy)):
        return jax.jit(functools.partial(init, model), out_shardings=shardings)(key)
    check_weights(folder)
    if lora is None:
        return _own_shards(folder, abstract, shardings)
    places, frozen_places = split(shardings, lora)
    adapters = jax.jit(lambda k: split(init(model, k), lora)[0], out_shardings=places)(key)
    return join(adapters, _own_shards(folder, split(abstract, lora)[1], frozen_places))


def _own_shards(folder: str, abstract: Params, shardings: Params) -> Params:
    target = on_devices(abstract, shardings)
    return multihost.on_all(lambda: weights.load_pretrained(folder, target)[1])


def on_devices(abstract: Any, shardings: Any) -> Any:
    """A tree of shapes and dtypes, with shardings."""

    def place(a: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    return jax.tree.map(place, abstract, shardings)


def merged(params: Params, policy: Policy, lora: LoraConfig | None, mesh: Mesh) -> Params:
    """Trained weights with their adapters merged, on the mesh."""
    if lora is None:
        return params
    shardings = params_sharding(abstract_params(policy.model), mesh)
    return jax.jit(functools.partial(merge, lora=lora), out_shardings=shardings)(params)


def check_adapters(section: ModelSection) -> None:
    """Raises ConfigError for adapters on random weights, which would stay random."""
    if section.lora is not None and section.folder is None:
        raise ConfigError(
            "model.lora: adapters are trained on frozen weights, and those of "
            "model.architecture are random; set model.folder to a trained model, such as one that "
            "`python -m dapo_jax.supervised` wrote, or set model.lora to null"
        )


def check_divides(config: Config, mesh: Mesh, *, rows: bool = False, slots: bool = False) -> None:
    """Raises ConfigError unless the training rows or decode slots in use divide over the mesh."""
    shards = row_shards(mesh)
    for used, key, size in (
        (rows, "train.rows_per_microbatch", config.train.rows_per_microbatch),
        (slots, "rollout.decode_slots", config.rollout.decode_slots),
    ):
        if used and size % shards:
            raise ConfigError(
                f"{key}: {size} does not divide over the mesh's {shards} row shards "
                f"(data x fsdp); use a multiple of {shards}"
            )


def make_engine(config: Config, policy: Policy, mesh: Mesh, *, held_out: bool = False) -> Engine:
    """A rollout engine for training or held-out prompts. Raises ConfigError if the longest sequence
    does not fit into a shard's cache."""
    rollout, held = config.rollout, config.eval
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k)
    sampling = Sampling(held.temperature, held.top_p) if held_out else sampling
    limits = Limits(
        rollout.decode_slots,
        config.data.max_prompt_len,
        rollout.max_response_len,
        prefill_tokens(mesh),
        int8=rollout.kv_cache == "int8",
        cache_tokens=rollout.cache_tokens,
        experts=config.dapo.replay_routing and not held_out,
    )
    fetch = multihost.fetch
    try:
        return Engine(policy.model, sampling, policy.stop, limits, mesh=mesh, fetch=fetch)
    except ValueError as e:
        raise ConfigError(f"rollout.{e}") from None


def describe(policy: Policy, mesh: Mesh, lora: LoraConfig | None = None) -> str:
    """One line: family, size and devices of the policy, and the trained parameters."""

    def millions(params: Params) -> str:
        return f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:,.1f} M parameters"

    m, device, shape = policy.model, jax.devices()[0], mesh.shape.items()
    text = f"{m.family} of {policy.source}" if policy.source else m.family
    text += f", {millions(abstract_params(m))}"
    if lora:
        adapters = split(abstract_params(adapted(m, lora)), lora)[0]
        text += f" trained through {millions(adapters)} of adapters"
    text += f", {m.layers} layers, D {m.model_dim}, V {m.vocab_size}, {m.compute_dtype}; responses "
    stop = ", ".join(map(str, policy.tokenizer.convert_ids_to_tokens(list(policy.stop))))
    text += f"end with {stop}; {mesh.size} {device.platform} devices ({device.device_kind}) as "
    return text + " x ".join(f"{axis} {size}" for axis, size in shape)
