"""Responses of a run or of a model to text, to a file of prompts, or in a chat."""

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dapo_jax import cli, restore
from dapo_jax.config import Config, config_from_dict, read_text
from dapo_jax.data.prompts import decode, make_prompts, shown_prompt
from dapo_jax.rollout.engine import Engine
from dapo_jax.runtime.console import make_console
from dapo_jax.runtime.files import run_folder
from dapo_jax.runtime.mesh import make_mesh, row_shards
from dapo_jax.training import setup
from dapo_jax.training.setup import Policy
from dapo_jax.types import InputError, Message, Params, Problem, Request

_MAX_BYTES = 1 << 24  # of a file of prompts
# A model without a config.
_ALONE: dict[str, Any] = {
    "data": {"template": "{prompt}", "max_prompt_len": 1024},
    "rollout": {"max_response_len": 1024},
    "reward": {"overlong_buffer_len": 0},
}


@dataclasses.dataclass
class Generator:
    """Samples responses. Every prompt of a session has a random key of its own."""

    config: Config
    policy: Policy
    engine: Engine
    weights: Params

    def __post_init__(self) -> None:
        self._seed, self._draws = jax.random.key(self.config.seed), itertools.count()

    def tokens(self, prompt: str | tuple[Message, ...]) -> np.ndarray:
        """A prompt as it is fed. Raises InputError for one that cannot be."""
        size = self.policy.model.vocab_size
        problem = Problem("0", prompt, "")
        [found], _ = make_prompts([problem], self.policy.tokenizer, self.config.data, size)
        return found.tokens

    def samples(self, prompts: Sequence[np.ndarray], count: int) -> Iterator[list[str]]:
        draws = [(next(self._draws), tokens) for tokens in prompts]
        requests = [Request(n, j, tokens) for n, tokens in draws for j in range(count)]
        responses = self.engine.generate(self.weights, requests, self._seed)
        texts = [self._text(response.tokens) for response in responses]
        yield from (texts[i : i + count] for i in range(0, len(texts), count))

    def stream(self, tokens: np.ndarray) -> Iterator[str]:
        """One response, in parts as they are sampled."""
        stream, shown = self.engine.stream(self.weights, self._seed), ""
        stream.submit([Request(next(self._draws), 0, tokens)])
        while stream.pending or stream.live:
            [(_, response)] = stream.advance() or stream.unfinished()
            text = self._text(response.tokens)
            if stream.live:  # the end may be half a character
                text = text.rstrip("\ufffd")
            if text.startswith(shown) or not stream.live:  # later tokens may change earlier text
                yield text[len(os.path.commonprefix([shown, text])) :]
                shown = text

    def _text(self, tokens: np.ndarray) -> str:
        return decode(self.policy.tokenizer, tokens, self.policy.stop)


def chat(generator: Generator, lines: Iterator[str]) -> None:
    """Answers each line. With a chat template the model sees the turns before."""
    history: tuple[Message, ...] = ()
    section, policy = generator.config.data, generator.policy
    as_chat = section.chat and bool(policy.tokenizer.chat_template)
    for line in lines:
        turns = (*history, Message("user", line))
        try:
            tokens = generator.tokens(turns if as_chat else line)
        except InputError as e:
            print(f"{e}; the chat starts over")
            history = ()
            continue
        parts = []
        for part in generator.stream(tokens):
            parts.append(part)
            print(part, end="", flush=True)
        print()
        history = (*turns, Message("assistant", "".join(parts)))


def typed() -> Iterator[str]:
    """Lines from the terminal, or from a pipe, until its end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _prompts(path: str) -> list[str]:
    lines = read_text(path, path, "prompts", "text", _MAX_BYTES).splitlines()
    if not (found := [line for line in lines if line.strip()]):
        raise InputError(f"{path}: is empty; give a text file with a prompt on each line")
    return found


def _parser() -> argparse.ArgumentParser:
    run = "--run-dir runs/tiny"
    examples = (f'{run} "3+4*2" --samples 4', run, '--model Qwen/Qwen3-0.6B "2+2?"')
    parser = cli.parser("generate", main.__doc__, *examples)
    add = parser.add_argument
    add("text", nargs="*", help="prompts; without any, they are read from the terminal")
    add("--prompts", metavar="FILE", help="text file with a prompt on each line")
    add("--run-dir", help="run folder; its newest usable checkpoint, unless:")
    cli.add_checkpoint(parser)
    add("--model", metavar="FOLDER", help="instead: a folder, gs://bucket/folder or id of the hub")
    override = "rollout.temperature=0.7 or rollout.max_response_len=256"
    cli.add_config(parser, " (default: that of --run-dir)", override, "responses")
    add("--samples", type=int, default=1, metavar="K", help="responses; ---- ends each of several")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Samples responses of a run, of a model, or of the model that a config starts from, to text,
    to a file of prompts, or interactively. Text goes through data.template and the chat template;
    turns of a chat go through the chat template alone."""
    args = _parser().parse_args(argv)
    if args.samples < 1:
        raise InputError("--samples: must be at least 1")
    if args.run_dir and args.model:
        raise InputError("--run-dir, --model: give one of them")
    run_dir = run_folder(args.run_dir) if args.run_dir else None
    asked = restore.chosen_step(run_dir, args.step, args.best)
    prompts = [*args.text, *(_prompts(args.prompts) if args.prompts else ())]
    overrides = ["eval.every=0", *args.set]
    if args.model and not args.config:
        tree = _ALONE | {"model": {"folder": args.model}}
        config = config_from_dict(tree, "--model", overrides)
    else:
        config = restore.config_of(args.config, run_dir, overrides)
    policy, mesh = setup.load_policy(config, args.model), make_mesh(config.mesh)
    shards, wanted = row_shards(mesh), max(1, len(prompts)) * args.samples
    slots = min(config.rollout.decode_slots, wanted)
    rollout = dataclasses.replace(config.rollout, decode_slots=-(-slots // shards) * shards)
    config = dataclasses.replace(config, rollout=rollout)
    info = make_console(main=True, quiet=args.quiet).info
    info(setup.describe(policy, mesh))
    _, weights = restore.rollout_weights(config, policy, mesh, run_dir, asked, info)
    generator = Generator(config, policy, setup.make_engine(config, policy, mesh), weights)
    if not prompts:
        chat(generator, typed())
        return 0
    fed = [generator.tokens(prompt) for prompt in prompts]
    if wanted == 1:
        info(shown_prompt(policy.tokenizer, fed[0]))
        for part in generator.stream(fed[0]):
            print(part, end="", flush=True)
        print()
        return 0
    for tokens, texts in zip(fed, generator.samples(fed, args.samples), strict=True):
        info(f"---- {shown_prompt(policy.tokenizer, tokens)}")
        print("".join(f"{text}\n----\n" for text in texts), end="")
    return 0


if __name__ == "__main__":
    cli.run(main)
