"""Problems as tokens: tokenizer, prompt template, chat template, stop tokens, and responses back to
text.
"""

import contextlib
import hashlib
import json
import os
import queue
import re
import threading
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dapo_jax.config import DataSection, open_regular, printable
from dapo_jax.data import chat
from dapo_jax.runtime.sandbox import ConfinedError
from dapo_jax.types import InputError, Problem, Prompt

if typing.TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PAD, _END = "<|pad|>", "<|end|>"
_OTHER_FORMS = (
    "tokenizer.model",
    "vocab.json",
    "tekken.json",
)  # of a tokenizer, from which a tokenizer.json can be made
_CHECKED = (
    "Hello, world! Don't",
    "  two\n\n\tindented  lines ",
    "12345 + 6.78 = \\frac{1}{2}",
    "naïve 北京 привет 😀",
    "f(x)=x**2;\r\n}",
)
_ANSWER = "FORTYTWO"  # what the assistant says where the end of its turn is looked for
_SHOWN_TOKENS = 4  # in a message
DEADLINE_S = 60.0  # for a batch of texts to become tokens
_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece")
_MAX_STEPS = 16  # of a decoder; WordPiece adds a space in each
_MAX_TOKEN_CHARS = 1024
_BATCH = 1024  # texts tokenised at a time, of so many characters together
_BATCH_CHARS = 1 << 20


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # it advises to install PyTorch when imported without
    import transformers  # not at the top: takes seconds

    transformers.logging.set_verbosity_error()
    return transformers


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of UTF-8 bytes: `<|pad|>` is 0, `<|end|>` (end of sequence) is 1, byte b is b +
    2. It has no chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {_PAD: 0, _END: 1} | {char: byte + 2 for byte, char in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """The characters that stand for bytes 0..255 in byte-level vocabularies: printable Latin-1
    itself, the rest from U+0100 on.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def load_tokenizer(folder: str | None) -> "PreTrainedTokenizerFast":
    """The tokenizer.json of a model folder, or the byte-level tokenizer for None.

    Runs no code of the folder, downloads nothing.

    Texts become the tokens that the `tokenizers` library reads from tokenizer.json. The class that
    tokenizer_config.json names is not used: classes of transformers rebuild the tokenizer from
    parts of the file, in their own way.

    Raises InputError if there is no usable tokenizer, or if it names no end-of-sequence token.
    """
    if folder is None:
        return byte_tokenizer()
    if not Path(folder).is_dir():  # anything else would be taken for the name of a model on the Hub
        raise InputError(f"{folder}: no such folder; give a Hugging Face model folder")
    if not Path(folder, "tokenizer.json").is_file():
        other = next((name for name in _OTHER_FORMS if Path(folder, name).is_file()), None)
        if other is None:
            raise InputError(
                f"{folder}: no tokenizer.json; give a complete Hugging Face model folder"
            )
        code = f'from transformers import AutoTokenizer as T; T.from_pretrained("{folder}").save_pretrained("{folder}")'
        raise InputError(
            f"{folder}: no tokenizer.json, only {other}; make one, where transformers, sentencepiece and tiktoken are installed: "
            f"python -c '{code}'"
        )
    if special := next(
        (
            path
            for path in sorted(Path(folder).iterdir())
            if not path.is_file() and not path.is_dir()
        ),
        None,
    ):
        raise InputError(
            f"{special}: not a regular file; give a folder of files"
        )  # a FIFO would block transformers
    settings = Path(folder, "tokenizer_config.json")
    if settings.exists() and _json_object(settings).get("auto_map"):
        raise InputError(
            f"{settings}: auto_map: the tokenizer comes with its own code, which is never run; use one without auto_map"
        )
    try:
        tokenizer = _transformers().PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
        _check_decoding(tokenizer, f"{folder}/tokenizer.json")
        changed = _changed_text(tokenizer, str(Path(folder, "tokenizer.json")))
    except InputError:
        raise
    except BaseException as e:  # the many kinds that damaged or missing files raise
        if not isinstance(e, Exception) and not _is_panic(e):
            raise
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise InputError(
            f"{folder}: no readable tokenizer ({reason}); give a folder with a tokenizer.json"
        ) from None
    if changed is not None:
        version = _transformers().__version__
        raise InputError(
            f"{folder}: transformers {version} does not read tokenizer.json as the tokenizers library does: {changed!r} becomes other "
            "tokens or another text; install another version of transformers (requirements.txt)"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    return tokenizer


def _check_decoding(tokenizer: "PreTrainedTokenizerFast", where: str) -> None:
    """Raises InputError for tokenizers that may take very long over a response, make a very long
    text of it, or panic.

    Decoding is what a tokenizer does to responses, which may be adversarial. So no regular
    expressions, whose time may grow exponentially with the text, only steps that make no text
    longer, and a bound on the text of a token.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    state: Any = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "Fuse"}
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    for step in steps:
        kind, pattern = step["type"], step.get("pattern", {}).get("String", "")
        sound = kind in _DECODERS or (
            kind == "Strip" and step["stop"] == 0
        )  # beyond the start of a text it panics
        if not sound and not (
            kind == "Replace" and pattern and len(step["content"]) <= len(pattern)
        ):
            raise InputError(
                f"{where}: decoder: {kind} is not supported with {json.dumps(step)[:100]}; supported: {', '.join(_DECODERS)}, Strip at the "
                "start, Replace of a text by one that is no longer"
            )
    if len(steps) > _MAX_STEPS:
        raise InputError(
            f"{where}: decoder: {len(steps)} steps; use a tokenizer of at most {_MAX_STEPS}"
        )
    longest = max(tokenizer.get_vocab(), key=len)
    if len(longest) > _MAX_TOKEN_CHARS:
        raise InputError(
            f"{where}: the token {longest[:20]!r}... has {len(longest):,} characters; supported: {_MAX_TOKEN_CHARS:,}"
        )


def _changed_text(tokenizer: "PreTrainedTokenizerFast", file: str) -> str | None:
    """The first of a few texts that the tokenizer encodes or decodes otherwise than the
    `tokenizers` library does by its file.
    """
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(file)
    reference.no_truncation()
    reference.no_padding()
    for text in _CHECKED:
        ids = reference.encode(text).ids
        decoded = tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if tokenizer(text)["input_ids"] != ids or decoded != reference.decode(
            ids, skip_special_tokens=False
        ):
            return text
    return None


def _is_panic(error: BaseException) -> bool:
    """Whether the tokenizers library, which is Rust, panicked: that is no Exception, and cannot be
    imported.
    """
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _no_panic(tokenizer: "PreTrainedTokenizerFast", text: str) -> Iterator[None]:
    try:
        yield
    except BaseException as e:
        if not _is_panic(e):
            raise
        reason = " ".join(str(e).split())[:200]
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer fails on a {text} ({reason}); use another one"
        ) from None


def stop_tokens(
    tokenizer: "PreTrainedTokenizerFast",
    folder: str | None,
    section: DataSection,
    more: Sequence[str] = (),
) -> tuple[int, ...]:
    """Tokens that end a response, sorted.

    These are `eos_token_id` of the tokenizer, and of generation_config.json and config.json in
    `folder`; with `section.chat` the token by which the chat template ends a turn of the assistant;
    and `more`, by their texts.

    Raises InputError if one of the files cannot be read or holds something else there, or if one of
    `more` is not a single token.
    """
    stops = {tokenizer.eos_token_id}
    for path in (
        [Path(folder, name) for name in ("generation_config.json", "config.json")] if folder else []
    ):
        if not path.exists():
            continue
        eos = _json_object(path).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(
                f"{path}: eos_token_id: expected a token or a list of tokens, got {repr(eos)[:60]}; correct the value"
            )
        stops |= set(ids)
    if (
        section.chat
        and tokenizer.chat_template
        and (end := _end_of_turn(tokenizer, section.chat_date)) is not None
    ):
        stops.add(end)
    for text in more:
        ids = list(next(_tokenise(tokenizer, [text], add_special_tokens=False)))
        if len(ids) != 1:
            raise InputError(
                f"rollout.stop_tokens: {text!r} is {len(ids)} tokens of this tokenizer; give texts of single tokens"
            )
        stops.add(ids[0])
    return tuple(sorted(stops))


def _end_of_turn(tokenizer: "PreTrainedTokenizerFast", date: str) -> int | None:
    """The token that the chat template writes after what the assistant says; None if it writes text
    there, or fails.
    """
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        template, variables = tokenizer.get_chat_template(), tokenizer.special_tokens_map
        [text] = chat.render(
            template, variables, [turns], date, max_chars=_BATCH_CHARS, add_generation_prompt=False
        )
    except (ConfinedError, ValueError, OSError):  # what `_render` raises for prompts says why
        return None
    said, _, following = (text or "").rpartition(_ANSWER)
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content}
    found = [content for content in ids if said and following.lstrip().startswith(content)]
    return ids[max(found, key=len)] if found else None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            content = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a readable JSON object; fetch the file again")
    return content


def decode(
    tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[int] | np.ndarray, stop: tuple[int, ...]
) -> str:
    """The text of a response: without a final stop token and without special tokens, spaces as they
    were sampled.
    """
    ids = np.asarray(tokens, np.int64).tolist()
    if ids and ids[-1] in stop:
        ids.pop()
    with _no_panic(tokenizer, "response"):
        return typing.cast(
            str, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


# --------------------------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------------------------


def make_prompts(
    problems: Sequence[Problem],
    tokenizer: "PreTrainedTokenizerFast",
    section: DataSection,
    vocab_size: int | None = None,
) -> tuple[list[Prompt], Mapping[str, int]]:
    """Problems as token sequences, in order, and how many were left out for which reason.

    A plain-text problem is put into `section.template`; with `section.chat` it then becomes one
    user turn of the tokenizer's chat template, if there is one. Chat turns go through the chat
    template as they are, or are joined by blank lines; a last turn of the assistant is left open,
    and responses continue it. Problems that contain a control token of the tokenizer, and prompts
    longer than `section.max_prompt_len`, are left out. Raises InputError if the chat template fails
    or hangs, the tokenizer breaks down, no prompt is left, or one has a token from `vocab_size` on.
    """
    clean, markup = _without_control_tokens(problems, tokenizer)
    prompts = []
    left_out = Counter({f"control tokens ({', '.join(markup)})": len(problems) - len(clean)})
    for problem, tokens in zip(clean, _rendered(clean, tokenizer, section), strict=True):
        if tokens is None or len(tokens) > section.max_prompt_len:
            left_out[f"longer than {section.max_prompt_len} tokens"] += 1
        elif not tokens:
            left_out["no tokens"] += 1
        else:
            prompts.append(Prompt(problem, np.array(tokens, np.int32)))
            check_embedded(tokens, vocab_size, tokenizer, f"the prompt of problem {problem.id}")
    counts = {reason: count for reason, count in left_out.items() if count}
    if not prompts:
        reasons = (
            ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "no problems"
        )
        remedy = "raise data.max_prompt_len or use other problems"
        if markup:
            remedy = "write the markup of these prompts as chat turns (role, content), to which the chat template adds it"
        raise InputError(f"data: no usable prompt ({reasons}); {remedy}")
    return prompts, counts


def prompt_lengths(
    problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerFast", section: DataSection
) -> tuple[np.ndarray, int, list[str]]:
    """Tokens of every prompt as `make_prompts` makes them, int64 [Q]; how many it leaves out for
    which control tokens.

    A text of more characters than `section.max_prompt_len` tokens can have counts as one token more
    than these.
    """
    clean, markup = _without_control_tokens(problems, tokenizer)
    found = (
        section.max_prompt_len + 1 if t is None else len(t)
        for t in _rendered(clean, tokenizer, section)
    )
    return np.fromiter(found, np.int64, len(clean)), len(problems) - len(clean), markup


def check_embedded(
    tokens: Sequence[int], vocab_size: int | None, tokenizer: "PreTrainedTokenizerFast", where: str
) -> None:
    """Raises InputError if one of the tokens has no row in the model's embedding, as the image
    placeholder of Gemma 3's small models.
    """
    if vocab_size is not None and (most := max(tokens, default=0)) >= vocab_size:
        name = next((f" {text!r}" for text, i in tokenizer.get_vocab().items() if i == most), "")
        raise InputError(
            f"{where}: token{name} ({most}) is beyond the model's embedding of {vocab_size} tokens; use the model's own tokenizer, and "
            "texts without this token"
        )


def tokens_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256, in hexadecimal, of the prompts' tokens, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(len(prompt.tokens).to_bytes(8, "little") + prompt.tokens.tobytes())
    return digest.hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256, in hexadecimal, of problems (answers and solutions included) and tokens, in order."""
    digest = hashlib.sha256(tokens_digest(prompts).encode())
    for prompt in prompts:
        digest.update(repr(prompt.problem).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def without(prompts: Sequence[Prompt], held_out: Iterable[Prompt]) -> list[Prompt]:
    """The prompts that are none of the held-out ones, token for token, in order."""
    held = {prompt.tokens.tobytes() for prompt in held_out}
    return [prompt for prompt in prompts if prompt.tokens.tobytes() not in held]


def _without_control_tokens(
    problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerFast"
) -> tuple[list[Problem], list[str]]:
    """The problems without such tokens, and the tokens that the others hold, the most frequent
    first, a few at most.
    """
    control = re.compile("|".join(map(re.escape, _control_tokens(tokenizer))) or "(?!)")
    clean, held = [], Counter[str]()
    for problem in problems:
        if found := {token for text in _texts(problem) for token in control.findall(text)}:
            held.update(found)
        else:
            clean.append(problem)
    ranked = sorted(held, key=lambda token: (-held[token], token))
    return clean, [printable(token) for token in ranked[:_SHOWN_TOKENS]] + ["..."] * (
        len(ranked) > _SHOWN_TOKENS
    )


def _rendered(
    problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerFast", section: DataSection
) -> Iterator[list[int] | None]:
    """Each problem through template, chat template and tokenizer.

    None for a text that is longer than any `max_prompt_len` tokens.

    Texts are in memory a batch at a time: templates may make megabytes of every problem.
    """
    conversations = (_conversation(p, section.template) for p in problems)
    max_chars = section.max_prompt_len * max(map(len, tokenizer.get_vocab()))
    texts: Iterator[str | None]
    if as_chat := section.chat and bool(tokenizer.chat_template):
        texts = _render(tokenizer, conversations, section.chat_date, max_chars)
    else:
        joined = ("\n\n".join(turn["content"] for turn in c) for c in conversations)
        texts = (text if len(text) <= max_chars else None for text in joined)
    for batch in _batches(texts):
        tokens = _tokenise(
            tokenizer, [text for text in batch if text is not None], add_special_tokens=not as_chat
        )
        yield from (None if text is None else next(tokens) for text in batch)


def _batches(texts: Iterable[str | None]) -> Iterator[list[str | None]]:
    """Texts of `_BATCH_CHARS` characters together, but for one that is longer."""
    batch: list[str | None] = []
    chars = 0
    for text in texts:
        chars += len(text or "")
        if batch and (len(batch) == _BATCH or chars > _BATCH_CHARS):
            yield batch
            batch, chars = [], len(text or "")
        batch.append(text)
    yield batch


def _control_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted(
        {*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True
    )  # of two, the longer is found


def _texts(problem: Problem) -> list[str]:
    return (
        [problem.prompt]
        if isinstance(problem.prompt, str)
        else [text for turn in problem.prompt for text in (turn.role, turn.content)]
    )


def _conversation(problem: Problem, template: str) -> list[dict[str, str]]:
    if isinstance(problem.prompt, str):
        return [
            {"role": "user", "content": template.replace("{prompt}", problem.prompt)}
        ]  # not str.format: LaTeX is full of braces
    return [{"role": turn.role, "content": turn.content} for turn in problem.prompt]


def _tokenise(
    tokenizer: "PreTrainedTokenizerFast", texts: list[str], *, add_special_tokens: bool
) -> Iterator[list[int]]:
    if not texts:
        return
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def encode() -> None:
        try:
            answer.put((tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"], None))
        except BaseException as e:  # raised below
            answer.put((None, e))

    with _no_panic(tokenizer, "prompt"):
        # The regular expressions of a tokenizer may take for ever, in native code that nothing can
        # interrupt but the end of the process.
        threading.Thread(target=encode, daemon=True).start()
        try:
            encoded, error = answer.get(timeout=DEADLINE_S)
        except queue.Empty:
            raise InputError(
                f"{tokenizer.name_or_path}: the tokenizer takes over {DEADLINE_S:g} s for a prompt; use another one"
            ) from None
        if error is not None:
            raise error
    for tokens in encoded:
        ends = add_special_tokens and len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id
        yield (
            tokens[:-1] if ends else tokens
        )  # an end token would ask for a new text, not for an answer


def _render(
    tokenizer: "PreTrainedTokenizerFast",
    conversations: Iterable[chat.Conversation],
    date: str,
    max_chars: int,
) -> Iterator[str | None]:
    """Conversations through the chat template, up to where the assistant answers."""
    try:
        yield from chat.render(
            tokenizer.get_chat_template(),
            tokenizer.special_tokens_map,
            conversations,
            date,
            max_chars=max_chars,
        )
    except (
        ConfinedError,
        ValueError,
        OSError,
    ) as e:  # several templates and none the default; no process to be had
        reason = " ".join(str(e).split())[:200]
        where = f"chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        raise InputError(
            f"{where}: {reason}; use another tokenizer, or set data.chat to false"
        ) from None
