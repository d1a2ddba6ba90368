"""Chat templates: programs that come with a model, rendered in a sandboxed process.

transformers' own sandbox does not stop endless loops, `9**9**9**9` (which holds the interpreter's
lock, so that no thread could watch it) or gigabytes of text.
"""

import datetime
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dapo_jax.runtime.sandbox import ConfinedError, Process

DEADLINE_S = 10.0  # for one conversation
_MEMORY_BYTES = 1 << 30
_BATCH, _BATCH_CHARS = 64, 1 << 20  # conversations sent together, and when to send fewer

Conversation = Sequence[Mapping[str, str]]


def render(
    template: str,
    variables: Mapping[str, Any],
    conversations: Iterable[Conversation],
    date: str,
    *,
    max_chars: int,
    add_generation_prompt: bool = True,
) -> Iterator[str | None]:
    """Each conversation as text, with the header of the assistant's turn at the end.

    If the last turn is the assistant's, it is left open instead and the response continues it.

    Args:
      variables: JSON-able, as the special tokens are.
      date: YYYY-MM-DD, the template's today: by the clock, prompts would change every day.
      max_chars: a longer text is None.

    Raises ConfinedError if the template fails, or takes too much time or memory for a conversation.
    """
    batches = _batches(conversations)
    if not (batch := next(batches, [])):
        return
    with Process(f"{__name__}:work", deadline_s=DEADLINE_S, memory_bytes=_MEMORY_BYTES) as process:
        process.wait_ready()
        process.send([template, dict(variables), date, max_chars, add_generation_prompt])
        while batch:
            process.send(batch)
            for _ in batch:
                text, error = process.receive()
                if error is not None:
                    raise ConfinedError(error)
                yield text
            batch = next(batches, [])


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    chars = 0
    for turns in conversations:
        batch.append(turns)
        chars += sum(len(turn["content"]) for turn in turns)
        if len(batch) == _BATCH or chars > _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def work(orders: Iterator[Any]) -> Iterator[Any]:
    """Renders, in the process, and yields each text or why there is none."""
    from transformers.utils import chat_template_utils

    yield
    template, variables, date, max_chars, add_generation_prompt = next(orders)

    class FixedDate(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(date)

    chat_template_utils.datetime = FixedDate  # type: ignore[misc]  # of strftime_now
    for turns in itertools.chain.from_iterable(orders):
        is_open = add_generation_prompt and turns[-1]["role"] == "assistant"
        try:
            texts: Any = chat_template_utils.render_jinja_template(
                [turns],
                chat_template=template,
                add_generation_prompt=add_generation_prompt and not is_open,
                continue_final_message=is_open,
                **variables,
            )[0]
            yield [texts[0] if len(texts[0]) <= max_chars else None, None]
        except Exception as e:  # a template is a program: it may raise anything
            what = "cannot continue the assistant's last turn: " if is_open else ""
            yield [None, what + (" ".join(str(e).split())[:200] or type(e).__name__)]
