"""A run's newest checkpoint as a Hugging Face folder.

python -m dapo_jax.export --run-dir D --out FOLDER
"""

import argparse

from dapo_jax import cli
from dapo_jax.config import MeshSection, RolloutSection, load_config
from dapo_jax.model.weights import check_new, save_pretrained
from dapo_jax.runtime.files import local_copy, run_folder
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.training.setup import Policy, describe, load_policy, restore_params
from dapo_jax.types import InputError, Params


def save_policy(out: str, policy: Policy, params: Params, section: RolloutSection) -> None:
    """Writes a Hugging Face folder. Its generation_config.json is that of the model the run started
    from, or holds the run's special tokens and sampling."""
    tokenizer, stop = policy.tokenizer, list(policy.stop)
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stop if len(stop) > 1 else stop[0],
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": True,
        "temperature": section.temperature,
        "top_p": section.top_p,
        "top_k": section.top_k,  # written if 0 too: some releases default to 50
    }
    files = {"source_folder": policy.folder, "tokenizer": tokenizer, "generation": generation}
    save_pretrained(out, policy.model, params, **files)


def main(argv: list[str] | None = None) -> int:
    """Writes the newest usable checkpoint of a run as a Hugging Face folder: config, float32
    safetensors, tokenizer, generation config."""
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.export", description=main.__doc__)
    parser.add_argument("--run-dir", required=True, help="run folder of dapo_jax.train")
    parser.add_argument("--out", required=True, help="folder to write; must not exist, or be empty")
    args = parser.parse_args(argv)
    if "://" in args.out:
        do = "give --out one, and copy it with `gcloud storage cp -r`"
        raise InputError(f"{args.out}: is no local folder; {do}")
    run_dir = run_folder(args.run_dir)
    with local_copy(run_dir / "config.yaml") as file:
        config = load_config(file)
    check_new(args.out)
    policy = load_policy(config)
    mesh = make_mesh(MeshSection())
    step, params = restore_params(run_dir, policy, mesh)
    save_policy(args.out, policy, params, config.rollout)
    print(f"wrote step {step} of {args.run_dir} to {args.out}: {describe(policy, mesh)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
