"""The config and weights that a verb uses: of a run's checkpoint, or of a model."""

from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from dapo_jax.config import Config, ConfigError, ModelSection, load_config
from dapo_jax.model.decoder import abstract_params
from dapo_jax.runtime import checkpoint
from dapo_jax.runtime.files import Folder
from dapo_jax.runtime.mesh import params_sharding, publisher
from dapo_jax.runtime.metrics import best_step
from dapo_jax.runtime.same_run import stored_config
from dapo_jax.training.setup import Policy, adapted, load_params, merged, on_devices
from dapo_jax.types import InputError, NoCheckpointError, Params


def config_of(path: str | None, run_dir: Folder | None, overrides: Sequence[str] = ()) -> Config:
    """The config at `path`, or else that of the run folder, with overrides. It replays no experts:
    only training does, and a dense model has none.
    """
    overrides = ["dapo.replay_routing=false", *overrides]
    if path is not None:
        return load_config(path, overrides)
    if run_dir is None:
        raise InputError("--config: is missing; give one, or the --run-dir of a run")
    if (config := stored_config(run_dir, overrides)) is None:
        raise InputError(f"{run_dir}: holds no config.yaml; give the folder of a run, or --config")
    return config


def chosen_step(run_dir: Folder | None, step: int | None, best: bool) -> int | None:
    """The step of the checkpoint that --step or --best asks for; None for the newest."""
    if not best and step is None:
        return None
    if run_dir is None:
        raise InputError("--step, --best: go with --run-dir")
    stored = checkpoint.stored_steps(run_dir / "checkpoints")
    held = f"its checkpoints are of steps {', '.join(map(str, stored[::-1])) or 'none'}"
    if best and (step := best_step(run_dir, stored)) is None:
        raise InputError(f"--best: no checkpoint of {run_dir} was evaluated; {held}; give --step")
    if step is not None and step not in stored:
        raise InputError(f"--step: {run_dir} holds no checkpoint of step {step}; {held}")
    return step


def restore_params(
    run_dir: Folder, policy: Policy, mesh: Mesh, step: int | None = None
) -> tuple[int, Params]:
    """Step and weights of a whole step of a run folder (None: the newest usable), adapters merged.
    NoCheckpointError if there is none, ConfigError if the run trains another model."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        none = "holds no checkpoints; give the --run-dir of a training run"
        raise NoCheckpointError(f"{run_dir}: {none}")
    lora = None
    if run := stored_config(run_dir):
        check_same_model(run.model, policy, run_dir)
        lora = run.model.lora  # no other config knows the adapters' alpha
    abstract = abstract_params(adapted(policy.model, lora))
    target = on_devices(abstract, params_sharding(abstract, mesh))
    step, params = checkpoint.restore_params(folder, target, step)
    return step, merged(params, policy, lora, mesh)


def rollout_weights(
    config: Config,
    policy: Policy,
    mesh: Mesh,
    run_dir: Folder | None,
    step: int | None,
    info: Callable[[str], None],
) -> tuple[int | None, Params]:
    """Weights for sampling, and their rollout step: of a run's checkpoint (as `restore_params`), or
    those that the policy starts from."""
    found = None
    if run_dir:
        found, params = restore_params(run_dir, policy, mesh, step)
        info(f"checkpoint of step {found}")
    else:
        params = load_params(config, policy, mesh)
    return found, publisher(params, mesh, policy.model.compute_dtype)(params)


def check_same_model(run: ModelSection, policy: Policy, run_dir: Folder) -> None:
    """Raises ConfigError unless the policy has the run's architecture. The folder may move."""
    moved = (run.folder is None) == (policy.source is None)
    pairs = {} if moved else {"folder": (run.folder, policy.source)}
    for name, value in vars(run.architecture).items() if run.architecture else ():
        pairs[f"architecture.{name}"] = (value, getattr(policy.model, name))
    for key, (was, now) in pairs.items():
        if was != now:
            raise ConfigError(
                f"model.{key}: is {now!r}, but {run_dir} was trained with {was!r}; set it back, or "
                f"give --config {run_dir}/config.yaml"
            )
