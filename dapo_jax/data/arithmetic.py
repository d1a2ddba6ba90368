"""Chained arithmetic: an embedded data set whose solutions take one line a step, so that their
length varies.

    prompt   ((7+5)-3)*2      solution  7+5=12
    answer   18                         12-3=9
                                        9*2=18
                                        Answer: 18

Brackets make the order of evaluation explicit. At most one step multiplies, by 2 to 5, and no value
leaves -999..999. `mistake_rate` puts slips into the training solutions: who imitates them is as
careless, and has something to learn from rewards. `check_rate` puts lines into them that undo a
step (7+5=12 is followed by 12-5=7): who imitates them may choose how long to be.
"""

import random
from collections.abc import Collection, Iterator
from itertools import islice

from dapo_jax.config import ArithmeticConfig
from dapo_jax.types import InputError, Problem

_LIMIT = 999  # of absolute values
_MAX_STEPS = 100
_FACTORS = range(2, 6)
_INVERSE = {"+": "-", "-": "+", "*": "/"}

Step = tuple[str, int]  # operator and right operand
Chain = tuple[Step, ...]  # the first step is ("+", first operand): a chain starts from 0


def arithmetic_problems(config: ArithmeticConfig, *, heldout: bool) -> list[Problem]:
    """Distinct problems, a function of `config` alone. Training and held-out problems are disjoint.

    The held-out problems do not depend on how many training problems are asked for. Problems are
    spread evenly over min_steps..max_steps; where there are too few short ones, all are taken and
    longer ones make up for it. Raises InputError if the config asks for more distinct problems than
    there are, or for numbers above 999.
    """
    for name, bound in (("max_operand", _LIMIT), ("max_steps", _MAX_STEPS)):
        if getattr(config, name) > bound:
            raise InputError(
                f"data.arithmetic.{name}: {getattr(config, name)} exceeds {bound}; lower it"
            )
    chains = _distinct_chains(config, config.heldout_problems, (), "heldout")
    if heldout:
        return [_problem(chain) for chain in chains]
    chains = _distinct_chains(config, config.train_problems, frozenset(chains), "train")
    rng = random.Random(f"mistakes {config.seed}")
    return [_problem(chain, config.mistake_rate, config.check_rate, rng) for chain in chains]


def _distinct_chains(
    config: ArithmeticConfig, count: int, taken: Collection[Chain], split: str
) -> list[Chain]:
    """`count` distinct chains that are not in `taken`, in random order."""
    rng = random.Random(
        f"{split} {config.seed}"
    )  # seeding by text is the same on every platform and Python version
    chosen: list[Chain] = []
    for steps in range(config.min_steps, config.max_steps + 1):
        share = (count - len(chosen)) // (config.max_steps - steps + 1)
        few = list(
            islice(
                (c for c in _all_chains(steps, config.max_operand) if c not in taken), 4 * share + 1
            )
        )
        if (
            len(few) <= 4 * share
        ):  # so few exist that drawing at random would keep hitting the same ones
            chosen += rng.sample(few, min(share, len(few)))
        else:
            fresh: dict[Chain, None] = {}
            while len(fresh) < share:
                chain = _random_chain(steps, config.max_operand, rng)
                if chain not in taken:
                    fresh[chain] = None
            chosen += fresh
    if len(chosen) < count:
        raise InputError(
            f"data.arithmetic.{split}_problems: {count} asked for, but only {len(chosen)} distinct ones exist; "
            "raise data.arithmetic.max_steps or max_operand"
        )
    rng.shuffle(chosen)
    return chosen


def _apply(value: int, step: Step) -> int:
    operator, operand = step
    return (
        value + operand
        if operator == "+"
        else value - operand
        if operator == "-"
        else value * operand
    )


def _moves(value: int, multiply: bool, max_operand: int) -> Iterator[Step]:
    steps = [(o, n) for o in "+-" for n in range(1, max_operand + 1)] + [
        ("*", n) for n in _FACTORS if multiply
    ]
    return (step for step in steps if abs(_apply(value, step)) <= _LIMIT)


def _all_chains(
    steps: int, max_operand: int, chain: Chain = (), value: int = 0, multiply: bool = False
) -> Iterator[Chain]:
    """Every chain that continues `chain` by so many steps."""
    if not chain:
        for first in range(1, max_operand + 1):
            yield from _all_chains(steps, max_operand, (("+", first),), first, True)
    elif not steps:
        yield chain
    else:
        for step in _moves(value, multiply, max_operand):
            yield from _all_chains(
                steps - 1,
                max_operand,
                (*chain, step),
                _apply(value, step),
                multiply and step[0] != "*",
            )


def _random_chain(steps: int, max_operand: int, rng: random.Random) -> Chain:
    value = rng.randint(1, max_operand)
    chain: list[Step] = [("+", value)]
    operators = "++--*"
    while len(chain) <= steps:
        operator = rng.choice(operators)
        step = (operator, rng.choice(_FACTORS) if operator == "*" else rng.randint(1, max_operand))
        if abs(after := _apply(value, step)) <= _LIMIT:
            chain.append(step)
            value = after
            operators = operators.replace("*", "") if operator == "*" else operators
    return tuple(chain)


def _problem(
    chain: Chain,
    mistake_rate: float = 0.0,
    check_rate: float = 0.0,
    rng: random.Random | None = None,
) -> Problem:
    """The problem of a chain.

    Its solution may slip by up to 9 in a step and go on from there, and check steps; its answer is
    right.
    """
    (_, first), *steps = chain
    prompt, right, written, lines = str(first), first, first, []
    for i, step in enumerate(steps):
        right, before, written = _apply(right, step), written, _apply(written, step)
        if rng is not None and rng.random() < mistake_rate:
            written += rng.choice((-1, 1)) * rng.randint(1, 9)
        lines.append(f"{before}{step[0]}{step[1]}={written}")
        if rng is not None and check_rate and rng.random() < check_rate:
            lines.append(f"{written}{_INVERSE[step[0]]}{step[1]}={before}")
        prompt = (f"({prompt})" if i else prompt) + f"{step[0]}{step[1]}"
    return Problem(
        id=prompt,
        prompt=prompt,
        answer=str(right),
        solution="\n".join([*lines, f"Answer: {written}"]),
    )
