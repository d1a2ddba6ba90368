"""Supervised warm-up: cross-entropy on worked solutions, through the same model, packing and update
as DAPO.

python -m dapo_jax.supervised --config C --out FOLDER        writes a Hugging Face folder
"""

import argparse
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from dapo_jax.config import Config, load_config
from dapo_jax.dapo.packing import TrainItem, build_batch, max_microbatches
from dapo_jax.data.mixture import load_training
from dapo_jax.data.problems import Cursor, advance
from dapo_jax.data.prompts import check_embedded, make_prompts
from dapo_jax.evaluate import load_sets, not_held_out
from dapo_jax.model.weights import check_new, save_pretrained
from dapo_jax.runtime import multihost
from dapo_jax.runtime.console import make_console
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.mesh import make_mesh, put_rows, row_shards
from dapo_jax.training.programs import supervised_programs
from dapo_jax.training.setup import (
    Policy,
    check_adapters,
    check_divides,
    check_started_alike,
    describe,
    load_params,
    load_policy,
    merged,
    row_len,
)
from dapo_jax.types import InputError, Prompt, TrainBatch, TrainState


def solution_items(
    prompts: Sequence[Prompt], policy: Policy, max_response_len: int
) -> list[TrainItem]:
    """Prompts with their worked solutions, ended by the end token.

    Solutions over the response limit are left out.
    """
    with_solution = [p for p in prompts if p.problem.solution]
    if not with_solution:
        raise InputError(
            "data.train: no problem has a `solution`, which supervised warm-up needs; add them or set supervised.updates to 0"
        )
    encoded = policy.tokenizer(
        [p.problem.solution for p in with_solution], add_special_tokens=False
    )["input_ids"]
    items = []
    for prompt, ids in zip(with_solution, encoded, strict=True):
        check_embedded(
            ids,
            policy.model.vocab_size,
            policy.tokenizer,
            f"the solution of problem {prompt.problem.id}",
        )
        response = np.array([*ids, policy.tokenizer.eos_token_id], np.int32)
        zeros = np.zeros(len(response), np.float32)
        if len(response) <= max_response_len:
            items.append(
                TrainItem(prompt.tokens, response, zeros, zeros, advantage=0.0, weight=0.0)
            )
    if not items:
        raise InputError(
            f"data.train: every solution is longer than rollout.max_response_len {max_response_len}; raise it"
        )
    return items


def warm_up(
    config: Config,
    policy: Policy,
    state: TrainState,
    items: Sequence[TrainItem],
    mesh: Mesh,
    info: Callable[[str], None],
    done: int = 0,
    skipped: int = 0,
) -> Iterator[tuple[int, int, TrainState]]:
    """`supervised.updates` of AdamW on the mean token cross-entropy of solutions, in the order of
    the seed.

    Every solution comes once an epoch, whatever the weights of the data set that it is of.

    Each update is waited for, so that a stop waits for no more than one; the next one's rows are
    made meanwhile.

    Args: items: of `solution_items`. state: fresh, or after the first `done` of the updates, the
      last `skipped` of which had a loss or
        gradient that is not finite; donated.

    Yields (updates done, how many in a row were skipped up to this one, state) after each. Raises
    InputError at `optim.max_nonfinite_updates` in a row.
    """
    section = config.supervised
    longest = max(len(item.prompt) + len(item.response) for item in items)
    rows = config.train.rows_per_microbatch
    microbatches = max_microbatches(
        section.responses_per_update,
        row_len=row_len(config),
        max_item_len=longest,
        rows_per_microbatch=rows,
    )
    _, update = supervised_programs(config, policy.model, mesh)

    def batches() -> Iterator[TrainBatch]:
        _, cursor = advance(
            Cursor(), len(items), done * section.responses_per_update, seed=config.seed
        )
        for _ in range(done, section.updates):
            chosen, cursor = advance(
                cursor, len(items), section.responses_per_update, seed=config.seed
            )
            mine = [items[i] for i in chosen]
            weight = 1.0 / sum(len(item.response) for item in mine)
            mine = [item._replace(weight=weight) for item in mine]
            batch, _ = build_batch(
                mine,
                row_len=row_len(config),
                rows_per_microbatch=rows,
                microbatches=microbatches,
                row_shards=row_shards(mesh),
            )
            yield put_rows(batch, mesh, axis=1)

    coming = batches()
    batch = next(coming, None)
    for u in range(done + 1, section.updates + 1):
        rate = section.learning_rate * min(1.0, u / max(1, section.warmup_updates))
        state, sums = update(state, batch, np.float32(rate))
        batch = next(coming, None)
        skipped = skipped + 1 if float(sums["skipped"]) else 0  # waits
        if u % max(1, section.updates // 5) == 0 or u == section.updates:
            info(f"warm-up {u:>5}/{section.updates}  cross-entropy {float(sums['loss']):.4f}")
        if skipped >= config.optim.max_nonfinite_updates:
            trouble = f"{skipped} updates in a row had a loss or gradient that is not finite and were skipped"
            raise InputError(
                f"warm-up update {u}: {trouble}; lower supervised.learning_rate, or look at the solutions"
            )
        yield u, skipped, state


def main(argv: list[str] | None = None) -> int:
    """Trains on worked solutions (`supervised` section) and writes a Hugging Face folder."""
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.supervised", description=main.__doc__)
    parser.add_argument(
        "--config",
        required=True,
        help="YAML config; its `supervised`, `data` and `model` sections are used; problems of `eval.sets` are left out",
    )
    parser.add_argument(
        "--out", required=True, help="folder to write: config, safetensors, tokenizer"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. supervised.updates=500",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="only warnings, errors and the last line"
    )
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    if not config.supervised.updates:
        raise InputError(
            f"{args.config}: supervised.updates: is 0, so there is nothing to do; set it"
        )
    check_new(args.out)
    check_adapters(config.model)
    policy = load_policy(config)
    multihost.initialize()
    console = make_console(main=multihost.is_main(), quiet=args.quiet)
    info = console.info
    problems, reports = load_training(config.data)
    for report in reports:
        info(report.summary())
    prompts, _ = make_prompts(problems, policy.tokenizer, config.data, policy.model.vocab_size)
    unseen = not_held_out(prompts, load_sets(config, policy, info), info)
    if not unseen:
        raise InputError(
            f"data.train: all {len(prompts)} prompts are in eval.sets too, and nothing is left to train on; give more problems"
        )
    check_started_alike(config, policy, {"data.train": unseen}, {})
    items = solution_items(unseen, policy, config.rollout.max_response_len)
    mesh, lora = make_mesh(config.mesh), config.model.lora
    check_divides(config, mesh, rows=True)
    info(describe(policy, mesh, lora))
    state = supervised_programs(config, policy.model, mesh)[0](
        load_params(config, policy, mesh, lora=lora)
    )
    with Guard(config.train.stall_timeout_s) as guard:
        for _, _, warmed in warm_up(config, policy, state, items, mesh, info):  # noqa: B007 - the last one is used
            guard.reach("warm-up")
    host_params = multihost.fetch(merged(warmed.params, policy, lora, mesh))
    if multihost.is_main():
        save_pretrained(
            args.out,
            policy.model,
            host_params,
            source_folder=policy.folder,
            tokenizer=policy.tokenizer,
        )
    console.result(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
