"""From config to a policy on a mesh: architecture, tokenizer, weights. Shared by the verbs."""

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
    load_config,
    to_dict,
)
from dapo_jax.data.prompts import check_embedded, load_tokenizer, prompts_digest, stop_tokens
from dapo_jax.model.decoder import abstract_params, init
from dapo_jax.model.lora import join, merge, split
from dapo_jax.model.weights import (
    DESCRIPTION_FILES,
    WEIGHT_FILES,
    check_pretrained,
    file_digests,
    load_model_config,
    load_pretrained,
)
from dapo_jax.rollout.engine import Engine
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime import checkpoint, multihost
from dapo_jax.runtime.chips import prefill_tokens
from dapo_jax.runtime.files import Folder, is_id, local_copy, local_model, read, same_commit
from dapo_jax.runtime.mesh import params_sharding, put, row_shards
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import NoCheckpointError, Params, Prompt


class Policy(NamedTuple):
    """What a policy is, apart from its weights."""

    model: ModelConfig  # as it samples: without adapters
    tokenizer: Any  # a transformers tokenizer
    stop: tuple[int, ...]  # token ids that end a response
    source: str | None = (
        None  # of weights and tokenizer, as `local_model` takes it, a commit where it is of the hub; None: made here
    )
    folder: str | None = None  # on this machine: all of the source's files but weights


def with_computation(config: Config, model: Architecture) -> ModelConfig:
    """The architecture with how the config wants it computed, once its context is known to hold the
    config's lengths.
    """
    check_context(config, model)
    c = config.model
    return ModelConfig(
        **vars(model)
        | {"compute_dtype": c.compute_dtype, "remat": c.remat, "attention_block": c.attention_block}
    )


def adapted(model: ModelConfig, lora: LoraConfig | None) -> ModelConfig:
    """The model as it is trained: with adapters, if any."""
    return dataclasses.replace(model, lora=lora)


def with_commit(config: Config, run_dir: Folder | None = None) -> Config:
    """The config with `model.folder` as ID@COMMIT where that is an id of the hub: the commit of the
    run that `run_dir` holds, or today's.

    An id with a revision has the commit that the revision has today. Anything else stays as it is.
    """
    name = config.model.folder
    if name is None or not is_id(name):
        return config
    stored = run_dir / "config.yaml" if run_dir else None
    if stored is not None and read(stored) is not None:
        with local_copy(stored) as file:
            name = same_commit(name, load_config(file).model.folder)
    name = local_model(name, DESCRIPTION_FILES).name
    return dataclasses.replace(config, model=dataclasses.replace(config.model, folder=name))


def load_policy(config: Config, source: str | None = None) -> Policy:
    """Architecture and tokenizer of `model.folder` (or of `source`, if given), or of
    `model.architecture`. No device is touched.
    """
    source, folder = source or config.model.folder, None
    if source:
        source, folder = local_model(source, DESCRIPTION_FILES)
    model = load_model_config(folder) if folder else config.model.architecture
    assert model is not None  # the config's own check
    model = with_computation(config, model)
    tokenizer = load_tokenizer(folder)
    stop = stop_tokens(tokenizer, folder, config.data, config.rollout.stop_tokens)
    check_embedded(
        stop, model.vocab_size, tokenizer, f"{folder or 'model.architecture'}: stop tokens"
    )
    return Policy(model, tokenizer, stop, source, folder)


def check_started_alike(
    config: Config, policy: Policy, sets: Mapping[str, Sequence[Prompt]], facts: Mapping[str, Any]
) -> None:
    """Raises InputError, on every process, unless all have the same config, software, description
    of the model (tokenizer and chat template included), problems and prompt tokens, and the same
    further `facts`. sets: by their config keys.
    """

    def all_facts() -> dict[str, Any]:
        modules = (
            importlib.metadata.packages_distributions() if config.reward.allowed_modules else {}
        )
        packages = {
            package
            for module in config.reward.allowed_modules
            for package in modules.get(module.partition(".")[0], ())
        }
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
    """Raises InputError unless the folder's weights can be loaded and are the same for every
    process.
    """
    check_pretrained(folder)
    multihost.check_alike(lambda: _file_facts(folder, WEIGHT_FILES))


def _file_facts(folder: str | None, patterns: tuple[str, ...]) -> dict[str, str]:
    digests = file_digests(folder, patterns) if folder else {}
    return {f"the digest of the model's {name}": digest for name, digest in digests.items()}


def weights_folder(policy: Policy) -> str | None:
    """The folder on this machine that holds the weights, fetched if need be; None where they are
    random.
    """
    return (
        local_model(policy.source, (*DESCRIPTION_FILES, *WEIGHT_FILES)).folder
        if policy.source
        else None
    )


def load_params(
    config: Config, policy: Policy, mesh: Mesh, *, lora: LoraConfig | None = None
) -> Params:
    """Weights on the mesh, the policy's own or random from `seed`: float32, or with new adapters
    and as training then holds them.
    """
    model, key = adapted(policy.model, lora), jax.random.key(config.seed)
    abstract = abstract_params(model)
    shardings = params_sharding(abstract, mesh)
    if not (folder := weights_folder(policy)):
        return jax.jit(functools.partial(init, model), out_shardings=shardings)(key)
    check_weights(folder)
    loaded = load_pretrained(folder)[1]
    if lora is None:
        return jax.tree.map(put, loaded, shardings)
    places, frozen_places = split(shardings, lora)
    adapters = jax.jit(lambda k: split(init(model, k), lora)[0], out_shardings=places)(key)
    dtypes = jax.tree.map(lambda a: a.dtype, split(abstract, lora)[1])
    return join(
        adapters,
        jax.tree.map(
            lambda value, dtype, s: put(value.astype(dtype), s), loaded, dtypes, frozen_places
        ),
    )


def merged(params: Params, policy: Policy, lora: LoraConfig | None, mesh: Mesh) -> Params:
    """Trained weights as those of a model without adapters, on the mesh; themselves if they have
    none.
    """
    if lora is None:
        return params
    shardings = params_sharding(abstract_params(policy.model), mesh)
    return jax.jit(functools.partial(merge, lora=lora), out_shardings=shardings)(params)


def restore_params(run_dir: Folder, policy: Policy, mesh: Mesh) -> tuple[int, Params]:
    """Step and weights of the newest usable checkpoint of a run folder, its adapters merged.

    Raises NoCheckpointError if there is none, ConfigError if the policy is not the one that the run
    trains.
    """
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise NoCheckpointError(
            f"{run_dir}: holds no checkpoints; give the --run-dir of a training run"
        )
    run = run_model(run_dir)
    if run is not None:
        check_same_model(run, policy, run_dir)
    lora = run.lora if run else None  # no other config knows the adapters' alpha
    abstract = abstract_params(adapted(policy.model, lora))
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        abstract,
        params_sharding(abstract, mesh),
    )
    restored = checkpoint.restore_params(folder, target)
    return restored.step, merged(restored.params, policy, lora, mesh)


def run_model(run_dir: Folder) -> ModelSection | None:
    """The model of a run, by its own config."""
    if read(run_dir / "config.yaml") is None:
        return None
    with local_copy(run_dir / "config.yaml") as file:
        return load_config(file).model


def check_same_model(run: ModelSection, policy: Policy, run_dir: Folder) -> None:
    """Raises ConfigError if the run's weights are not those of the policy's architecture.

    A model's folder may have moved.
    """
    found = (
        [("model.folder", run.folder, policy.source)]
        if (run.folder is None) != (policy.source is None)
        else []
    )
    if run.architecture is not None:
        fields = [field.name for field in dataclasses.fields(Architecture)]
        found += [
            (
                f"model.architecture.{name}",
                getattr(run.architecture, name),
                getattr(policy.model, name),
            )
            for name in fields
        ]
    for key, was, now in found:
        if was != now:
            raise ConfigError(
                f"{key}: is {now!r}, but {run_dir} was trained with {was!r}; set it back, or give --config {run_dir}/config.yaml"
            )


def check_adapters(section: ModelSection) -> None:
    """Raises ConfigError for adapters beside random weights, which stay as they are."""
    if section.lora is not None and section.folder is None:
        raise ConfigError(
            "model.lora: adapters are trained beside frozen weights, and those of model.architecture are random; set model.folder to a "
            "trained model, such as one that `python -m dapo_jax.supervised` wrote, or set model.lora to null"
        )


def row_len(config: Config) -> int:
    """T, tokens of a training row."""
    return config.train.row_len or config.data.max_prompt_len + config.rollout.max_response_len


def check_divides(config: Config, mesh: Mesh, *, rows: bool = False, slots: bool = False) -> None:
    """Training rows and decode slots are split over the mesh, so those that are used must divide.

    ConfigError if not.
    """
    shards = row_shards(mesh)
    for used, key, size in (
        (rows, "train.rows_per_microbatch", config.train.rows_per_microbatch),
        (slots, "rollout.decode_slots", config.rollout.decode_slots),
    ):
        if used and size % shards:
            raise ConfigError(
                f"{key}: {size} does not divide over the mesh's {shards} row shards (data x fsdp); use a multiple of {shards}"
            )


def make_engine(config: Config, policy: Policy, mesh: Mesh, sampling: Sampling) -> Engine:
    """A rollout engine with the config's slots and length limits."""
    return Engine(
        policy.model,
        sampling,
        policy.stop,
        slots=config.rollout.decode_slots,
        max_prompt_len=config.data.max_prompt_len,
        max_response_len=config.rollout.max_response_len,
        mesh=mesh,
        fetch=fetch,
        prefill_tokens=prefill_tokens(mesh),
        int8=config.rollout.kv_cache == "int8",
    )


def describe(policy: Policy, mesh: Mesh, lora: LoraConfig | None = None) -> str:
    """One line: size, kind and place of the policy, and what of it is trained."""

    def millions(params: Params) -> str:
        return f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:,.1f} M parameters"

    m, shape = policy.model, " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    device = jax.devices()[0]
    origin = f" of {policy.source}" if policy.source else ""
    stop = ", ".join(map(str, policy.tokenizer.convert_ids_to_tokens(list(policy.stop))))
    trained = (
        f" trained through {millions(split(abstract_params(adapted(m, lora)), lora)[0])} of adapters"
        if lora
        else ""
    )
    return (
        f"{m.family}{origin}, {millions(abstract_params(m))}{trained}, {m.layers} layers, D {m.model_dim}, V {m.vocab_size}, "
        f"{m.compute_dtype}; responses end with {stop}; {len(jax.devices())} {device.platform} devices ({device.device_kind}) as {shape}"
    )
