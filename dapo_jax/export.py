"""A run's checkpoint as a Hugging Face folder, and on the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dapo_jax import __version__, cli
from dapo_jax.config import Config, MeshSection, RolloutSection, dump_yaml
from dapo_jax.model.weights import check_new, save_pretrained
from dapo_jax.restore import chosen_step, config_of, restore_params
from dapo_jax.runtime.files import Folder, is_id, read, run_folder, without_secrets, write_result
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.runtime.metrics import held_out, read_metrics
from dapo_jax.training.setup import Policy, describe, load_policy
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


_CARD = """---
{front}---

# {name}

{model}, trained with DAPO ([arXiv 2503.14476](https://arxiv.org/abs/2503.14476)) by dapo_jax
{version}: rollout step {step} of {steps}.

- Start: {base}
- Training data: {data}
- Held-out accuracy at step {step}: {accuracy}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Prompts were made by this template{chat}:

```
{template}
```

The run's config:

```yaml
{config}```
"""


def model_card(config: Config, run_dir: Folder, step: int, name: str, policy: Policy) -> str:
    """The README.md of an exported checkpoint: base model, data, accuracy, how to load, config."""
    base, k = config.model.folder, config.eval.samples_per_problem
    front = "library_name: transformers\npipeline_tag: text-generation\ntags: [dapo, dapo_jax]\n"
    if base and is_id(base):
        front += f"base_model: {base.partition('@')[0]}\n"
    found: dict[str, Any] = {}
    if read(run_dir / "metrics.jsonl") is not None:
        for record in read_metrics(run_dir):
            found |= record if record["step"] == step else {}
    accuracies = held_out(found).items()
    scores = [f"{name} avg@{k} {avg:.3f} ± {se:.3f}" for name, (avg, se) in accuracies]
    chat = config.data.chat and bool(policy.tokenizer.chat_template)
    return _CARD.format(
        front=front,
        name=name,
        model=policy.model.family,
        version=__version__,
        step=step,
        steps=config.train.steps,
        base=base or f"random weights, and {config.supervised.updates} updates on solutions",
        data=", ".join(one.path for one in config.data.train),
        accuracy=", ".join(scores) or "not measured",
        chat=", then the chat template" if chat else "",
        template=config.data.template,
        config=dump_yaml(config),
    )


def create_repository(name: str) -> Callable[[str], str]:
    """Creates a repository of the hub, private if it is new, and returns the function that uploads
    a folder to it and returns its address. Raises InputError where the hub refuses."""
    from huggingface_hub import HfApi  # not at the top: takes a second

    def refused(e: Exception) -> InputError:
        fix = "give OWNER/NAME, and log in with `hf auth login` or set HF_TOKEN (write access)"
        return InputError(f"--push {name}: the hub refuses ({without_secrets(e)}); {fix}")

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
    except Exception as e:  # of huggingface_hub, its HTTP client
        raise refused(e) from None

    def upload(folder: str) -> str:
        try:
            return str(api.upload_folder(repo_id=name, folder_path=folder))
        except Exception as e:
            raise refused(e) from None

    return upload


def main(argv: list[str] | None = None) -> int:
    """Writes a checkpoint of a run as a Hugging Face folder: config, float32 safetensors,
    tokenizer, generation config, model card."""
    run = "--run-dir runs/tiny --out exported"
    parser = cli.parser("export", main.__doc__, run, f"{run} --best --push me/my-model")
    parser.add_argument("--run-dir", required=True, help="run folder of dapo_jax.train")
    parser.add_argument("--out", required=True, help="folder to write; must not exist, or be empty")
    cli.add_checkpoint(parser)
    text = "also upload the folder to this repository of the hub, created private if missing"
    parser.add_argument("--push", metavar="OWNER/NAME", help=text)
    args = parser.parse_args(argv)
    if "://" in args.out:
        do = "give --out one, and copy it with `gcloud storage cp -r`"
        raise InputError(f"{args.out}: is no local folder; {do}")
    run_dir = run_folder(args.run_dir)
    config = config_of(None, run_dir)
    check_new(args.out)
    asked = chosen_step(run_dir, args.step, args.best)
    upload = create_repository(args.push) if args.push else None
    policy = load_policy(config)
    mesh = make_mesh(MeshSection())
    step, params = restore_params(run_dir, policy, mesh, asked)
    save_policy(args.out, policy, params, config.rollout)
    card = model_card(config, run_dir, step, args.push or Path(args.out).resolve().name, policy)
    write_result(str(Path(args.out, "README.md")), card)
    print(f"wrote step {step} of {args.run_dir} to {args.out}: {describe(policy, mesh)}")
    if upload:
        print(f"uploaded to {upload(args.out)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
