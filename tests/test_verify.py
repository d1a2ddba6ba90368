r"""The verifiers, on the examples that the released rule is known by and on hostile text."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal

from dapo_jax.reward.verify import (
    check_verdict,
    extract_answer,
    lenient_judgement,
    lenient_verify,
    load_function,
    normalize_answer,
    strict_verify,
)
from dapo_jax.types import Problem, Verdict, canonical_answer

pytestmark = pytest.mark.host

RIGHT = [
    ("Answer: 42", "42"),
    ("Answer: $42$", "42"),
    (r"Answer: \boxed{42}", "42"),
    ("answer : 42 degrees", "42"),
    ("Answer: x = 42", "42"),
    ("Answer: 41\nAnswer: 42", "42"),
    ("Answer:\n42", "42"),
    (r"Answer: 42 \text{ cm}", "42"),
    ("Answer: 1,024", "1024"),
    ("Answer: -7", "-7"),
    (r"Answer: \frac12", r"\frac{1}{2}"),
]
WRONG = [
    "Answer: 42.0",
    "Answer: 042",
    "Answer: 42.",
    "Answer: **42**",
    "**Answer:** 42",
    r"\boxed{42}",
    "The answer is 42",
    "Answer: 42<|im_end|>",
    "Answer: 42 (mod 1000)",
    "Answer: 42" + "." * 300,
    "Answer: 42\n" + "x" * 300,
    "",
    "Answer:",
    "Answer: ",
]


@pytest.mark.parametrize(("response", "truth"), RIGHT)
def test_strict_accepts(response, truth):
    assert strict_verify("Let me think.\n" * 100 + response, truth) is True
    assert extract_answer(response) == truth


@pytest.mark.parametrize("response", WRONG)
def test_strict_refuses(response):
    assert strict_verify(response, "42") is False


@pytest.mark.parametrize(
    ("gold", "canonical"),
    [
        ("025", "25"),
        ("$073$", "$73$"),
        ("-007", "-7"),
        ("000", "0"),
        ("0101", "101"),
        ('["34"]', "34"),
        (' [ "025" ] ', "25"),
        *(
            (same, same)
            for same in (
                "0",
                "0.5",
                "000.5",
                "0x1",
                "007 km",
                "1,024",
                "[34]",
                '["1", "2"]',
                '[["3"]]',
                '["3"',
                "",
            )
        ),
        ('["' * 100_000, '["' * 100_000),
        ("0" * 2**20 + "x", "0" * 2**20 + "x"),
    ],
)
def test_canonical_answer(gold, canonical):
    assert canonical_answer(gold) == canonical


@pytest.mark.parametrize(
    ("response", "gold"),
    [("So.\nAnswer: 25", "025"), ("So.\nAnswer: $73$", "073"), ("Answer: 34", '["34"]')],
)
def test_verifiers_read_the_ground_truth_in_canonical_form(response, gold):
    """As AIME 2024 (`025`) and Skywork-OR1 (`["34"]`) have it.

    The rule for responses stays: `Answer: 042` is not 42.
    """
    assert strict_verify(response, gold) is True
    assert lenient_verify(response, gold) is True


def test_strict_looks_at_the_last_300_characters():
    assert strict_verify("Answer: 42\n" + "x" * (300 - len("Answer: 42\n")), "42")
    assert not strict_verify("Answer: 42\n" + "x" * (301 - len("Answer: 42\n")), "42")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (r"x = \boxed{1{,}024} \text{ cm}", "1024"),
        ("a dog", "dog"),
        ("$1,000,000$ dollars", "1000000"),
        ("-1,024", "-1024"),
        ("-1,024-x", "-1,024-x"),
        ("(1,024)", "(1,024)"),  # no number, so its comma stays
        (r"\frac{3}{4}", r"\frac{3}{4}"),
        (r"\frac34x", r"\frac{3}{4}x"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\sqrt{3}", r"\sqrt{3}"),
        (r"\text{east}", "east"),
        (r"\mbox{east}", "east"),
        (r"\textbf{east}", "east"),
        (r"\overline{AB}", "AB"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("the sum is $5$, or $6$", "5"),
        (r"45^\circ", "45"),
        (r"45^{\circ}", "45"),
        (r"12 \text{m}^2", "12"),
        (r"x\text{ and }y", "x,y"),
        (r"x,\text{ and }y", "x,y"),
        (r"\$18", "18"),
        ("18 mph", "18"),
        (r"5\;", "5"),
        ('"5"', "5"),
        ("$5.$", "5"),
        ("  5\n", "5"),
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


REMOVED = (  # REMOVED_EXPRESSIONS of the released rule (verl, math_dapo.py)
    *"square ways integers dollars mph inches hours km units sue points feet minutes".split(),
    *"digits cents degrees cm gm pounds meters meals edges students childrentickets".split(),
    *r"multiples \ldots \text{s} \text{.} \text{}^2 \text{}^3 \text{} \mathrm{th}".split(),
    *r"^\circ ^{\circ} \; ,\! {,} \dots".split(),
    *('"', "\\text{\ns}", "\\text{\n}"),
)


def test_normalisation_removes_what_the_released_rule_removes():
    found = {text: normalize_answer(f"12 {text}") for text in REMOVED}
    assert found == dict.fromkeys(REMOVED, "12")


def test_a_text_of_more_than_4096_characters_is_left_as_it_is():
    assert normalize_answer("a " * 2047 + "12") == "12"
    assert normalize_answer("a " * 2047 + " 12") == "a " * 2047 + " 12"


def test_no_answer_line_is_no_answer():
    assert extract_answer("The answer is 42") is None
    assert extract_answer("") is None
    assert not strict_verify("", "")


@given(st.text(), st.text())
def test_strict_never_raises(response, truth):
    assert isinstance(strict_verify(response, truth), bool)
    assert isinstance(normalize_answer(truth), str)


PIECES = [
    "Answer:",
    *r"\boxed{ \text{ \frac \sqrt { } $ \$ = , . 1 42 a \ \circ ^".split(),
    " ",
    "\n",
    "\r",
    "\ud800",
]
TEX = st.lists(st.sampled_from(PIECES)).map("".join)


@given(TEX, TEX)
def test_strict_never_raises_on_broken_tex(response, truth):
    assert isinstance(strict_verify("Answer:" + response, truth), bool)
    assert isinstance(extract_answer(response), str | None)


HOSTILE = [
    "a ",
    "=",
    "$",
    r"\text{",
    r"\boxed{",
    "frac",
    "Answer:",
    "Answer ",
    "Answer:\n",
    "9",
    "{",
    "\ud800",
    "\0",
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_strict_is_fast_on_hostile_text(unit):
    text = unit * (2**20 // len(unit))
    began = time.process_time()
    for truth in (text, text[:4096], "42"):
        assert not strict_verify(text + "Answer: 43", truth)
        normalize_answer(truth)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        *RIGHT,
        ("Answer: 42.0", "42"),
        ("Answer: 042", "42"),
        ("Answer: 42.", "42"),
        ("Answer: **42**", "42"),
        ("**Answer:** 42", "42"),
        (r"\boxed{1/2}", r"\frac{1}{2}"),
        (r"Answer: \boxed{1/2}", r"\frac{1}{2}"),
        ("Answer: 0.5", r"\frac{1}{2}"),
        (r"Answer: 2\sqrt{3}", r"\sqrt{12}"),
        ("Answer: x^2+1", "1+x^2"),
        ("Answer: (1, 2)", "(1,2)"),
        ("Answer: $$\n42\n$$", "42"),
        ("Answer: 42\nand not $41$", "42"),
        ("Answer: \\[\n42\n\\]\nand not \\boxed{41}", "42"),
        ("Answer: east", "east"),
    ],
)
def test_lenient_accepts(response, truth):
    assert lenient_verify("Let $x = 5$.\n" * 400 + response, truth) is True


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("Answer: 43", "42"),
        ("Answer: 42\nAnswer: 43", "42"),
        ("Answer: \\[\n42\n\\]\nand not \\boxed{41}", "41"),
        (r"Answer: 2\sqrt{3}", "2"),
        ("Answer: x^2+1", "3"),
        ("Answer: (1,2)", "(2,1)"),
        ("Answer: 41, 42", "42"),
        ("Answer: west", "east"),
        (r"\boxed{42}" + "." * 2000, "42"),
        ("", "42"),
        ("Answer: 42", ""),
        ("Answer: 5", "9" * 5000),
        (r"Answer: \frac{", "42"),
        ("\ud800", "42"),
    ],
)
def test_lenient_refuses(response, truth):
    assert lenient_verify(response, truth) is False


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        # a marked answer, whatever marks it
        ("<think>9*8</think><answer>72</answer>", "72"),
        ("<think>Answer: 5</think><answer>\nAnswer: $72$\n</answer>", "72"),
        ("<answer>72", "72"),
        ("<ANSWER>71</ANSWER> <ANSWER>72</ANSWER>", "72"),
        ("We add.\n**Answer:**\n\n\\[\n\\boxed{72}\n\\]", "72"),
        ("We add.\n**Final Answer:**\n\n$$\\boxed{72}$$", "72"),
        ("We add.\n**Answer:**\n72", "72"),
        ("**Answer**: 72", "72"),
        ("Answer: `72`", "72"),
        ("**Answer: `72`**", "72"),
        ("__Answer:__ 72", "72"),
        ("Answer: 41\nAnswer:", "41"),
        ("Answer: Monday.", "Monday"),
        ("Answer: true", "True"),
        (r"Answer: $False$", "false"),
        ("Answer: 5 km, 6 km", "5 km, 6 km"),
        # lists, with and without dollars
        *(
            (form.format("3,2,1"), "1,2,3")
            for form in ("Answer: {}", "Answer: ${}$", "\\boxed{{{}}}", "${}$", "{}")
        ),
        ("Answer: 48 and 384", "$48$, $384$"),
        (r"Answer: $48\mbox{ or }384$", "$48$, and $384$"),
        ("Answer: x=1 or x=-2", "x=1, x=-2"),
        (r"Answer: $12\text{ and }13$", "12, 13"),
        # what math-verify compares as text, because its reading has no value
        ("Answer: 12:00", "12:00"),
        ("Answer: $12:00$", "12:00"),
        # numbers
        (r"So $\boxed{4.5 \times 10^{33}}$.", "4.5e33"),
        (r"So $\boxed{4.5e33}$.", r"4.5 \times 10^{33}"),
        ("Answer: 8.7 x 10^8", "8.7e8"),
        ("Answer: 870000000", "8.7e8"),
        ("Answer: -870000000", "-8.7e8"),
        ("Answer: 0.333333", "1/3"),
        ("Answer: 0.000000100000001", "0.0000001"),
        (r"Answer: \frac{1}{2006!}", r"\frac{1}{2006!}"),
        ("Answer: 8.7 × 10^{-8}", "8.7e-8"),
        ("Answer: 2.5x10^-3", "2.5E-3"),
        ("Answer: 870", "8.7e+2"),
        ("Answer: 1 024", "1024"),
        ("Answer: 1 000 000", "1000000"),
        (r"Answer: \$1,024.50", "1024.50"),
        ("Answer: √49\nwhich is \\boxed{7}", "7"),  # the first reading is text, the last a value
    ],
)
def test_lenient_finds_and_compares(response, truth):
    assert lenient_verify(response, truth) is True


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        # a part of the answer
        ("Answer: 0", "x + y - z + 2 = 0"),
        ("Answer: $48$", "$48$, $384$"),
        ("Answer: x=-2", "x=1, x=-2"),
        ("Answer: $x=1$", "$x=1$ or $x=-2$"),
        ("Answer: 5x=0", "x^{2}-4 x-2=0"),
        ("Answer: 1", r"$\frac{x^{2}}{2} - \frac{y^{2}}{2} = 1$"),
        ("Answer: f(x)=x+1", "$f(x)=-1$,$f(x)=x+1$"),
        ("Answer: 2", "(x,y)=(1,2)"),
        (r"Answer: 1+\sqrt{2}", r"1 \pm \sqrt{2}"),
        # more than the answer
        ("Answer: 41 or 42", "41"),
        ("Answer: 41 or 42", "42"),
        ("<answer>7 or 72</answer>", "72"),
        ("<answer>72</answer>\nAnswer: 71", "72"),
        # another value
        ("Answer: (3,2,1)", "(1,2,3)"),
        ("Answer: 1:00", "12:00"),
        ("Answer: false", "True"),
        (r"\boxed{6.6\times 10^{-34}}", r"9.1\times 10^{-31}"),
        (r"\boxed{0.0000001}", "0.0000002"),
        ("Answer: (0.0000001, 2)", "(0.0000002, 2)"),
        ("Answer: 0", "0.0000001"),
        ("Answer: 0.0000001", "0"),
        (r"\boxed{\frac{1}{2006!}}", r"\frac{1}{2004!}"),
        ("Answer: 10^{-2000}", "0.0000001"),
        ("Answer: 0.3333", "1/3"),
        ("Answer: 870000001", "8.7e8"),
        ("Answer: 10000000000001.0", "10000000000000"),
    ],
)
def test_lenient_accepts_no_part_and_no_other_value(response, truth):
    assert lenient_verify(response, truth) is False


@pytest.mark.parametrize(
    ("response", "correct", "answered"),
    [
        ("Answer: 72", True, True),  # the same text
        ("Answer: 144/2", True, True),  # the same value
        ("Answer: 71", False, True),
        ("Answer: unknown", False, True),  # marked, though without a value
        (r"So it is $\boxed{71}$, I think.", False, True),  # not marked, found
        ("I do not know what to say.", False, False),
        ("", False, False),
    ],
)
def test_whether_a_response_has_an_answer(response, correct, answered):
    assert lenient_judgement(response, "72") == (correct, answered)


# The rows of math-verify's own table that `lenient` judges otherwise: the first 40 characters of
# gold and prediction, what the table says, and why.
EXCEPTIONS = {
    ("1000.99", "1000,99", True): "a comma separates values or thousands, not decimals",
    ("1,22", "1.22", True): "the same",
    (
        "$9$",
        "Answer $ \n 9 \n $",
        False,
    ): "the table reads TeX alone there, and wants it on one line",
    ("$9$", "Answer \\( \n 9 \n \\)", False): "the same",
    (
        "$(\\begin{pmatrix}\\frac{1}{3}\\\\ \\frac{1}{",
        "$\\begin{pmatrix}0.33\\\\0.2 \\end{pmatrix}$",
        True,
    ): "compared to 2 decimals there",
    ("$(\\frac{3}{5},\\frac{8}{3}]$", "$(0.6,2.6667]$", True): "the same",
    (
        "$x \\in [-2,7]$",
        "$-2 \\\\le x \\\\le 7$",
        True,
    ): "an option there; without it the table says False too",
    ("$f(x)$", "$f(y)$", True): "an option there, by which variables do not matter",
    (
        "Let the percentage of people in Mathopol",
        "Let's denote the total number of adults ",
        True,
    ): "no answer in the last 2,000 characters",
    (
        "\\\\boxed{W(n) = 1 \\\\text{ and } W(n) = -1",
        "W(x)=1orW(x)=-1",
        True,
    ): "the gold is cut off, and has no value",
    (
        "$1 - \\frac{1}{\\mathrm{e}}$",
        "$1 + \\frac{1}{\\mathrm{e}}$",
        True,
    ): "the values differ; the table notes what math-verify says",
}


@pytest.mark.slow
def test_lenient_agrees_with_the_table_of_math_verify():
    rows = json.loads((Path(__file__).parent / "goldens/math_verify.json").read_text())
    assert len(rows) == 265
    differ = {
        (gold[:40], pred[:40], equal)
        for gold, pred, equal in rows
        if lenient_verify(pred, gold) is not equal
    }
    assert differ == set(EXCEPTIONS)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        ((True, 1.0), Verdict(True, 1.0)),
        ((np.bool_(False), np.float32(-0.5)), Verdict(False, -0.5)),
        ((False, 2), Verdict(False, 2.0)),
        (Verdict(True, 0.25), Verdict(True, 0.25)),
        (Verdict(False, 0.0, None, False), Verdict(False, 0.0, None, False)),
        ((True, -3.4028234663852886e38), Verdict(True, -3.4028234663852886e38)),
        (Verdict(False, -1.0, "no\nidea"), Verdict(False, -1.0, "no idea")),
    ],
)
def test_verdicts_of_custom_functions(value, verdict):
    checked = check_verdict(value)
    assert checked == verdict
    assert type(checked.correct) is bool and type(checked.score) is float


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "must return .*NoneType"),
        ("right", "must return .*str"),
        (True, "must return .*bool"),
        ((True,), "must return .*tuple of 1"),
        ((True, 1.0, None), "must return .*tuple of 3"),
        ((1, 1.0), "correct must be True or False, not int"),
        (("yes", 1.0), "correct must be True or False, not str"),
        ((True, None), "score must be a number, not NoneType"),
        ((True, "1"), "score must be a number, not str"),
        ((True, True), "score must be a number, not bool"),
        ((True, np.ones(2)), "score must be a number, not ndarray"),
        ((True, float("nan")), "finite in float32, got nan"),
        ((True, float("-inf")), "finite in float32, got -inf"),
        ((True, 1e39), r"finite in float32, got 1e\+39"),
        ((True, 10**400), "finite in float32, got inf"),
        (Verdict(True, 1.0, 3), "error must be text or None, not int"),
    ],
)
def test_useless_verdicts_are_explained(value, says):
    with pytest.raises(ValueError, match=says):
        check_verdict(value)


@pytest.fixture
def helper_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_load_function(helper_on_path):
    function = load_function("reward_functions:judge", ["reward_functions"])
    assert function(Problem("p", "1+1?", "2"), "2", 5) == (True, 0.5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("os:system", "'os' ...reward.allowed_modules"),
        ("reward_functions.os:system", "'reward_functions.os' ...reward.allowed_modules"),
        ("reward_functions", "package.module:function"),
        ("reward_functions:os.system", "package.module:function"),
        ("missing_module:judge", "'missing_module' (ModuleNotFoundError"),
        ("reward_functions:missing", "has no 'missing'"),
        ("reward_functions:not_callable", "is a int"),
    ],
)
def test_unusable_functions_are_bad_input(helper_on_path, spec, says):
    with refusal(f"reward.function: ...{says}"):
        load_function(spec, ["reward_functions", "missing_module"])


def test_a_module_that_fails_to_import_is_bad_input(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("raise RuntimeError('first\\nsecond')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with refusal("reward.function: ...RuntimeError: first second"):
        load_function("broken_reward:judge", ["broken_reward"])
    sys.modules.pop("broken_reward", None)
