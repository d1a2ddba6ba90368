"""Problems as tokens: tokenizer, prompt template, chat template, stop tokens; responses as text."""

import contextlib
import hashlib
import json
import os
import re
import threading
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from dapo_jax.config import DataSection, printable
from dapo_jax.data import chat
from dapo_jax.runtime.files import read_json
from dapo_jax.runtime.sandbox import ConfinedError
from dapo_jax.types import InputError, Problem, Prompt, one_line

if typing.TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

_OTHER = "use another tokenizer"  # what to do
_PAD, _END = "<|pad|>", "<|end|>"
_CONVERT = "AutoTokenizer.from_pretrained('.').save_pretrained('.') of transformers in that folder"
_ANSWER = "FORTYTWO"  # of the assistant, to find the end of its turn
_MAX_CHARS = 1 << 20  # of that conversation
_SHOWN_TOKENS = 4  # in a message
DEADLINE_S = 60.0  # to tokenise a prompt
_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece")
_SUPPORTED = f"{', '.join(_DECODERS)}, Strip at the start, Replace by no longer text"
_MAX_STEPS = 16  # of a decoder; WordPiece adds a space in each
_MAX_TOKEN_CHARS = 1024


# ------------------------------------------------------------------------------------- tokenizers


def _transformers() -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "install PyTorch"
    import transformers  # not at the top: takes seconds

    transformers.logging.set_verbosity_error()
    return transformers


def byte_tokenizer() -> "Tokenizer":
    """A tokenizer of UTF-8 bytes without a chat template: `<|pad|>` is 0, `<|end|>` (end of
    sequence) is 1, byte b is b + 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Printable bytes are written as their Latin-1 characters, the others as those from U+0100.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = (char for char in alphabet if ord(char) > 255)
    chars = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    vocab = {token: number for number, token in enumerate([_PAD, _END, *chars])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": _PAD, "eos_token": _END, "clean_up_tokenization_spaces": False}
    return _transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def load_tokenizer(folder: str | None) -> "Tokenizer":
    """The tokenizer.json of a model folder, or the byte-level tokenizer for None.

    Runs no code of the folder and downloads nothing. Tokens and texts are those of the `tokenizers`
    library: transformers' classes rebuild the tokenizer in their own way. Raises InputError if
    there is no usable tokenizer, or it has no end-of-sequence token.
    """
    if folder is None:
        return byte_tokenizer()
    path = Path(folder)
    _check_folder(path)
    with _errors_as_input(folder, "no readable tokenizer", "use another tokenizer.json", Exception):
        from tokenizers import Tokenizer

        load = _transformers().PreTrainedTokenizerFast.from_pretrained
        tokenizer = load(folder, local_files_only=True)
        tokenizer._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer._tokenizer.add_special_tokens(tokenizer.all_special_tokens)
        _check_decoding(tokenizer, f"{folder}/tokenizer.json")
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no end-of-sequence token"
        raise InputError(f"{folder}: {what}; set eos_token in tokenizer_config.json")
    return tokenizer


def _check_folder(path: Path) -> None:
    if not path.is_dir():  # from_pretrained would take it for the name of a model on the Hub
        raise InputError(f"{path}: no such folder; give a Hugging Face model folder")
    if not (path / "tokenizer.json").is_file():
        fix = f"give a complete model folder, or convert its tokenizer: {_CONVERT}"
        raise InputError(f"{path}: no tokenizer.json; {fix}")
    for file in sorted(path.iterdir()):
        if not file.is_file() and not file.is_dir():  # a FIFO would block transformers
            raise InputError(f"{file}: not a regular file; give a folder of files")
    settings = path / "tokenizer_config.json"
    if settings.exists() and read_json(settings).get("auto_map"):
        what = "auto_map: the tokenizer's own code is never run"
        raise InputError(f"{settings}: {what}; use a tokenizer without auto_map")


def _check_decoding(tokenizer: "Tokenizer", where: str) -> None:
    """Raises InputError if decoding an adversarial response may take very long, return a very long
    text or panic: no regular expressions, no step that makes text longer, no very long token."""
    decoder = tokenizer.backend_tokenizer.decoder
    state: Any = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "Fuse"}
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    for step in steps:
        kind, pattern = step["type"], step.get("pattern", {}).get("String", "")
        strips = kind == "Strip" and step["stop"] == 0  # it panics beyond the start of a text
        shortens = kind == "Replace" and pattern and len(step["content"]) <= len(pattern)
        if kind not in _DECODERS and not strips and not shortens:
            what = f"{kind} is not supported with {json.dumps(step)[:100]}"
            raise InputError(f"{where}: decoder: {what}; supported: {_SUPPORTED}")
    if len(steps) > _MAX_STEPS:
        raise InputError(f"{where}: decoder: {len(steps)} steps; supported: {_MAX_STEPS}")
    longest = max(tokenizer.get_vocab(), key=len)
    if len(longest) > _MAX_TOKEN_CHARS:
        what = f"the token {longest[:20]!r}... has {len(longest):,} characters"
        raise InputError(f"{where}: {what}; supported: {_MAX_TOKEN_CHARS:,}")


@contextlib.contextmanager
def _errors_as_input(where: str, what: str, fix: str, kinds: Any = ()) -> Iterator[None]:
    """Raises errors of these kinds, and panics of the Rust library, as one line of InputError."""
    try:
        yield
    except InputError:
        raise
    except BaseException as e:  # PanicException is no Exception, and cannot be imported
        if not isinstance(e, kinds) and type(e).__name__ != "PanicException":
            raise
        raise InputError(f"{where}: {what} ({one_line(e)}); {fix}") from None


def stop_tokens(
    tokenizer: "Tokenizer", folder: str | None, section: DataSection, more: Sequence[str] = ()
) -> tuple[int, ...]:
    """Tokens that end a response, sorted.

    `eos_token_id` of the tokenizer and of generation_config.json and config.json in `folder`; with
    `section.chat` the token by which the chat template ends the assistant's turn; and the texts
    `more`. Raises InputError for an unreadable file or value, or a text of several tokens.
    """
    stops = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if folder is None or not (path := Path(folder, name)).exists():
            continue
        eos = read_json(path).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(i) is int and i >= 0 for i in ids):
            what = f"expected a token or a list of tokens, got {repr(eos)[:60]}"
            raise InputError(f"{path}: eos_token_id: {what}; correct the value")
        stops |= set(ids)
    if section.chat and tokenizer.chat_template:
        stops |= _end_of_turn(tokenizer)
    for text in more:
        ids = _tokenise(tokenizer, text, add_special_tokens=False)
        if len(ids) != 1:
            what = f"{text!r} is {len(ids)} tokens of this tokenizer"
            raise InputError(f"rollout.stop_tokens: {what}; give texts of single tokens")
        stops |= {*ids}
    return tuple(sorted(stops))


def _end_of_turn(tokenizer: "Tokenizer") -> set[int]:
    """The token that the chat template writes after the assistant's text; empty without one."""
    texts = {"user": "question", "assistant": _ANSWER}
    turns = [{"role": role, "content": texts[role]} for role in ("user", "assistant", "user")]
    try:
        template, variables = tokenizer.get_chat_template(), tokenizer.special_tokens_map
        [text] = chat.render(template, variables, [turns], max_chars=_MAX_CHARS)
    except (ConfinedError, ValueError, OSError):
        return set()
    before, _, following = (text or "").rpartition(_ANSWER)
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    found = [token for token in ids if token and before and following.lstrip().startswith(token)]
    return {ids[max(found, key=len)]} if found else set()


def decode(
    tokenizer: "Tokenizer", tokens: Sequence[int] | np.ndarray, stop: tuple[int, ...]
) -> str:
    """The text of a response, without a final stop token and special tokens, spaces as sampled."""
    ids = np.asarray(tokens, np.int64).tolist()
    if ids and ids[-1] in stop:
        ids.pop()
    how: Any = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    with _errors_as_input(tokenizer.name_or_path, "the tokenizer fails on a response", _OTHER):
        return str(tokenizer.decode(ids, **how))


def shown_prompt(tokenizer: "Tokenizer", tokens: Sequence[int] | np.ndarray) -> str:
    """The text of a prompt as it is fed, special tokens included."""
    how: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(np.asarray(tokens, np.int64).tolist(), **how))


# ---------------------------------------------------------------------------------------- prompts


def make_prompts(
    problems: Sequence[Problem],
    tokenizer: "Tokenizer",
    section: DataSection,
    vocab_size: int | None = None,
) -> tuple[list[Prompt], Mapping[str, int]]:
    """Problems as tokens, in order, and how many were left out for which reason.

    A text goes into `section.template`, and with `section.chat` becomes one user turn of the chat
    template, if there is one. Chat turns go through the chat template as they are, or are joined by
    blank lines. Problems with control tokens and prompts above `section.max_prompt_len` are left
    out. Raises InputError if the chat template or the tokenizer fails, no prompt is left, or one
    has a token from `vocab_size` on.
    """
    clean, markup = _without_control_tokens(problems, tokenizer)
    prompts = []
    left_out = Counter({f"control tokens ({', '.join(markup)})": len(problems) - len(clean)})
    for problem, tokens in zip(clean, _tokenised(clean, tokenizer, section), strict=True):
        if tokens is None or len(tokens) > section.max_prompt_len:
            left_out[f"longer than {section.max_prompt_len} tokens"] += 1
        elif not tokens:
            left_out["no tokens"] += 1
        else:
            prompts.append(Prompt(problem, np.array(tokens, np.int32)))
            check_embedded(tokens, vocab_size, tokenizer, f"the prompt of problem {problem.id}")
    counts = {reason: count for reason, count in left_out.items() if count}
    if not prompts:
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "no problems"
        fix = "raise data.max_prompt_len or use other problems"
        if markup:
            fix = "write these prompts as chat turns (role, content), without the markup"
        raise InputError(f"data: no usable prompt ({reasons}); {fix}")
    return prompts, counts


def check_embedded(
    tokens: Sequence[int], vocab_size: int | None, tokenizer: "Tokenizer", where: str
) -> None:
    """Raises InputError for a token beyond the embedding, as Gemma 3's image token may be."""
    if vocab_size is not None and (most := max(tokens, default=0)) >= vocab_size:
        name = next((f" {text!r}" for text, i in tokenizer.get_vocab().items() if i == most), "")
        what = f"token{name} ({most}) is beyond the model's embedding of {vocab_size} tokens"
        raise InputError(f"{where}: {what}; use the model's own tokenizer, or leave out this token")


def tokens_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256, in hexadecimal, of the prompts' tokens, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(len(prompt.tokens).to_bytes(8, "little") + prompt.tokens.tobytes())
    return digest.hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256, in hexadecimal, of problems, with answers and solutions, and tokens, in order."""
    digest = hashlib.sha256(tokens_digest(prompts).encode())
    for prompt in prompts:
        digest.update(repr(prompt.problem).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def without(prompts: Sequence[Prompt], held_out: Iterable[Prompt]) -> list[Prompt]:
    """The prompts that are none of the held-out ones, token for token, in order."""
    held = {prompt.tokens.tobytes() for prompt in held_out}
    return [prompt for prompt in prompts if prompt.tokens.tobytes() not in held]


def _without_control_tokens(
    problems: Sequence[Problem], tokenizer: "Tokenizer"
) -> tuple[list[Problem], list[str]]:
    """The problems without control tokens, and the most frequent tokens of the others."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = {*tokenizer.all_special_tokens, *added} - {""}
    longest_first = sorted(map(re.escape, control), key=len, reverse=True)
    pattern = re.compile("|".join(longest_first) or "(?!)")
    clean, held = [], Counter[str]()
    for problem in problems:
        texts = [text for turn in _conversation(problem) for text in turn.values()]
        found = {token for text in texts for token in pattern.findall(text)}
        held.update(found)
        clean += [] if found else [problem]
    ranked = sorted(held, key=lambda token: (-held[token], token))
    shown = [printable(token) for token in ranked[:_SHOWN_TOKENS]]
    return clean, shown if len(ranked) <= _SHOWN_TOKENS else [*shown, "..."]


def _conversation(problem: Problem, template: str = "{prompt}") -> list[dict[str, str]]:
    if isinstance(problem.prompt, str):  # not str.format: LaTeX is full of braces
        return [{"role": "user", "content": template.replace("{prompt}", problem.prompt)}]
    return [{"role": turn.role, "content": turn.content} for turn in problem.prompt]


def _tokenised(
    problems: Sequence[Problem], tokenizer: "Tokenizer", section: DataSection
) -> Iterator[list[int] | None]:
    """Each problem through template, chat template and tokenizer, one in memory at a time. None for
    a text that is longer than any `max_prompt_len` tokens."""
    conversations = (_conversation(p, section.template) for p in problems)
    max_chars = section.max_prompt_len * max(map(len, tokenizer.get_vocab()))
    texts: Iterator[str | None] = ("\n\n".join(t["content"] for t in c) for c in conversations)
    if as_chat := section.chat and bool(tokenizer.chat_template):
        texts = _chat_texts(tokenizer, conversations, max_chars)
    for text in texts:
        if text is None or len(text) > max_chars:
            yield None
        else:
            yield _tokenise(tokenizer, text, add_special_tokens=not as_chat)


def _tokenise(tokenizer: "Tokenizer", text: str, *, add_special_tokens: bool) -> list[int]:
    """Tokens of a text, without an end token, behind which a model starts a new text.

    In a thread: regular expressions of a tokenizer may never end, and cannot be interrupted.
    """
    answer: Future[list[int]] = Future()

    def encode() -> None:
        try:
            answer.set_result(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except BaseException as e:
            answer.set_exception(e)

    where, end = tokenizer.name_or_path, tokenizer.eos_token_id
    with _errors_as_input(where, "the tokenizer fails on a prompt", _OTHER):
        threading.Thread(target=encode, daemon=True).start()
        try:
            tokens = answer.result(DEADLINE_S)
        except TimeoutError:
            what = f"the tokenizer takes over {DEADLINE_S:g} s for a prompt"
            raise InputError(f"{where}: {what}; {_OTHER}") from None
    ends = add_special_tokens and len(tokens) > 1 and tokens[-1] == end
    return tokens[:-1] if ends else tokens


def _chat_texts(
    tokenizer: "Tokenizer", conversations: Iterable[Any], max_chars: int
) -> Iterator[str | None]:
    """Conversations through the chat template, up to where the assistant answers."""
    where = f"chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    fix = f"{_OTHER}, or set data.chat to false"
    kinds = (ConfinedError, ValueError, OSError)  # several templates and no default; no process
    with _errors_as_input(where, "it fails", fix, kinds):
        template, variables = tokenizer.get_chat_template(), tokenizer.special_tokens_map
        yield from chat.render(template, variables, conversations, max_chars=max_chars)
