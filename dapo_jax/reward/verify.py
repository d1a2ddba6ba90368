r"""Verifiers of a response's answer: DAPO's string rule, math-verify, or a custom function.

The strict rule is that of DAPO's released recipe (verl, `math_dapo`), with the normalisation of
Minerva (arXiv 2206.14858, appendix D). It compares strings, so `42.0` is not `42`; `lenient_verify`
compares values.
"""

import importlib
import importlib.machinery
import importlib.util
import itertools
import logging
import math
import re
import sys
import types
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from dapo_jax.config import read_text
from dapo_jax.types import InputError, Problem, Verdict, canonical_answer, one_line

# fn(problem, response_text, response_len) -> (correct, score), or a Verdict
RewardFunction = Callable[[Problem, str, int], Verdict | tuple[bool, float]]

STRICT_TAIL = 300  # last characters of a response, where the strict rule looks for the answer
LENIENT_TAIL = 2000  # the same for math-verify, which also reads longer forms

_MAX_ANSWER_CHARS = 4096  # a longer text cannot match one from 300 characters, and is left as it is
_FLOAT32_MAX = float(np.finfo(np.float32).max)

_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

# The order of both tables is part of the rule: blanks are gone before the units are looked for.
_REMOVED = (  # `@` is a line end
    r"square ways integers dollars mph inches hours km units \ldots sue points feet minutes digits "
    r"cents degrees cm gm pounds meters meals edges students childrentickets multiples \text{s} "
    r"\text{.} \text{@s} \text{}^2 \text{}^3 \text{@} \text{} \mathrm{th} ^\circ ^{\circ} \; ,\! "
    r'{,} " \dots'
)
_REPLACED = {
    **{"an ": "", "a ": "", ".$": "$", r"\$": "", r"\ ": "", " ": "", "mbox": "text"},
    **{r",\text{and}": ",", r"\text{and}": ",", r"\text{m}": r"\text{}"},
    **{text.replace("@", "\n"): "" for text in _REMOVED.split()},
}
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?m)^[^$\n]*\$([^$\n]*)\$.*", r"$\1$"),  # of a line with math in it, the first math
        (r"\\text\{([^}\n]*)\}", r"\1"),
        (r"\\textbf\{([^}\n]*)\}", r"\1"),
        (r"\\overline\{([^}\n]*)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"frac([^{])(.)", r"frac{\1}{\2}"),  # \frac12 is \frac{1}{2}
        (r"sqrt([^{])", r"sqrt{\1}"),  # \sqrt3 is \sqrt{3}
        (r"\$", ""),
    )
)


def normalize_answer(text: str) -> str:
    r"""The form in which answers are compared as strings.

    Takes what follows the last `=`; drops articles, blanks, units, TeX wrappers and thousands
    commas; writes out `\frac12` and `\sqrt3`.

    >>> normalize_answer(r"x = \boxed{1{,}024} \text{ cm}"), normalize_answer(r"\frac12")
    ('1024', '\\frac{1}{2}')
    """
    text = text.split("=")[-1]
    if len(text) > _MAX_ANSWER_CHARS:
        return text
    for before, after in _REPLACED.items():
        text = text.replace(before, after)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    digits = text.replace(",", "")  # the released rule keeps those of negative numbers
    return digits if digits.removeprefix("-").isdigit() else text.strip()


def extract_answer(response: str) -> str | None:
    """The normalised answer after the last `Answer:` in the last 300 characters, None without."""
    found = _ANSWER_LINE.findall(response[-STRICT_TAIL:])
    return normalize_answer(found[-1]) if found else None


def strict_verify(response: str, ground_truth: str) -> bool:
    r"""Whether `extract_answer` is the ground truth in the same normal form.

    >>> responses = "Answer: 41\nAnswer: $42$", "Answer: 42.0", "It is 42"
    >>> [strict_verify(response, "42") for response in responses]
    [True, False, False]
    """
    return extract_answer(response) == normalize_answer(canonical_answer(ground_truth))


# How a response may mark its answer, and write lists and numbers.
_TAGGED = re.compile(r"(?is)<answer>(.*?)(?:</answer>|\Z)")
_LABEL = re.compile(r"(?i)answer[*_]*\s*:[*_`\s]*")  # markdown around it or not
_DISPLAY = re.compile(r"(?s)(?:\\\[.*?\\\]|\$\$.*?\$\$)[^\n]*")
_DELIMITER = re.compile(r"\$|\\[()\[\]]")
_MARKUP = re.compile(r"[\\^_]")
_CONJUNCTION = re.compile(r"\s*,?(?:\s+(?:and|or)\s+|\s*\\(?:text|mbox)\{\s*(?:and|or)\s*\}\s*)")
_WORD = re.compile(r"(?!and\b|or\b)\b[A-Za-z]{2,}")
_GROUPED = re.compile(r"(?<![\d.,] )(?<![\w.,])\d{1,3}(?: \d{3})+(?![\w ]*\d)")  # 1 000 000
_EXPONENT = re.compile(
    r"(?<![\w.])(\d+(?:\.\d+)?)(?:[eE]\+?(-?\d+)(?![\w.]*\d)|\s*[x×]\s*10\^(?:(-?\d+)|\{(-?\d+)\}))"
)

_MAX_DECIMALS = 10_000  # to which numbers are compared, however small


def lenient_verify(response: str, ground_truth: str) -> bool:
    r"""Whether the value of the response's answer equals that of the ground truth, by math-verify.

    The answer is searched in the last 2,000 characters: in the last `<answer>` tag, after the last
    `Answer:`, else wherever math-verify finds one, such as the last `\boxed{}`. It must be the
    whole answer: of `$48$, $384$` neither part is correct. Lists of values are compared as sets.
    Numbers agree to six decimals, small ones to at least four significant digits.

    Unbounded in time and memory for an adversarial answer (`9^{9^{9^9}}`): run it in a RewardPool.
    Raises ImportError without math-verify, MemoryError if there is not enough memory.
    """
    return lenient_judgement(response, ground_truth)[0]


def lenient_judgement(response: str, ground_truth: str) -> tuple[bool, bool]:
    """`lenient_verify`, and whether an answer is marked or math-verify finds one."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of timeouts that are off
    gold_text = _list(_plain_numbers(canonical_answer(ground_truth)))
    tail = _plain_numbers(response[-LENIENT_TAIL:])
    marked = _marked_answer(tail)
    if marked is not None and _plain(marked) == _plain(gold_text) != "":
        return True, True
    answered = bool(marked)
    try:
        gold = parse(f"\\boxed{{{gold_text}}}", parsing_timeout=None, raise_on_error=True)
        for reading in [tail] if marked is None else _readings(marked, tail):
            answer = parse(reading, parsing_timeout=None, raise_on_error=True)
            answered |= bool(answer)
            if _same_value(gold, answer):
                return True, True
            if any(not isinstance(value, str) for value in answer):
                break  # the first reading that has a value counts
    except MemoryError:
        raise
    except Exception:  # no value to compare: not correct
        pass
    return False, answered


def _readings(marked: str, tail: str) -> list[str]:
    """Texts in which math-verify looks for the value of a marked answer, the best first."""
    labelled = f"Answer: {marked}"
    if _DELIMITER.search(marked) or "\\boxed" in marked:
        return [labelled, tail]
    # math-verify reads TeX only between delimiters: a bare `2\sqrt{3}` is 2, `3,2,1` is 3.2.
    as_tex = f"${marked}$"
    is_text = _WORD.search(marked) and not _MARKUP.search(marked)
    return [labelled, as_tex, tail] if is_text else [as_tex, labelled, tail]


def _marked_answer(tail: str) -> str | None:
    """The text of the last answer that a tag or a label marks, or the whole tail if it is short."""
    tags = list(_TAGGED.finditer(tail))
    if tags and not _LABEL.search(tail, tags[-1].end()):
        tail = tags[-1][1]
    for label in reversed(list(_LABEL.finditer(tail))):
        rest = tail[label.end() :]
        display = _DISPLAY.match(rest)
        if answer := (display[0] if display else rest.partition("\n")[0]).strip(" \t\n*_`"):
            return _list(answer)
    alone = tail.strip(" \t\n*_`")
    return _list(alone) if tags or not ("\n" in alone or _WORD.search(alone)) else None


def _list(text: str) -> str:
    """A list with commas. The pattern is cubic in a run of blanks, so each becomes one first."""
    return _CONJUNCTION.sub(", ", " ".join(text.split())).rstrip(" .")


def _plain_numbers(text: str) -> str:
    r"""Numbers as math-verify reads them: `4.5e33` as `4.5 \times 10^{33}`, `1 000` as `1000`."""
    text = _GROUPED.sub(lambda number: number[0].replace(" ", ""), text.replace(r"\$", ""))
    return _EXPONENT.sub(lambda n: rf"{n[1]} \times 10^{{{n[2] or n[3] or n[4]}}}", text)


def _plain(text: str) -> str:
    """Without delimiters of math; words of truth in one case."""
    text = " ".join(_DELIMITER.sub(" ", text).split())
    return text.lower() if text.lower() in ("true", "false") else text


def _same_value(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
    """Whether a reading of the ground truth equals one of the answer, as far as comparable."""
    from math_verify import verify

    options: dict[str, Any] = {"timeout_seconds": None, "raise_on_error": True}
    for a, b in itertools.product(gold, answer):
        try:
            if not verify(a, b, **options):
                equal = _same_number(a, b)
            elif more := max(_further_decimals(a), _further_decimals(b)):
                digits = {"float_rounding": 6 + more, "numeric_precision": 15 + more}
                equal = verify(a, b, **digits, **options)
            else:
                equal = True
        except MemoryError:
            raise
        except Exception:
            continue
        if equal:
            return True
    return False


def _further_decimals(value: Any) -> int:
    """Decimals beyond six that the smallest number in a value needs for four significant digits."""
    import sympy

    most = 0.0
    parts = sympy.preorder_traversal(value)
    for part in parts:
        if getattr(part, "is_number", False):
            parts.skip()
            size = abs(part.evalf(5))
            if size.is_finite and size.is_positive:
                most = max(most, -float(sympy.log(size, 10)))
    return min(max(0, math.ceil(most) - 3), _MAX_DECIMALS)


def _same_number(a: Any, b: Any) -> bool:
    r"""Whether two numbers, one of them a float, differ by rounding errors alone."""
    from sympy import Float

    if isinstance(a, str) or isinstance(b, str) or not (a.is_number and b.is_number):
        return False
    if not (a - b).has(Float):
        return False
    return bool(abs((a - b).evalf()) <= 1e-14 * abs(a.evalf()))


def described(error: Exception) -> str:
    """`ValueError: message` on one line."""
    return one_line(f"{type(error).__name__}: {error}")


def function_source(spec: str | None) -> str | None:
    """The text of the file in `file.py:function`, not run; None for anything else.

    Raises InputError if it cannot be read.
    """
    path = (spec or "").rpartition(":")[0]
    if not path.endswith(".py"):
        return None
    return read_text(path, f"reward.function: {path}", "reward", "Python")


def load_function(
    spec: str, allowed_modules: Sequence[str], source: str | None = None
) -> RewardFunction:
    """A custom verifier, `package.module:function` or `file.py:function`.

    It is called as `fn(problem, response_text, response_len)`, the length in tokens, and returns
    `(correct, score)`: groups are filtered on `correct`, the reward is `score`. source: of the
    file. Raises InputError if it is not one of the allowed modules or files, or cannot be imported.
    """
    name, colon, attribute = spec.rpartition(":")
    if not (colon and name and attribute.isidentifier()):
        forms = "package.module:function or file.py:function"
        raise InputError(f"reward.function: expected {forms}, got {spec!r}")
    kind = "module" if source is None else "file"
    where = f"reward.function: {kind} {name!r}"
    if name not in allowed_modules:
        raise InputError(f"{where} is not in reward.allowed_modules; add it if you trust it")
    try:
        module = importlib.import_module(name) if source is None else _import_text(name, source)
    except Exception as e:
        raise InputError(
            f"reward.function: cannot import {name!r} ({described(e)}); correct the name, "
            f"or fix the {kind}"
        ) from None
    function = getattr(module, attribute, None)
    if function is None:
        raise InputError(f"{where} has no {attribute!r}; correct the name")
    if not callable(function):
        found = f"{spec!r} is a {type(function).__name__}"
        raise InputError(f"reward.function: {found}; name a function(problem, text, length)")
    return function


class _Text(importlib.machinery.SourceFileLoader):
    """Imports source text that was read from a file; later changes of it have no effect."""

    def __init__(self, path: str, source: str):
        super().__init__("dapo_jax_task", path)
        self._source = source

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self._source, self.path)


def _import_text(path: str, source: str) -> types.ModuleType:
    loader = _Text(path, source)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look for the module of a class
    loader.exec_module(module)
    return module


def check_verdict(value: object) -> Verdict:
    """What a custom verifier returned, as a Verdict. Raises ValueError if it is unusable.

    >>> check_verdict((True, 1))
    Verdict(correct=True, score=1.0, error=None, answered=True)
    >>> check_verdict((1, 1.0))
    Traceback (most recent call last):
    ValueError: correct must be True or False, not int
    """
    if isinstance(value, tuple) and not isinstance(value, Verdict) and len(value) == 2:
        value = Verdict(*value)
    if not isinstance(value, Verdict):
        found = type(value).__name__ + (f" of {len(value)}" if isinstance(value, tuple) else "")
        raise ValueError(f"the reward function must return (correct, score), not {found}")
    correct, score, error, answered = value
    if not isinstance(correct, bool | np.bool_):
        raise ValueError(f"correct must be True or False, not {type(correct).__name__}")
    if isinstance(score, bool) or not isinstance(score, Real):
        raise ValueError(f"score must be a number, not {type(score).__name__}")
    if error is not None and not isinstance(error, str):
        raise ValueError(f"error must be text or None, not {type(error).__name__}")
    try:
        number = float(score)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _FLOAT32_MAX:
        raise ValueError(f"score must be finite in float32, got {number}")
    return Verdict(bool(correct), number, error and one_line(error), bool(answered))
