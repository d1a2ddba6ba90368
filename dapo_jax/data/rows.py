r"""What a row of a data set states: its prompt, answer, solution and identifier, under the names that data sets are published with.

    {"prompt": "What is 6 x 7?", "answer": 42}                       and, if there, "id" and "solution"
    {"prompt": [{"role": "user", "content": "..."}], "reward_model": {"ground_truth": "42"}, "extra_info": {"index": 7}}
    {"problem": "What is 6 x 7?", "answer": "42"}                    or "question", "expected_answer"
    {"question": "What is 6 x 7?", "answer": "6 x 7 = 42\n#### 42"}

The second is that of DAPO-Math-17k and its AIME 2024, the third of most other AIME files, the last of GSM8K. `ColumnsConfig` says what
is what in any other. Chat turns are used as they are.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from dapo_jax.config import ColumnsConfig
from dapo_jax.types import Message, Problem

MAX_ANSWER_CHARS = 1000
AS_USUAL = ColumnsConfig()  # every part of a problem under one of its usual names
_USUAL: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "problem", "question", "Problem"),
    "answer": ("answer", "reward_model.ground_truth", "expected_answer", "ground_truth", "Answer"),
    "solution": ("solution", "Solution"),
    "id": ("id", "extra_info.index", "ID"),
}
_CONTEXT = ("passage", "context")  # what a question may need, and would not be understood without
_GSM8K = "####"  # stands before the answer
_FIELD = re.compile(r"\{([^{}]+)\}")


class BadRow(Exception):
    """A row that cannot be used; its text is the reason under which such rows are counted."""


def column_names(columns: ColumnsConfig) -> list[str]:
    """Every column that `problem_from_row` may look at: a reader may leave out the others."""
    names = list(_CONTEXT)
    for part, usual in _USUAL.items():
        named = getattr(columns, part)
        names += list(usual) if named is None else _FIELD.findall(named) or [named]
    return names


def problem_from_row(row: Any, columns: ColumnsConfig = AS_USUAL) -> Problem:
    """The problem that a decoded row states; its id is empty if the row has none. Raises BadRow with the reason if it states none.

    An answer that stands at the end of its solution (`columns.answer_after`, or as GSM8K has it) is cut off there, and the solution
    ends in an `Answer:` line instead, as the strict verifier wants it of a response.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not a JSON object")
    prompt, answer = _found(row, "prompt", columns.prompt), _found(row, "answer", columns.answer)
    identifier, solution = _found(row, "id", columns.id), _found(row, "solution", columns.solution)
    after = columns.answer_after
    if columns.prompt is None and prompt is not None and prompt is row.get("question"):
        if not all(_missing(row.get(name)) or row[name] in ("", []) for name in _CONTEXT):
            raise BadRow("a question with a passage or context; name both in data.columns as the prompt")
        if after is None and isinstance(answer, str) and _GSM8K in answer:
            after = _GSM8K
    if after is not None and not _missing(answer):
        answer, worked = _split(answer, after)
        solution = worked if _missing(solution) else solution
    return Problem(
        id="" if _missing(identifier) else _scalar_text(identifier, "id"),
        prompt=_prompt(prompt),
        answer=_answer(answer),
        solution=None if _missing(solution) else _text(solution, "solution") or None,
    )


def _found(row: Mapping[str, Any], part: str, named: str | None) -> Any:
    """The value that a row has for a part of a problem; None if it has none."""
    if named is not None and _FIELD.search(named):
        return _FIELD.sub(lambda field: _filled(row, field[1]), named)
    for path in _USUAL[part] if named is None else (named,):
        if not _missing(value := _at(row, path)):
            return value
    if named is not None and part in ("prompt", "answer"):
        raise BadRow(f"no {part} (column {named})")
    return None


def _at(row: Any, path: str) -> Any:
    """The value of column `path`, or for `a.b` of field b of column a. None if there is none."""
    if "." not in path or path in row:
        return row.get(path)
    for name in path.split("."):
        row = row.get(name) if isinstance(row, Mapping) else None
    return row


def _filled(row: Mapping[str, Any], path: str) -> str:
    if _missing(value := _at(row, path)):
        raise BadRow(f"no {path}")
    return _scalar_text(value, path)


def _split(value: Any, after: str) -> tuple[str, str | None]:
    """The answer that stands after the last `after`, and what precedes it as a solution that ends in it."""
    before, found, answer = _text(value, "answer").rpartition(after)
    if not found:
        raise BadRow(f"answer without {after}")
    answer = answer.strip()
    return answer, f"{before.rstrip()}\nAnswer: {answer}" if before.strip() else None


def _prompt(value: Any) -> str | tuple[Message, ...]:
    if _missing(value):
        raise BadRow("no prompt")
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty prompt")
        return _text(value, "prompt")
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow("prompt is neither text nor chat turns")
    turns = tuple(Message(_text(turn.get("role"), "chat role"), _text(turn.get("content"), "chat content")) for turn in value)
    if not any(turn.content.strip() for turn in turns):
        raise BadRow("empty prompt")
    return turns


def _answer(value: Any) -> str:
    if _missing(value):
        raise BadRow("no answer")
    text = _scalar_text(value, "answer").strip()
    if not text:
        raise BadRow("no answer")
    if len(text) > MAX_ANSWER_CHARS:
        raise BadRow(f"answer over {MAX_ANSWER_CHARS} characters")
    return text


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN is how data frames write null


def _scalar_text(value: Any, name: str) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)  # 42.0: a whole number in a float column
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
