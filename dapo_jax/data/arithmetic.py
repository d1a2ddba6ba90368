"""Chained arithmetic: an embedded data set whose solutions take one line per step, so that their
length varies.

    prompt   ((7+5)-3)*2      solution  7+5=12
    answer   18                         12-3=9
                                        9*2=18
                                        Answer: 18

At most one step multiplies, by 2 to 5, and no value leaves -999..999. `mistake_rate` adds wrong
steps to the training solutions, so that a policy that imitates them has something to learn from
rewards. `check_rate` adds lines that undo a step (7+5=12 is followed by 12-5=7).
"""

import random
from collections.abc import Collection, Iterator
from itertools import islice

from dapo_jax.config import ArithmeticConfig
from dapo_jax.types import InputError, Problem

_LIMIT = 999  # of absolute values
_BOUNDS = {"max_operand": _LIMIT, "max_steps": 100}
_FACTORS = range(2, 6)
_INVERSE = {"+": "-", "-": "+", "*": "/"}

Step = tuple[str, int]  # operator and right operand
Chain = tuple[Step, ...]  # the first step is ("+", first operand): a chain starts from 0


def arithmetic_problems(config: ArithmeticConfig, *, heldout: bool) -> list[Problem]:
    """Distinct problems, a function of `config` alone. Training and held-out problems are disjoint.

    Held-out problems do not depend on the number of training problems. Problems are spread evenly
    over min_steps..max_steps; where there are too few short ones, longer ones replace them. Raises
    InputError if there are not as many distinct problems, or for numbers above 999.
    """
    for name, bound in _BOUNDS.items():
        if (value := getattr(config, name)) > bound:
            raise InputError(f"data.arithmetic.{name}: {value} exceeds {bound}; lower it")
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
    rng = random.Random(f"{split} {config.seed}")  # text seeds alike in every version of Python
    chosen: list[Chain] = []
    for steps in range(config.min_steps, config.max_steps + 1):
        share = (count - len(chosen)) // (config.max_steps - steps + 1)
        every = (c for c in _all_chains(steps, config.max_operand) if c not in taken)
        few = list(islice(every, 4 * share + 1))
        if len(few) <= 4 * share:  # random chains would repeat
            chosen += rng.sample(few, min(share, len(few)))
            continue
        fresh: dict[Chain, None] = {}
        while len(fresh) < share:
            chain = _random_chain(steps, config.max_operand, rng)
            if chain not in taken:
                fresh[chain] = None
        chosen += fresh
    if len(chosen) < count:
        where = f"data.arithmetic.{split}_problems: {count} exceeds the {len(chosen)} distinct ones"
        raise InputError(f"{where}; raise data.arithmetic.max_steps or max_operand")
    rng.shuffle(chosen)
    return chosen


def _apply(value: int, step: Step) -> int:
    operator, operand = step
    return value * operand if operator == "*" else value + int(f"{operator}{operand}")


def _all_chains(steps: int, max_operand: int, chain: Chain = (), value: int = 0) -> Iterator[Chain]:
    """Every chain that continues `chain`, whose value is given, up to so many steps."""
    if len(chain) > steps:
        yield chain
        return
    operators = "+" if not chain else "+-" if any(step[0] == "*" for step in chain) else "+-*"
    for operator in operators:
        for operand in _FACTORS if operator == "*" else range(1, max_operand + 1):
            after = _apply(value, (operator, operand))
            if abs(after) <= _LIMIT:
                yield from _all_chains(steps, max_operand, (*chain, (operator, operand)), after)


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
    chain: Chain, mistakes: float = 0.0, checks: float = 0.0, rng: random.Random | None = None
) -> Problem:
    """The problem of a chain. Its solution has mistakes of up to 9, from which it continues, and
    checks at these rates; its answer is correct."""
    (_, first), *steps = chain
    prompt, correct, written, lines = str(first), first, first, []
    for i, step in enumerate(steps):
        correct, before, written = _apply(correct, step), written, _apply(written, step)
        if rng is not None and rng.random() < mistakes:
            written += rng.choice((-1, 1)) * rng.randint(1, 9)
        lines.append(f"{before}{step[0]}{step[1]}={written}")
        if rng is not None and checks and rng.random() < checks:
            lines.append(f"{written}{_INVERSE[step[0]]}{step[1]}={before}")
        prompt = (f"({prompt})" if i else prompt) + f"{step[0]}{step[1]}"
    return Problem(prompt, prompt, str(correct), "\n".join([*lines, f"Answer: {written}"]))
