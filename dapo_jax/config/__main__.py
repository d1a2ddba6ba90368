"""The verb: prints config fields, or a resolved config."""

from pathlib import Path

from dapo_jax import cli
from dapo_jax.config import dump_yaml, load_config
from dapo_jax.config.describe import describe


def shipped(folder: Path) -> list[str]:
    """The configs in a folder, each with the first line of its header."""
    found = []
    for file in sorted(folder.glob("*.yaml")):
        header = file.read_text().partition("\n")[0]
        found += [f"configs/{file.name}", f"    {header.lstrip('# ')}"]
    return found or [f"no configs in {folder}; they come with the repository"]


def main(argv: list[str] | None = None) -> int:
    """Prints every config field with its default and meaning, one of them, or a resolved config."""
    example = "--config configs/tiny_cpu.yaml --set optim.grad_clip=0.5"
    parser = cli.parser("config", main.__doc__, "optim.learning_rate", example)
    parser.add_argument("key", nargs="?", help="a field or section, e.g. dapo.clip_eps_high")
    parser.add_argument("--list", action="store_true", help="the configs of this repository")
    cli.add_config(parser, " to print, resolved and checked", "optim.learning_rate=1e-5")
    args = parser.parse_args(argv)
    if args.config:
        print(dump_yaml(load_config(args.config, args.set)))
    elif args.list:
        print("\n".join(shipped(Path(__file__).parents[2] / "configs")))
    else:
        print("\n".join(describe(args.key or "")))
    return 0


if __name__ == "__main__":
    cli.run(main)
