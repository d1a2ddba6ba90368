r"""A row of a data set as a problem: prompt, answer, solution and id, under the usual column names.

    {"prompt": "What is 6 x 7?", "answer": 42}                  and perhaps "id" and "solution"
    {"prompt": [{"role": "user", "content": "..."}], "reward_model": {"ground_truth": "42"}}
    {"problem": "What is 6 x 7?", "answer": "42"}               or "question", "expected_answer"
    {"question": "What is 6 x 7?", "answer": "6 x 7 = 42\n#### 42"}
    {"problem": "What is 6 x 7?", "solution": "It is $\\boxed{42}$."}

The second is DAPO-Math-17k and its AIME 2024, the third most other AIME files, the fourth GSM8K,
the last MATH. `messages` and ShareGPT's `conversations` may end in the response. `ColumnsConfig`
names the columns of any other data set.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from dapo_jax.config import ColumnsConfig
from dapo_jax.types import Message, Problem, canonical_answer

MAX_ANSWER_CHARS = 1000
AS_USUAL = ColumnsConfig()  # every part of a problem under one of its usual names
_CONVERSATIONS = ("messages", "conversations")  # may end in the response
_USUAL: Mapping[str, str] = {  # by field of ColumnsConfig
    "prompt": "prompt problem question Problem messages conversations instruction",
    "answer": "answer reward_model.ground_truth expected_answer ground_truth Answer final_answer",
    "solution": "solution Solution",
    "id": "id extra_info.index ID",
}
# Columns without which a question may make no sense. A `prompt` is complete.
_BEFORE = ("body", "passage", "context")
_AFTER = ("options", "choices")
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_GSM8K = "####"  # before the answer
_BOXED = "\\boxed"  # around the answer
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # of GSM8K: <<900+5=905>>
_NUMBER_WITH_UNIT = re.compile(  # of ASDiv: 5 (apples)
    r"([+-]?[0-9][0-9,]*(?:\.[0-9]+)?) \((?!mod|base)[A-Za-z][A-Za-z ]*\)"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_FIELD = re.compile(r"\{([^{}]+)\}")
_QUOTED = r"'((?:[^'\\]|\\\\)*)'"
_PRINTED_LIST = re.compile(rf"\[{_QUOTED}(?:,?\s+{_QUOTED})*\]")  # by Python or NumPy
_TURNS = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]""")
_LABEL = re.compile(r"\(?[A-Za-z1-9]\s?[).:]")


class BadRow(Exception):
    """Why a row cannot be used, under which it is counted, and its columns if one is missing."""

    def __init__(self, reason: str, row: Any = ()):
        super().__init__(reason)
        self.columns = tuple(row)


def _named(c: ColumnsConfig) -> dict[str, str | None]:
    """The columns that a config names, by the keys of `_USUAL`."""
    return dict(zip(_USUAL, (c.prompt, c.answer, c.solution, c.id), strict=True))


def column_names(columns: ColumnsConfig) -> list[str]:
    """Every column that `problem_from_row` may look at: a reader may leave out the others."""
    names = [*_BEFORE, *_AFTER, "input"]
    for part, named in _named(columns).items():
        usual = _USUAL[part]
        names += usual.split() if named is None else _FIELD.findall(named) or [named]
    return names


def problem_from_row(
    row: Any, columns: ColumnsConfig = AS_USUAL, notes: list[str] | None = None
) -> Problem:
    r"""The problem of a decoded row; its id is empty if the row has none.

    An answer at the end of its solution (after `columns.answer_after`, or `####` in GSM8K) or in
    its last `\boxed{}` is extracted, and the solution then ends in the `Answer:` line that the
    strict verifier reads. notes: gets an entry for each way in which the problem differs from its
    row. Raises BadRow with the reason if the row is no problem.
    """
    if isinstance(row, BadRow):  # of the reader
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("not a JSON object")
    notes = [] if notes is None else notes
    found = (_found(row, part, named) for part, named in _named(columns).items())
    (prompt, called), (answer, _), (solution, _), (name, _) = found
    if not called:
        raise BadRow("no prompt", row)
    prompt = _prompt(prompt, notes)
    if isinstance(solution, list):  # several ways to the same answer
        solution = next(filter(None, solution), None)
    if called in _CONVERSATIONS and not isinstance(prompt, str) and prompt[-1].role == "assistant":
        *turns, response = prompt
        if not turns:
            raise BadRow("empty prompt")
        prompt, solution = tuple(turns), response.content if _missing(solution) else solution
    if _missing(answer) and isinstance(solution, str) and _BOXED in solution:
        answer = solution
    if _missing(answer):
        raise BadRow("no answer", row)
    answer = _only(answer, notes)
    if columns.prompt is None and called != "prompt" and isinstance(prompt, str):
        prompt = _joined(row, prompt, answer, called, notes)
    after = columns.answer_after
    if after is None and isinstance(answer, str):
        gsm8k = columns.prompt is None and called == "question" and _GSM8K in answer
        after = _GSM8K if gsm8k else _BOXED if _BOXED in answer else None
    answer, solution = _answer_and_solution(answer, solution, after, notes)
    name = "" if name is None else _text(name, "id", or_number=True)
    return Problem(name, prompt, answer, solution)


def _found(row: Mapping[str, Any], part: str, named: str | None) -> tuple[Any, str]:
    """A part of a problem and the name of its column; (None, "") if the row has none."""
    if named is not None and _FIELD.search(named):
        texts = {}
        for path in _FIELD.findall(named):
            if _missing(value := _at(row, path)):
                raise BadRow(f"no {path}", row)
            texts[path] = _text(value, path, or_number=True)
        return _FIELD.sub(lambda field: texts[field[1]], named), named
    for path in _USUAL[part].split() if named is None else (named,):
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


# ---------------------------------------------------------------------------------------- prompts


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
    turns = [_turn(turn) for turn in value]
    if not any(turn.content.strip() for turn in turns):
        raise BadRow("empty prompt")
    if turns[-1].role == "assistant" and not turns[-1].content.strip():  # where the response goes
        turns.pop()
    return tuple(turns)


def _turn(turn: Mapping[str, Any]) -> Message:
    """A turn as {role, content} or, in ShareGPT, {from, value}; content may be OpenAI's parts."""
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        content = "\n".join(_text(part.get("text"), "chat content") for part in content)
    role = _ROLES.get(role, role) if isinstance(role, str) and "from" in turn else role
    return Message(_text(role, "chat role"), _text(content, "chat content"))


def _joined(row: Mapping[str, Any], text: str, answer: Any, called: str, notes: list[str]) -> str:
    """The text of a question joined with that of its other columns."""
    for name in (*_BEFORE, *_AFTER, *(["input"] if called == "instruction" else [])):
        value = row.get(name)
        if _missing(value) or value in ("", [], {}):
            continue
        more = _options(value, answer) if name in _AFTER else _lines(value)
        if more is None:
            raise BadRow(f"{called} with {name} of an unknown form; make one column of both")
        if more.strip() and more.strip() not in text:
            pair = (_text(more, name), text)
            text = "\n\n".join(pair if name in _BEFORE else pair[::-1])
            notes.append(f"prompts joined from {called} and {name}")
    return text


def _lines(value: Any) -> str | None:
    """Text or a list of texts as text; None for anything else."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def _options(value: Any, answer: Any) -> str | None:
    """The choices of a question as text; None if `answer` is neither a choice nor its letter."""
    if isinstance(value, Mapping):  # {"A": "4", "B": "7"}
        letters = [key for key in value if len(key) == 1 and isinstance(value[key], str)]
        value = [f"{key}) {value[key]}" for key in letters]
    text = _lines(value)
    if text is None or isinstance(value, str):
        return text
    letter = answer.strip(" ().") if isinstance(answer, str) else ""
    named_once = len(value) <= len(_LETTERS) and letter in _LETTERS[: len(value)]
    if answer in value or (letter and named_once):
        named = zip(_LETTERS, value, strict=False)
        labelled = answer in value or _LABEL.match(value[0])
        return text if labelled else "\n".join(f"{name}) {option}" for name, option in named)
    return None


# -------------------------------------------------------------------------- answers and solutions


def _only(answer: Any, notes: list[str]) -> Any:
    """The answer of a list of one, which may be JSON text, or `['34']` as printed by Python."""
    if isinstance(answer, str) and answer.lstrip()[:1] == "[" and '"' in answer:
        with contextlib.suppress(ValueError, RecursionError):
            listed = json.loads(answer)
            if isinstance(listed, list) and all(isinstance(one, str) for one in listed):
                answer = listed
    elif isinstance(answer, str) and _PRINTED_LIST.fullmatch(answer.strip()):
        answer = [one.replace("\\\\", "\\") for one in re.findall(_QUOTED, answer)]
    if not isinstance(answer, list):
        return answer
    if len(answer) != 1:
        raise BadRow("several answers" if answer else "no answer")
    notes.append("answers that were a list of one")
    return _only(answer[0], notes)


def _answer_and_solution(
    answer: Any, solution: Any, after: str | None, notes: list[str]
) -> tuple[str, str | None]:
    whole, worked = answer, None
    if after is not None:
        answer, worked = _split(_text(answer, "answer"), after, notes)
    answer = _answer(answer, notes)
    if worked is not None and (_missing(solution) or solution == whole):
        useful = worked and not _repeats(worked, answer)
        return answer, f"{worked}\nAnswer: {answer}" if useful else None
    if _missing(solution) or not _text(solution, "solution"):
        return answer, None
    if _repeats(solution, answer):
        notes.append("solutions that only repeat the answer, not used")
        return answer, None
    return answer, solution


def _split(text: str, after: str, notes: list[str]) -> tuple[str, str]:
    r"""The answer behind the last `after`, and the solution: the text before, or all of the text
    that holds `\boxed{answer}`."""
    if after.rstrip("{ ").endswith("boxed"):
        notes.append(r"answers taken from \boxed{}")
        return _boxed(text), text.rstrip()
    before, found, answer = text.rpartition(after)
    if not found:
        raise BadRow(f"answer without {after}")
    worked, count = _ANNOTATION.subn("", before)
    if count:
        notes.append("solutions without their <<...>> annotations")
    return answer, worked.rstrip()


def _boxed(text: str) -> str:
    r"""The content of the last `\boxed{}`."""
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
    if text.startswith(_BOXED + "{") and text.endswith("}"):
        text = _boxed(text)
    return canonical_answer(text) == answer


def _answer(value: Any, notes: list[str]) -> str:
    text = "" if _missing(value) else _text(value, "answer", or_number=True).strip()
    if not text:
        raise BadRow("no answer")
    if len(text) > MAX_ANSWER_CHARS:
        raise BadRow(f"answer over {MAX_ANSWER_CHARS} characters")
    if number := _NUMBER_WITH_UNIT.fullmatch(text):
        text = number[1]
        notes.append("numbers without the unit in brackets behind them")
    if (canonical := canonical_answer(text)) != text:
        notes.append("integer answers without their leading zeros")
    return canonical


def _missing(value: Any) -> bool:
    return value is None or value != value  # NaN is how data frames write null


def _text(value: Any, name: str, *, or_number: bool = False) -> str:
    if or_number and isinstance(value, float) and math.isfinite(value):
        value = int(value) if value.is_integer() else repr(value)  # 42.0 of a float column
    if or_number and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        expected = "neither text nor a finite number" if or_number else "not text"
        raise BadRow(f"{name} is {expected}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not valid Unicode") from None
    return value
