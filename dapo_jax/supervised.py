"""Supervised warm-up: cross-entropy on worked solutions, with DAPO's packing and update."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from dapo_jax import cli
from dapo_jax.config import Config, SupervisedSection, load_config
from dapo_jax.dapo.packing import TrainItem, build_batch
from dapo_jax.data.inputs import load_data
from dapo_jax.data.problems import Cursor, advance
from dapo_jax.data.prompts import check_embedded
from dapo_jax.export import save_policy
from dapo_jax.model.weights import check_new
from dapo_jax.runtime import multihost
from dapo_jax.runtime.console import Console, announced, make_console, progress
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.mesh import make_mesh, put_rows
from dapo_jax.training import setup
from dapo_jax.training.programs import supervised_programs
from dapo_jax.training.setup import Policy
from dapo_jax.training.state import RunState, RunStore
from dapo_jax.types import InputError, Params, Prompt, TrainBatch, TrainState


def solution_items(
    config: Config, prompts: Sequence[Prompt], policy: Policy, info: Callable[[str], None]
) -> list[TrainItem]:
    """Prompts with worked solutions and the end token; [] for no warm-up. Solutions that are too
    long or hold control tokens, which would end a response, are left out and counted.
    """
    if not config.supervised.updates:
        return []
    solved = [prompt for prompt in prompts if prompt.problem.solution]
    if not solved:
        raise InputError(
            "data.train: no problem has a `solution`, which supervised warm-up needs; add them or "
            "set supervised.updates to 0"
        )
    tokenizer, vocab_size = policy.tokenizer, policy.model.vocab_size
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    solutions = [prompt.problem.solution for prompt in solved]
    tokenized, items = tokenizer(solutions, add_special_tokens=False)["input_ids"], []
    for prompt, ids in zip(solved, tokenized, strict=True):
        check_embedded(ids, vocab_size, tokenizer, f"the solution of problem {prompt.problem.id}")
        response = np.array([*ids, tokenizer.eos_token_id], np.int32)
        zeros = np.zeros(len(response), np.float32)
        if len(response) <= config.rollout.max_response_len and control.isdisjoint(ids):
            items.append(TrainItem(prompt.tokens, response, zeros, zeros, 0.0, 0.0))
    why = f"longer than rollout.max_response_len {config.rollout.max_response_len}"
    why += " tokens, or with control tokens"
    if not items:
        raise InputError(f"data.train: every solution is {why}; raise it, or remove them")
    if left := len(solved) - len(items):
        info(f"warm-up: {left:,} of {len(solved):,} solutions left out: {why}")
    return items


def warm_up(
    config: Config,
    policy: Policy,
    mesh: Mesh,
    items: Sequence[TrainItem],
    state: TrainState,
    console: Console,
    done: tuple[int, int] = (0, 0),
) -> Iterator[tuple[int, int, TrainState]]:
    """`supervised.updates` AdamW updates on the mean token cross-entropy of solutions.

    Each solution is used once per epoch, in the order of the seed; each update is awaited, so that
    a signal waits for one at most. items: of `solution_items`. state: fresh, or after `done`:
    updates, and how many of the last ones in a row were skipped as non-finite. Donated.

    Yields (updates done, skipped in a row, state) after each update. Raises InputError at
    `optim.max_nonfinite_updates` skipped in a row.
    """
    section, (updates, skipped) = config.supervised, done
    batches = _batches(config, mesh, items, updates)
    model = setup.adapted(policy.model, config.model.lora)
    update = supervised_programs(model, mesh, config.optim).update
    update = announced("update of the warm-up", update, console.info)
    batch = next(batches, None)
    with progress(section.updates, "warm-up", enabled=console.bars) as bar:
        for u in range(updates + 1, section.updates + 1):
            rate = section.learning_rate * min(1.0, u / max(1, section.warmup_updates))
            state, sums = update(state, batch, np.float32(rate))
            batch = next(batches, None)
            skipped = skipped + 1 if float(sums["skipped"]) else 0  # waits
            bar.update(u - bar.n)
            if u % max(1, section.updates // 5) == 0 or u == section.updates:
                loss = f"cross-entropy {float(sums['loss']):.4f}"
                console.info(f"warm-up {u:>5}/{section.updates}  {loss}")
            if skipped >= config.optim.max_nonfinite_updates:
                raise InputError(
                    f"warm-up update {u}: {skipped} updates in a row had a non-finite loss or "
                    "gradient and were skipped; lower supervised.learning_rate, or check the "
                    "solutions"
                )
            yield u, skipped, state


def warm_up_run(
    run: RunState,
    updates: Iterable[tuple[int, int, TrainState]],
    section: SupervisedSection,
    init_optimizer: Callable[[Params], TrainState],
    store: RunStore,
    guard: Guard,
) -> None:
    """Runs the remaining supervised `updates`, saves checkpoints, then resets the optimizer."""
    for done, skipped, state in updates:
        last = done == section.updates
        run.state = init_optimizer(state.params) if last else state
        run.progress = run.progress._replace(warmed=done, nonfinite=0 if last else skipped)
        guard.reach("warm-up")
        if last or done % section.save_every == 0:
            store.save(run)


def _batches(
    config: Config, mesh: Mesh, items: Sequence[TrainItem], done: int
) -> Iterator[TrainBatch]:
    """The batches of the updates after `done`, on the mesh."""
    size = config.supervised.responses_per_update
    longest = max(len(item.prompt) + len(item.response) for item in items)
    shape = setup.batch_shape(config, mesh, size, longest)
    _, cursor = advance(Cursor(), len(items), done * size, seed=config.seed)
    for _ in range(done, config.supervised.updates):
        chosen, cursor = advance(cursor, len(items), size, seed=config.seed)
        weight = 1.0 / sum(len(items[i].response) for i in chosen)
        weighted = [items[i]._replace(weight=weight) for i in chosen]
        yield put_rows(build_batch(weighted, **shape._asdict())[0], mesh, axis=1)


def main(argv: list[str] | None = None) -> int:
    """Trains on worked solutions (`supervised` section) and writes a Hugging Face folder."""
    parser = cli.parser("supervised", main.__doc__, "--config configs/tiny_cpu.yaml --out warm")
    used = "; its supervised, data and model sections are used, without eval.sets"
    said = "warnings, errors and the last line"
    cli.add_config(parser, used, "supervised.updates=500", said, required=True)
    out = "folder to write: config, safetensors, tokenizer"
    parser.add_argument("--out", required=True, help=out)
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    if not config.supervised.updates:
        raise InputError(f"{args.config}: supervised.updates: is 0; set how many")
    check_new(args.out)
    setup.check_adapters(config.model)
    policy = setup.load_policy(config)
    multihost.initialize()
    console = make_console(main=multihost.is_main(), quiet=args.quiet)
    info = console.info
    data = load_data(config.data, config.eval, policy.encoding, ("a warm-up", 1), info)
    setup.check_same_start(config, policy, {"data.train": data.prompts}, {})
    items = solution_items(config, data.prompts, policy, info)
    mesh, lora = make_mesh(config.mesh), config.model.lora
    setup.check_divides(config, mesh, rows=True)
    info(setup.describe(policy, mesh, lora))
    model = setup.adapted(policy.model, lora)
    init_optimizer = supervised_programs(model, mesh, config.optim).init_optimizer
    state = init_optimizer(setup.load_params(config, policy, mesh, lora=lora))
    with Guard(config.train.stall_timeout_s) as guard:
        for _, _, warmed in warm_up(config, policy, mesh, items, state, console):  # noqa: B007
            guard.reach("warm-up")
    params = multihost.fetch(setup.merged(warmed.params, policy, lora, mesh))
    if multihost.is_main():
        save_policy(args.out, policy, params, config.rollout)
    console.result(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
