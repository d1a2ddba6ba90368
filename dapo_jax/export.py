"""A run's newest checkpoint as a Hugging Face folder.

python -m dapo_jax.export --run-dir D --out FOLDER
"""

import argparse

from dapo_jax.config import MeshSection, load_config
from dapo_jax.model.weights import check_new, save_pretrained
from dapo_jax.runtime.files import local_copy, run_folder
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.training.setup import describe, load_policy, restore_params
from dapo_jax.types import InputError


def main(argv: list[str] | None = None) -> int:
    """Writes the newest usable checkpoint of a run as a Hugging Face folder: config, float32
    safetensors, tokenizer, generation config.
    """
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.export", description=main.__doc__)
    parser.add_argument("--run-dir", required=True, help="run folder of dapo_jax.train")
    parser.add_argument("--out", required=True, help="folder to write; must not exist, or be empty")
    args = parser.parse_args(argv)
    if "://" in args.out:
        raise InputError(
            f"{args.out}: is no local folder; give --out one, and copy it with `gcloud storage cp -r`"
        )
    run_dir = run_folder(args.run_dir)
    with local_copy(run_dir / "config.yaml") as file:
        config = load_config(file)
    check_new(args.out)
    policy = load_policy(config)
    mesh = make_mesh(MeshSection())
    step, params = restore_params(run_dir, policy, mesh)
    save_pretrained(
        args.out, policy.model, params, source_folder=policy.folder, tokenizer=policy.tokenizer
    )
    print(f"wrote step {step} of {args.run_dir} to {args.out}: {describe(policy, mesh)}")
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
