"""Chat templates: programs that come with a model, rendered in a sandboxed process.

transformers' own sandbox does not stop endless loops, `9**9**9**9` (which holds the interpreter's
lock, so that no thread could watch it) or gigabytes of text.
"""

import datetime
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dapo_jax.runtime.sandbox import Process
from dapo_jax.types import one_line

DEADLINE_S = 10.0  # for one conversation
# Today's date for templates, Llama 3.2's default: by the clock, prompts would change every day.
_DATE = "2024-07-26"
_MEMORY_BYTES = 1 << 30

Conversation = list[dict[str, str]]


def render(
    template: str,
    variables: Mapping[str, Any],
    conversations: Iterable[Conversation],
    *,
    max_chars: int,
) -> Iterator[str | None]:
    """Each conversation as text, with the header of the assistant's turn at the end; a last turn of
    the assistant is left open instead.

    variables: JSON-able, as the special tokens are. max_chars: a longer text is None. Raises
    ConfinedError if the template fails, or takes too much time or memory for a conversation.
    """
    setup = [template, dict(variables), max_chars]
    limits: Any = {"deadline_s": DEADLINE_S, "memory_bytes": _MEMORY_BYTES}
    with Process(f"{__name__}:renderer", setup, **limits) as process:
        process.start()
        for turns in conversations:
            yield process.call(turns)


def renderer(
    template: str, variables: Mapping[str, Any], max_chars: int
) -> Callable[[Conversation], str | None]:
    """In the process: `render` of one conversation."""
    from transformers.utils import chat_template_utils

    class FixedDate(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(_DATE)

    chat_template_utils.datetime = FixedDate  # type: ignore[misc]  # of strftime_now
    render: Any = functools.partial(
        chat_template_utils.render_jinja_template, chat_template=template, **variables
    )

    def render_one(turns: Conversation) -> str | None:
        is_open = turns[-1]["role"] == "assistant"
        ends: Any = {"add_generation_prompt": not is_open, "continue_final_message": is_open}
        try:
            texts = render([turns], **ends)[0]
        except Exception as e:
            what = "cannot continue the assistant's last turn: " if is_open else ""
            raise ValueError(what + one_line(e)) from None
        return texts[0] if len(texts[0]) <= max_chars else None

    return render_one
