"""Chat templates: programs that come with a model, rendered in a process that can be stopped.

transformers' sandbox keeps a template from the interpreter's insides, but not from loops without
end, `9**9**9**9` (which holds the interpreter's lock, so that no thread could watch it) or
gigabytes of text.
"""

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dapo_jax.runtime.sandbox import ConfinedError, results

DEADLINE_S = 10.0  # for one conversation
_MEMORY_BYTES = 1 << 30

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
    """Each conversation through a chat template, with the header of the assistant's turn at the end
    unless told otherwise.

    Where the last turn is the assistant's, it is left open instead, and the response continues it.

    Args: variables: JSON-able, as the special tokens are. date: YYYY-MM-DD, what the template takes
      for today: the clock would make another prompt of the same problem every day. max_chars: a
      longer text is None.

    Raises ConfinedError if the template fails, or takes too much time or memory for a conversation.
    """
    orders = [[template, dict(variables), date, max_chars, add_generation_prompt], *conversations]
    if len(orders) > 1:
        for text, error in results(
            f"{__name__}:work", orders, deadline_s=DEADLINE_S, memory_bytes=_MEMORY_BYTES
        ):
            if error is not None:
                raise ConfinedError(error)
            yield text


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
    for turns in orders:
        open_turn = add_generation_prompt and turns[-1]["role"] == "assistant"
        try:
            texts: Any = chat_template_utils.render_jinja_template(
                [turns],
                chat_template=template,
                add_generation_prompt=add_generation_prompt and not open_turn,
                continue_final_message=open_turn,
                **variables,
            )[0]
            yield [texts[0] if len(texts[0]) <= max_chars else None, None]
        except Exception as e:  # a template is a program: it may raise anything
            what = "cannot continue the assistant's last turn: " if open_turn else ""
            yield [None, what + (" ".join(str(e).split())[:200] or type(e).__name__)]
