"""The embedded arithmetic generator, checked against an evaluator of its own and against brute
force.
"""

import ast
import itertools
import operator
import re
from collections import Counter

import pytest
from refusals import refusal

from dapo_jax.config import ArithmeticConfig
from dapo_jax.data.arithmetic import arithmetic_problems

pytestmark = pytest.mark.host

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def evaluate(expression):
    """Value, and every operation as (left, operator, right, result) in order of evaluation, by
    Python's own grammar.
    """
    done = []

    def value(node):
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            result = OPERATORS[type(node.op)](left, right)
            done.append(
                (left, {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}[type(node.op)], right, result)
            )
            return result
        assert isinstance(node, ast.Constant)
        return node.value

    return value(ast.parse(expression, mode="eval").body), done


def steps_of(problem):
    return len(problem.solution.splitlines()) - 1


@pytest.fixture(scope="module")
def default():
    config = ArithmeticConfig()
    return (
        config,
        arithmetic_problems(config, heldout=False),
        arithmetic_problems(config, heldout=True),
    )


def test_prompts_answers_and_solutions_agree_with_an_independent_evaluator(default):
    config, train, heldout = default
    for p in itertools.chain(train[:3000], heldout):
        value, operations = evaluate(p.prompt)
        assert p.answer == str(value)
        assert p.solution.splitlines() == [f"{a}{op}{b}={c}" for a, op, b, c in operations] + [
            f"Answer: {value}"
        ]
        assert all(abs(c) <= 999 for *_, c in operations)
        assert [op for _, op, _, _ in operations].count("*") <= 1
        for _, op, right, _ in operations:
            assert 2 <= right <= 5 if op == "*" else 1 <= right <= config.max_operand
        assert config.min_steps <= len(operations) <= config.max_steps
        assert len(p.prompt) <= 24


def test_known_problems():
    count = sum(1 for steps in (1, 2) for _ in brute_force(1, steps))
    config = ArithmeticConfig(
        train_problems=count - 1, heldout_problems=1, max_steps=2, max_operand=1
    )
    everything = arithmetic_problems(config, heldout=False) + arithmetic_problems(
        config, heldout=True
    )
    solutions = {p.prompt: (p.solution, p.answer) for p in everything}
    assert solutions["1-1"] == ("1-1=0\nAnswer: 0", "0")
    assert solutions["(1+1)*3"] == ("1+1=2\n2*3=6\nAnswer: 6", "6")
    assert solutions["(1-1)-1"] == ("1-1=0\n0-1=-1\nAnswer: -1", "-1")


def test_sizes_distinct_and_disjoint(default):
    config, train, heldout = default
    assert (len(train), len(heldout)) == (config.train_problems, config.heldout_problems)
    assert (
        len({p.prompt for p in train + heldout})
        == len({p.id for p in train + heldout})
        == len(train) + len(heldout)
    )


def test_a_function_of_the_config_alone():
    config = ArithmeticConfig(train_problems=200, heldout_problems=40, seed=3)
    for heldout in (False, True):
        assert arithmetic_problems(config, heldout=heldout) == arithmetic_problems(
            config, heldout=heldout
        )
    other = ArithmeticConfig(train_problems=200, heldout_problems=40, seed=4)
    assert arithmetic_problems(config, heldout=True) != arithmetic_problems(other, heldout=True)
    assert arithmetic_problems(config, heldout=False) != arithmetic_problems(other, heldout=False)


def test_the_same_on_every_platform_and_version(default):
    _, train, heldout = default
    assert [p.prompt for p in train[:4]] == ["(19*4)+15", "(17-15)-17", "(16+6)-4", "((1-9)-13)-15"]
    assert [p.prompt for p in heldout[:4]] == [
        "(((4-15)*3)+2)+19",
        "((7*3)+4)+5",
        "(5+11)-13",
        "(((20+12)*2)-11)+14",
    ]


def test_heldout_problems_do_not_depend_on_how_many_are_trained_on():
    few, many = (ArithmeticConfig(train_problems=n, heldout_problems=64) for n in (10, 5000))
    heldout = arithmetic_problems(few, heldout=True)
    assert heldout == arithmetic_problems(many, heldout=True)
    assert not {p.prompt for p in heldout} & {
        p.prompt for p in arithmetic_problems(many, heldout=False)
    }


def test_steps_are_spread_evenly():
    config = ArithmeticConfig(train_problems=1000, heldout_problems=40, min_steps=2, max_steps=6)
    assert Counter(map(steps_of, arithmetic_problems(config, heldout=False))) == {
        n: 200 for n in range(2, 7)
    }
    assert Counter(map(steps_of, arithmetic_problems(config, heldout=True))) == {
        n: 8 for n in range(2, 7)
    }


def test_short_problems_run_out_and_longer_ones_make_up_for_it(default):
    _, train, heldout = default
    one_step = 20 * (20 + 20 + 4)  # first operand x (plus, minus, factors 2 to 5)
    assert Counter(map(steps_of, train))[1] == one_step - Counter(map(steps_of, heldout))[1]
    longer = [Counter(map(steps_of, train))[n] for n in (2, 3, 4)]
    assert max(longer) - min(longer) <= 1


def test_order_is_mixed(default):
    _, train, _ = default
    assert set(map(steps_of, train[:200])) == {1, 2, 3, 4}


def brute_force(max_operand, steps):
    """Every distinct problem of so many steps, as text."""
    moves = [f"{op}{n}" for op in "+-" for n in range(1, max_operand + 1)] + [
        f"*{n}" for n in range(2, 6)
    ]
    for first in range(1, max_operand + 1):
        for chain in itertools.product(moves, repeat=steps):
            if sum(move[0] == "*" for move in chain) > 1:
                continue
            text = str(first)
            for i, move in enumerate(chain):
                text = (f"({text})" if i else text) + move
            if all(abs(c) <= 999 for *_, c in evaluate(text)[1]):
                yield text


@pytest.mark.parametrize("max_operand, max_steps", [(1, 1), (1, 3), (3, 2)])
def test_all_problems_there_are_and_not_one_more(max_operand, max_steps):
    everything = {text for n in range(1, max_steps + 1) for text in brute_force(max_operand, n)}
    config = {"max_operand": max_operand, "max_steps": max_steps, "heldout_problems": 2}
    fits = ArithmeticConfig(train_problems=len(everything) - 2, **config)
    made = arithmetic_problems(fits, heldout=False) + arithmetic_problems(fits, heldout=True)
    assert sorted(p.prompt for p in made) == sorted(everything)
    with refusal("data.arithmetic.train_problems...distinct"):
        arithmetic_problems(
            ArithmeticConfig(train_problems=len(everything) - 1, **config), heldout=False
        )


def test_values_stay_in_range_with_large_operands():
    config = ArithmeticConfig(
        train_problems=300, heldout_problems=1, min_steps=3, max_steps=5, max_operand=999
    )
    for p in arithmetic_problems(config, heldout=False):
        assert all(abs(c) <= 999 for *_, c in evaluate(p.prompt)[1])


def test_long_chains():
    config = ArithmeticConfig(train_problems=5, heldout_problems=1, min_steps=80, max_steps=80)
    assert [steps_of(p) for p in arithmetic_problems(config, heldout=False)] == [80] * 5


def test_mistakes_are_in_training_solutions_only():
    config = ArithmeticConfig(
        train_problems=3000, heldout_problems=50, min_steps=2, max_steps=4, mistake_rate=0.25
    )
    clean = ArithmeticConfig(train_problems=3000, heldout_problems=50, min_steps=2, max_steps=4)
    train = arithmetic_problems(config, heldout=False)
    assert arithmetic_problems(config, heldout=True) == arithmetic_problems(clean, heldout=True)
    assert [(p.prompt, p.answer) for p in train] == [
        (p.prompt, p.answer) for p in arithmetic_problems(clean, heldout=False)
    ]
    slips = []
    for p in train:
        *lines, last = p.solution.splitlines()
        written = int(p.prompt.replace("(", "").split("+")[0].split("-")[0].split("*")[0])
        for line, (_, op, right, _) in zip(lines, evaluate(p.prompt)[1], strict=True):
            left, result = written, int(line.split("=")[1])
            assert (
                line == f"{left}{op}{right}={result}"
            )  # continues from what was written, right or wrong
            slips.append(result - evaluate(f"({left}){op}{right}".replace("(-", "(0-"))[0])
            written = result
        assert last == f"Answer: {written}"
    assert set(slips) == set(range(-9, 10))
    rate = sum(s != 0 for s in slips) / len(slips)
    assert abs(rate - 0.25) < 4 * (0.25 * 0.75 / len(slips)) ** 0.5


def undone(line):
    """The check of a line: 7+5=12 is undone by 12-5=7."""
    left, op, right, result = re.fullmatch(r"(-?\d+)([-+*])(\d+)=(-?\d+)", line).groups()
    return f"{result}{ {'+': '-', '-': '+', '*': '/'}[op] }{right}={left}"


def test_checks_undo_the_step_above_them():
    config = ArithmeticConfig(
        train_problems=2000, heldout_problems=50, min_steps=2, max_steps=4, check_rate=0.25
    )
    plain = ArithmeticConfig(train_problems=2000, heldout_problems=50, min_steps=2, max_steps=4)
    checks = steps = 0
    for p, q in zip(
        arithmetic_problems(config, heldout=False),
        arithmetic_problems(plain, heldout=False),
        strict=True,
    ):
        assert (p.prompt, p.answer) == (q.prompt, q.answer)
        lines, (*plain_lines, answer) = p.solution.splitlines(), q.solution.splitlines()
        if any(undone(line) == after for line, after in itertools.pairwise(plain_lines)):
            continue  # a problem that undoes its own step
        for line in plain_lines:
            assert lines.pop(0) == line
            steps += 1
            if lines[0] == undone(line):
                checks += bool(lines.pop(0))
        assert lines == [answer]
    assert steps > 5000 and abs(checks / steps - 0.25) < 4 * (0.25 * 0.75 / steps) ** 0.5


@pytest.mark.parametrize(
    "key, value", [("max_operand", 1000), ("max_steps", 101), ("heldout_problems", 7)]
)
def test_configs_that_ask_for_too_much(key, value):
    config = ArithmeticConfig(**{"max_steps": 1, "max_operand": 1, key: value})
    with refusal(f"data.arithmetic.{key}"):
        arithmetic_problems(config, heldout=True)
