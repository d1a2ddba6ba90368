r"""What a row of a data set states: its prompt, answer, solution and identifier, under the names
that data sets are published with.

    {"prompt": "What is 6 x 7?", "answer": 42}                       and, if there, "id" and "solution"
    {"prompt": [{"role": "user", "content": "..."}], "reward_model": {"ground_truth": "42"}, "extra_info": {"index": 7}}
    {"problem": "What is 6 x 7?", "answer": "42"}                    or "question", "expected_answer"
    {"question": "What is 6 x 7?", "answer": "6 x 7 = 42\n#### 42"}
    {"problem": "What is 6 x 7?", "solution": "It is $\\boxed{42}$."}

The second is that of DAPO-Math-17k and its AIME 2024, the third of most other AIME files, the
fourth of GSM8K, the last of MATH. `ColumnsConfig` says what is what in any other. Chat turns are
used as they are.
"""

import contextlib
import json
import math
import re
import string
from collections.abc import Mapping
from typing import Any

from dapo_jax.config import ColumnsConfig
from dapo_jax.types import Message, Problem, canonical_answer

MAX_ANSWER_CHARS = 1000
AS_USUAL = ColumnsConfig()  # every part of a problem under one of its usual names
_USUAL: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "problem", "question", "Problem", "messages", "instruction"),
    "answer": (
        "answer",
        "reward_model.ground_truth",
        "expected_answer",
        "ground_truth",
        "Answer",
        "final_answer",
    ),
    "solution": ("solution", "Solution"),
    "id": ("id", "extra_info.index", "ID"),
}
# What a question may need, and would not be understood without. A `prompt` is whole.
_BEFORE = ("body", "passage", "context")
_AFTER = ("options", "choices", "input")
_GSM8K = "####"  # stands before the answer
_BOXED = "\\boxed"  # holds the answer
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # of GSM8K: <<900+5=905>>
_UNIT = re.compile(
    r"([+-]?[0-9][0-9,]*(?:\.[0-9]+)?) \((?!mod|base)[A-Za-z][A-Za-z ]*\)"
)  # of ASDiv: 5 (apples)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_FIELD = re.compile(r"\{([^{}]+)\}")
_QUOTED = r"'((?:[^'\\]|\\\\)*)'"
_PRINTED_LIST = re.compile(
    rf"\[{_QUOTED}(?:,?\s+{_QUOTED})*\]"
)  # of texts, as Python and NumPy print it
_TURNS = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]""")
_LABEL = re.compile(r"\(?[A-Za-z1-9]\s?[).:]")


class BadRow(Exception):
    """A row that cannot be used; its text is the reason under which such rows are counted. columns:
    of the row, where one is missing.
    """

    def __init__(self, reason: str, row: Any = ()):
        super().__init__(reason)
        self.columns = tuple(row)


def column_names(columns: ColumnsConfig) -> list[str]:
    """Every column that `problem_from_row` may look at: a reader may leave out the others."""
    names = [*_BEFORE, *_AFTER]
    for part, usual in _USUAL.items():
        named = getattr(columns, part)
        names += list(usual) if named is None else _FIELD.findall(named) or [named]
    return names


def problem_from_row(
    row: Any, columns: ColumnsConfig = AS_USUAL, notes: list[str] | None = None
) -> Problem:
    r"""The problem that a decoded row states; its id is empty if the row has none.

    Raises BadRow with the reason if it states none.

    An answer that stands at the end of its solution (`columns.answer_after`, or as GSM8K has it),
    or in its last `\boxed{}`, is taken from there, and the solution then ends in an `Answer:` line,
    as the strict verifier wants it of a response. Answers are canonical (`types.canonical_answer`).
    notes: gets an entry for each way in which the problem differs from the text of its row.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not a JSON object")
    notes = [] if notes is None else notes
    prompt, called = _found(row, "prompt", columns.prompt)
    answer, _ = _found(row, "answer", columns.answer)
    solution, _ = _found(row, "solution", columns.solution)
    identifier, _ = _found(row, "id", columns.id)
    if not called:
        raise BadRow("no prompt", row)
    prompt = _prompt(prompt, notes)
    if isinstance(solution, list):  # several ways to the same answer
        solution = next(filter(None, solution), None)
    if (
        called == "messages" and not isinstance(prompt, str) and prompt[-1].role == "assistant"
    ):  # a conversation with its response
        solution = prompt[-1].content if _missing(solution) else solution
        prompt = prompt[:-1]
        if not prompt:
            raise BadRow("empty prompt")
    if _missing(answer) and isinstance(solution, str) and _BOXED in solution:
        answer = solution
    if _missing(answer):
        raise BadRow("no answer", row)
    answer = _only(answer, notes)
    if columns.prompt is None and called != "prompt" and isinstance(prompt, str):
        prompt = _joined(row, prompt, answer, called, notes)
    gsm8k = columns.prompt is None and called == "question"
    answer, solution = _answer_and_solution(answer, solution, columns.answer_after, gsm8k, notes)
    return Problem(
        "" if _missing(identifier) else _scalar_text(identifier, "id"), prompt, answer, solution
    )


def _found(row: Mapping[str, Any], part: str, named: str | None) -> tuple[Any, str]:
    """The value that a row has for a part of a problem, and the name of its column; (None, "") if
    it has none.
    """
    if named is not None and _FIELD.search(named):
        return _FIELD.sub(lambda field: _filled(row, field[1]), named), named
    for path in _USUAL[part] if named is None else (named,):
        if not _missing(value := _at(row, path)):
            return value, path
    if named is not None and part in ("prompt", "answer"):
        raise BadRow(f"no {part} (column {named})", row)
    return None, ""


def _at(row: Any, path: str) -> Any:
    """The value of column `path`, or for `a.b` of field b of column a. None if there is none."""
    if "." not in path or path in row:
        return row.get(path)
    for name in path.split("."):
        row = row.get(name) if isinstance(row, Mapping) else None
    return row


def _filled(row: Mapping[str, Any], path: str) -> str:
    if _missing(value := _at(row, path)):
        raise BadRow(f"no {path}", row)
    return _scalar_text(value, path)


# --------------------------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------------------------


def _prompt(value: Any, notes: list[str]) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty prompt")
        if not _TURNS.match(value):
            return _text(value, "prompt")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("prompt is the text of chat turns, but not JSON") from None
        notes.append("prompts that were chat turns as JSON text")
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow("prompt is neither text nor chat turns")
    turns = [
        Message(_text(turn.get("role"), "chat role"), _text(turn.get("content"), "chat content"))
        for turn in value
    ]
    if not any(turn.content.strip() for turn in turns):
        raise BadRow("empty prompt")
    if turns[-1].role == "assistant" and not turns[-1].content.strip():  # where the response goes
        turns.pop()
    return tuple(turns)


def _joined(
    row: Mapping[str, Any], question: str, answer: Any, called: str, notes: list[str]
) -> str:
    """A question with what stands beside it in columns of their own."""
    for name in (*_BEFORE, *_AFTER):
        value = row.get(name)
        if (
            _missing(value)
            or value in ("", [], {})
            or (name == "input" and called != "instruction")
        ):
            continue
        text = _options(value, answer) if name in ("options", "choices") else _lines(value)
        if text is None:
            raise BadRow(f"{called} with {name} of an unknown form; make one column of both")
        if text.strip() and text.strip() not in question:
            question = (
                f"{_text(text, name)}\n\n{question}"
                if name in _BEFORE
                else f"{question}\n\n{_text(text, name)}"
            )
            notes.append(f"prompts joined from {called} and {name}")
    return question


def _lines(value: Any) -> str | None:
    """Text or a list of texts as text; None for anything else."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def _options(value: Any, answer: Any) -> str | None:
    """The choices of a question as text; None where `answer` is neither one of them nor the letter
    of one.
    """
    if isinstance(value, Mapping):  # {"A": "4", "B": "7"}
        value = [
            f"{letter}) {text}"
            for letter, text in value.items()
            if len(letter) == 1 and isinstance(text, str)
        ]
    if not isinstance(value, list):
        return _lines(value)
    letters = string.ascii_uppercase[: len(value)]
    if (text := _lines(value)) is None or not isinstance(answer, str) or answer in value:
        return text if isinstance(answer, str) else None
    if not answer.strip(" ().") or answer.strip(" ().") not in letters:
        return None
    return (
        text
        if _LABEL.match(value[0])
        else "\n".join(f"{letter}) {option}" for letter, option in zip(letters, value, strict=True))
    )


# --------------------------------------------------------------------------------------------------------------------
# Answers and solutions
# --------------------------------------------------------------------------------------------------------------------


def _only(answer: Any, notes: list[str]) -> Any:
    """The answer of a list of one, which may be JSON text, or `['34']` as tables of text hold it."""
    if isinstance(answer, str) and answer.lstrip()[:1] == "[" and '"' in answer:
        with contextlib.suppress(ValueError, RecursionError):
            listed = json.loads(answer)
            answer = (
                listed
                if isinstance(listed, list) and all(isinstance(one, str) for one in listed)
                else answer
            )
    elif isinstance(answer, str) and _PRINTED_LIST.fullmatch(answer.strip()):
        answer = [one.replace("\\\\", "\\") for one in re.findall(_QUOTED, answer)]
    if not isinstance(answer, list):
        return answer
    if len(answer) != 1:
        raise BadRow("several answers" if answer else "no answer")
    notes.append("answers that were a list of one")
    return _only(answer[0], notes)


def _answer_and_solution(
    answer: Any, solution: Any, after: str | None, gsm8k: bool, notes: list[str]
) -> tuple[str, str | None]:
    whole = answer
    if after is None and isinstance(answer, str):
        after = _GSM8K if gsm8k and _GSM8K in answer else _BOXED if _BOXED in answer else None
    if after is not None:
        answer, worked = _split(_text(answer, "answer"), after, notes)
    answer = _answer(answer, notes)
    if after is not None and (_missing(solution) or solution == whole):
        return answer, f"{worked}\nAnswer: {answer}" if worked and not _repeats(
            worked, answer
        ) else None
    if _missing(solution) or not _text(solution, "solution"):
        return answer, None
    if _repeats(solution, answer):
        notes.append("solutions that only repeat the answer, not used")
        return answer, None
    return answer, solution


def _split(text: str, after: str, notes: list[str]) -> tuple[str, str]:
    r"""The answer that stands after the last `after`, and what solves it: the text before, or the
    whole with `\boxed{answer}`.
    """
    if after.rstrip("{ ").endswith("boxed"):
        notes.append(r"answers taken from \boxed{}")
        return _boxed(text), text.rstrip()
    before, found, answer = text.rpartition(after)
    if not found:
        raise BadRow(f"answer without {after}")
    worked, found_any = _ANNOTATION.subn("", before)
    if found_any:
        notes.append("solutions without their <<...>> annotations")
    return answer, worked.rstrip()


def _boxed(text: str) -> str:
    r"""What is in the last `\boxed{}`."""
    _, found, rest = text.rpartition(_BOXED)
    if not found:
        raise BadRow(f"answer without {_BOXED}")
    rest = rest.lstrip()
    if not rest.startswith("{"):  # \boxed 4
        return re.split(r"[\s$]", rest, maxsplit=1)[0]
    depth = 0
    for brace in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth and brace[0] == "}":
            return rest[1 : brace.start()].strip()
    raise BadRow(f"answer with an open {_BOXED}{{")


def _repeats(solution: str, answer: str) -> bool:
    """Whether a solution says no more than the answer."""
    if len(solution) > len(answer) + 20:
        return False
    text = solution.strip(" \n$.")
    return (
        canonical_answer(
            _boxed(text) if text.startswith(_BOXED + "{") and text.endswith("}") else text
        )
        == answer
    )


def _answer(value: Any, notes: list[str]) -> str:
    if _missing(value):
        raise BadRow("no answer")
    text = _scalar_text(value, "answer").strip()
    if not text:
        raise BadRow("no answer")
    if len(text) > MAX_ANSWER_CHARS:
        raise BadRow(f"answer over {MAX_ANSWER_CHARS} characters")
    if unit := _UNIT.fullmatch(text):
        text = unit[1]
        notes.append("numbers without the unit in brackets behind them")
    if (canonical := canonical_answer(text)) != text:
        notes.append("integer answers without their leading zeros")
    return canonical


def _missing(value: Any) -> bool:
    return value is None or (
        isinstance(value, float) and math.isnan(value)
    )  # NaN is how data frames write null


def _scalar_text(value: Any, name: str) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return (
            str(int(value)) if value.is_integer() else repr(value)
        )  # 42.0: a whole number in a float column
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return _text(value, name)
    raise BadRow(f"{name} is neither text nor a finite number")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not valid Unicode") from None
    return value
