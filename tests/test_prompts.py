"""Tokenizers, templates, stop tokens and decoding."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import dapo_jax
from dapo_jax.config import DAPO_TEMPLATE, DataSection
from dapo_jax.data import chat
from dapo_jax.data import prompts as module
from dapo_jax.data.prompts import (
    byte_tokenizer,
    decode,
    load_tokenizer,
    make_prompts,
    prompts_digest,
    stop_tokens,
    tokens_digest,
    without,
)
from dapo_jax.types import InputError, Message, Problem, Prompt

BARE = DataSection(template="{prompt}", max_prompt_len=50)
CHATML = (
    # with a beginning-of-sequence token, as many templates
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def byte_level():
    return byte_tokenizer()


@pytest.fixture
def chatty():
    return words_tokenizer(chat_template=CHATML)


def words_tokenizer(**kwargs):
    """A tokenizer that splits at spaces and brackets, and adds <s> in front and </s> behind unless
    told not to.
    """
    words = [
        "<s>",
        "</s>",
        "<unk>",
        "<tool>",
        "a",
        "b",
        "c",
        "[",
        "]",
        "user",
        "system",
        "assistant",
        "{",
        "}",
        "prompt",
        ".",
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.add_special_tokens(
        ["<tool>"]
    )  # known to the tokenizer only, as the reserved tokens of many models are
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs
    )


def problem(prompt):
    return Problem(str(prompt), prompt, "1")


def prompt_tokens(problems, tokenizer, section=BARE):
    return [p.tokens.tolist() for p in make_prompts(problems, tokenizer, section)[0]]


def bytes_of(text):
    return [byte + 2 for byte in text.encode("utf-8")]


# Byte-level tokenizer


def test_byte_tokenizer_numbers_bytes_after_pad_and_end(byte_level):
    assert (byte_level.pad_token_id, byte_level.eos_token_id, len(byte_level)) == (0, 1, 258)
    assert byte_level.convert_ids_to_tokens([0, 1]) == ["<|pad|>", "<|end|>"]
    every_byte_of_utf8 = (
        "".join(map(chr, range(0x800))) + "\u0fff\ud7ff\uffff\U00010000\U0007ffff\U0010ffff"
    )
    assert byte_level(every_byte_of_utf8)["input_ids"] == bytes_of(every_byte_of_utf8)
    assert byte_level("<|end|>a<|pad|>")["input_ids"] == [1, 2 + ord("a"), 0]
    assert byte_level.chat_template is None


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_byte_tokenizer_round_trips_any_text(byte_level, text):
    assert byte_level.decode(byte_level(text)["input_ids"]) == text


def test_byte_tokenizer_keeps_spaces_before_punctuation(byte_level):
    text = " do n't , stop . \n\n 've  "
    assert decode(byte_level, bytes_of(text), (1,)) == text


def test_byte_tokenizer_saves_and_loads_as_any_other(byte_level, tmp_path):
    byte_level.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(str(tmp_path))):
        assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, 258)
        assert loaded("é<|end|> x")["input_ids"] == byte_level("é<|end|> x")["input_ids"]
        assert decode(loaded, bytes_of("a , b"), (1,)) == "a , b"


# Loading


def test_no_folder_is_the_byte_tokenizer(byte_level):
    assert load_tokenizer(None).get_vocab() == byte_level.get_vocab()


@pytest.fixture
def folder(byte_level, tmp_path):
    byte_level.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in (content | changes).items() if value is not ...})
    )


def break_tokenizer(folder, how):
    if how == "missing":
        shutil.rmtree(folder)
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "config only":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif how == "half a file":
        path = folder / "tokenizer.json"
        path.write_text(path.read_text()[:500])
    elif how == "not a tokenizer":
        (folder / "tokenizer.json").write_text("[]")
    elif (
        how == "model config without a tokenizer"
    ):  # for which transformers makes an empty tokenizer
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "config.json").write_text(
            '{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}'
        )
    elif how == "no end token":
        edit(folder / "tokenizer_config.json", eos_token=...)
    elif how == "own code":
        edit(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": [None, "code.Own"]},
            tokenizer_class="Own",
        )
        (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "empty",
        "config only",
        "model config without a tokenizer",
        "half a file",
        "not a tokenizer",
        "no end token",
        "own code",
    ],
)
def test_unusable_tokenizer_folders(folder, how, monkeypatch):
    break_tokenizer(folder, how)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *a, **k: pytest.fail("looked for something on the network")
    )
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(folder))
    message = str(caught.value)
    assert (
        message.startswith(str(folder))
        and "\n" not in message
        and len(message) < len(str(folder)) + 400
    )
    assert not (folder / "ran").exists()


def byte_level_bpe():
    """As Llama 3's, Qwen's and DeepSeek's: spaces are letters of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hello world, 12345 numbers and two  spaces."] * 3, trainer)
    return tokenizer


def sentencepiece_bpe():
    """As Llama 2's and CodeQwen's: a space is ▁, and bytes are tokens of their own."""
    special = ["<unk>", "<|begin|>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["Hello world, 12345 numbers and two  spaces."] * 3, trainer)
    return tokenizer


def tokenizer_folder(folder, tokenizer, **settings):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "add_bos_token": True,
        "model_max_length": 8,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", [byte_level_bpe, sentencepiece_bpe])
@pytest.mark.parametrize(
    "tokenizer_class, model_type",
    [
        ("LlamaTokenizerFast", "llama"),
        ("Qwen2Tokenizer", "qwen2"),
        ("GemmaTokenizer", "gemma3_text"),
        ("PreTrainedTokenizerFast", "qwen3"),
    ],
)
def test_tokens_are_those_of_tokenizer_json_whatever_class_is_named(
    tmp_path, kind, tokenizer_class, model_type
):
    folder = tokenizer_folder(tmp_path / "m", kind(), tokenizer_class=tokenizer_class)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded, reference = (
        load_tokenizer(str(folder)),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    text = "Hello world,  two\n\n\tspaces of 12345. é北"
    ids = reference.encode(text).ids
    assert loaded(text)["input_ids"] == ids and prompt_tokens(
        [problem(text)], loaded, DataSection(template="{prompt}")
    ) == [ids]
    assert (
        decode(loaded, ids, ()) == reference.decode(ids)
        and loaded.get_vocab() == reference.get_vocab()
    )
    if kind is byte_level_bpe:
        assert decode(loaded, ids, ()) == text


@pytest.mark.parametrize(
    "part, value", [("pre_tokenizer", pre_tokenizers.Metaspace()), ("decoder", decoders.Fuse())]
)
def test_a_transformers_that_makes_other_tokens_or_texts_changes_nothing(
    tmp_path, monkeypatch, part, value
):
    """As 5.8.0 did, which lost the spaces of byte-level tokenizers of the class LlamaTokenizer."""
    folder = tokenizer_folder(tmp_path / "m", byte_level_bpe())
    load, text = PreTrainedTokenizerFast.from_pretrained, "Hello, world! two  spaces"

    def from_pretrained(*args, **kwargs):
        tokenizer = load(*args, **kwargs)
        setattr(tokenizer.backend_tokenizer, part, value)
        return tokenizer

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", from_pretrained)
    loaded, ids = load_tokenizer(str(folder)), byte_level_bpe().encode(text).ids
    assert loaded(text)["input_ids"] == ids and decode(loaded, ids, ()) == text


REFUSED_DECODERS = {
    "a regular expression": decoders.Sequence(
        [decoders.Fuse(), decoders.Replace(Regex("(a|aa)+[bc]"), "")]
    ),
    "a longer text": decoders.Replace("a", "a" * 10**5),
    "a text between all": decoders.Replace("", " "),
    "a panic": decoders.Strip("a", 0, 2),
    "what no text model has": decoders.CTC(),
    "as many steps as a file holds": decoders.Sequence([decoders.WordPiece("")] * 17),
}


@pytest.mark.parametrize("case", REFUSED_DECODERS)
def test_decoders_that_adversarial_responses_could_stop_are_refused(tmp_path, case):
    tokenizer = byte_level_bpe()
    tokenizer.decoder = REFUSED_DECODERS[case]
    folder = tokenizer_folder(tmp_path / "m", tokenizer)
    with refusal(f"{folder}/tokenizer.json: decoder: "):
        load_tokenizer(str(folder))


def test_tokens_that_are_very_long_texts_are_refused(tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens(["a" * 1024])
    assert (
        "a" * 1024
        in load_tokenizer(str(tokenizer_folder(tmp_path / "long", tokenizer))).get_vocab()
    )
    tokenizer.add_tokens(["a" * 1025])
    with refusal(f"...tokenizer.json: ...'{'a' * 20}'...1,025 ...1,024"):
        load_tokenizer(str(tokenizer_folder(tmp_path / "longer", tokenizer)))


def test_a_tokenizer_that_panics_over_a_response_is_one_line():
    tokenizer = words_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Strip("a", 0, 2)
    with refusal("...the tokenizer ...index out of bounds"):
        decode(tokenizer, tokenizer.convert_tokens_to_ids(["a"]), ())


def test_a_tokenizer_that_takes_for_ever_over_a_prompt_is_one_line(monkeypatch):
    """Its regular expressions, here of 2^14 ways to divide each word, run in native code."""
    monkeypatch.setattr(module, "DEADLINE_S", 0.3)
    tokenizer = words_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("(a|aa)+[bc]"), "isolated"
    )
    with refusal("...the tokenizer ...0.3 s for a prompt"):
        make_prompts([problem(("a" * 28 + " ") * 10)], tokenizer, BARE)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_folder_holds_regular_files(tmp_path, name):
    folder = tokenizer_folder(tmp_path / "m", byte_level_bpe())
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with refusal(f"{folder / name}: not a regular file"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("other", ["tokenizer.model", "vocab.json"])
def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path, other):
    (tmp_path / other).write_text("{}")
    with refusal(f"{tmp_path}: ...tokenizer.json; ...AutoTokenizer...save_pretrained"):
        load_tokenizer(str(tmp_path))


def test_loading_is_offline(folder, monkeypatch):
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *a, **k: pytest.fail("looked for something on the network")
    )
    assert load_tokenizer(str(folder)).eos_token_id == 1


@pytest.mark.slow
def test_transformers_is_silent_and_brings_no_other_framework(folder):
    edit(folder / "tokenizer_config.json", model_max_length=5)  # it would warn of longer texts
    code = f"""
import sys
from dapo_jax.config import DataSection
from dapo_jax.data.prompts import load_tokenizer, make_prompts
from dapo_jax.types import Problem
make_prompts([Problem("1", "a long text", "1")], load_tokenizer({str(folder)!r}), DataSection())
assert not {{"jax", "tensorflow"}} & sys.modules.keys()
"""
    root = Path(dapo_jax.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Stop tokens


@pytest.mark.parametrize(
    "generation, model, expected",
    [
        (None, None, (1,)),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (1, 7, 9)),
        ({"eos_token_id": [5, 1, 3]}, {"eos_token_id": None}, (1, 3, 5)),
        ({}, {"eos_token_id": 0}, (0, 1)),
    ],
)
def test_stop_tokens_are_the_union(byte_level, tmp_path, generation, model, expected):
    for name, content in (("generation_config.json", generation), ("config.json", model)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert stop_tokens(byte_level, str(tmp_path), BARE) == expected


def test_stop_tokens_without_a_folder(byte_level):
    assert stop_tokens(byte_level, None, BARE) == (1,)


IM = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ENDS = {  # of a turn, by chat template
    "ChatML": (
        IM + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "a header whatever is asked for": (IM + "<|im_start|>assistant\n", "<|im_end|>"),
    "a longer token that begins alike": (IM.replace("<|im_end|>", " <|im_end|>|"), "<|im_end|>|"),
    "text": (
        "{% for m in messages %}### {{ m.role }}: {{ m.content }} END {% endfor %}<|im_end|>",
        None,
    ),
    "no turn of the assistant": ("{{ messages[0].content }}<|im_end|>", None),
    "an error": ("{{ raise_exception('no') if messages|length > 1 }}", None),
    "none": (None, None),
}


@pytest.mark.default("ChatML", "none")
@pytest.mark.parametrize("case", ENDS)
def test_the_template_s_end_of_turn_is_a_stop_token(case):
    """As of Qwen2.5's base models, whose end-of-sequence token is another one."""
    template, end = ENDS[case]
    tokenizer = words_tokenizer(chat_template=template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|im_end|>|"]}
    )
    ends = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    assert stop_tokens(tokenizer, None, DataSection()) == (1, *ends)
    assert stop_tokens(tokenizer, None, DataSection(chat=False)) == (1,)
    for stop in ends:
        assert decode(tokenizer, [4, 5, stop], (1, stop)) == "a b"


def test_stop_tokens_of_the_config_are_single_tokens(byte_level):
    assert stop_tokens(byte_level, None, BARE, ("<|pad|>", "!")) == (0, 1, 2 + ord("!"))
    for text, count in (("ab", 2), ("", 0), ("é", 2)):
        with refusal(f"rollout.stop_tokens: '{text}' is {count} tokens"):
            stop_tokens(byte_level, None, BARE, (text,))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"eos_token_id": "</s>"}',
        '{"eos_token_id": [1, null]}',
        '{"eos_token_id": true}',
        '{"eos_token_id": -1}',
    ],
)
def test_unusable_end_tokens(byte_level, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with refusal(f"{tmp_path}/config.json: "):
        stop_tokens(byte_level, str(tmp_path), BARE)


# Prompts


def test_plain_problem_goes_into_the_template(byte_level):
    # would break str.format and %, and must not be filled in twice
    text = "Find {x} in \\frac{1}{2}: {prompt} {0} %s"
    [prompt], left_out = make_prompts([problem(text)], byte_level, DataSection())
    before, after = DAPO_TEMPLATE.split("{prompt}")
    assert prompt.tokens.dtype == np.int32 and prompt.tokens.tolist() == bytes_of(
        before + text + after
    )
    assert prompt.problem == problem(text) and left_out == {}


def test_default_special_tokens_but_no_end_token(chatty):
    chatty.chat_template = None
    assert prompt_tokens([problem("a b")], chatty) == [[0, 4, 5]]
    assert chatty("a b")["input_ids"] == [0, 4, 5, 1]  # what it would do by itself


def test_chat_template_wraps_a_plain_problem_without_a_second_start_token(chatty):
    section = DataSection(template="c {prompt} c", max_prompt_len=50)
    assert (
        chatty.convert_ids_to_tokens(prompt_tokens([problem("a b")], chatty, section)[0])
        == "<s> [ user ] c a b c [ assistant ]".split()
    )


def test_chat_can_be_switched_off(chatty):
    section = DataSection(template="{prompt}", chat=False, max_prompt_len=50)
    turns = problem((Message("system", "a"), Message("user", "b")))
    assert prompt_tokens([problem("a b"), turns], chatty, section) == [[0, 4, 5], [0, 4, 5]]


def test_chat_turns_are_used_as_they_are(chatty):
    section = DataSection(template="c c {prompt}", max_prompt_len=50)
    tokens = prompt_tokens(
        [problem((Message("system", "a"), Message("user", "b")))], chatty, section
    )[0]
    assert (
        chatty.convert_ids_to_tokens(tokens) == "<s> [ system ] a [ user ] b [ assistant ]".split()
    )


def test_chat_turns_without_a_chat_template_are_joined_by_blank_lines(byte_level):
    assert prompt_tokens(
        [problem((Message("system", "a"), Message("user", "b\nc")))], byte_level
    ) == [bytes_of("a\n\nb\nc")]


@pytest.mark.parametrize(
    "bad",
    [
        "x</s>",
        "<s>",
        "<unk>y",
        "call <tool> now",
        (Message("user", "a"), Message("user", "b</s>")),
        (Message("</s>", "a"),),
    ],
    ids=str,
)
def test_control_tokens_in_problems_are_left_out_and_counted(bad):
    check_left_out([problem(bad), problem("a"), problem(bad), problem("</ s>")], words_tokenizer())


def test_control_tokens_are_left_out_before_a_chat_template_sees_them():
    bad = (Message("user", "a"), Message("user", "b</s>"))
    check_left_out(
        [problem(bad), problem("a"), problem(bad), problem("</ s>")],
        words_tokenizer(chat_template=CHATML),
    )


def check_left_out(problems, tokenizer):
    prompts, left_out = make_prompts(problems, tokenizer, BARE)
    assert [p.problem.prompt for p in prompts] == ["a", "</ s>"]
    [token] = [
        token for token in ("</s>", "<s>", "<unk>", "<tool>") if token in str(problems[0].prompt)
    ]
    assert left_out == {f"control tokens ({token})": 2}


def test_control_tokens_of_the_template_are_kept(byte_level):
    section = DataSection(template="<|end|>{prompt}", max_prompt_len=50)
    assert prompt_tokens([problem("a")], byte_level, section) == [[1, *bytes_of("a")]]


def test_long_and_empty_prompts_are_left_out_and_counted(byte_level):
    problems = [
        problem(text) for text in ("x" * 51, "y" * 50, "é" * 26, "z" * 10_000, "<|pad|>", "ok")
    ]
    prompts, left_out = make_prompts(problems, byte_level, BARE)
    assert [p.problem.prompt[0] for p in prompts] == ["y", "o"]
    assert left_out == {"longer than 50 tokens": 3, "control tokens (<|pad|>)": 1}
    bare_words = words_tokenizer()
    bare_words.backend_tokenizer.post_processor = None
    assert make_prompts([problem("\u3000"), problem("a")], bare_words, BARE)[1] == {"no tokens": 1}


def test_a_token_beyond_the_embedding_is_refused_where_a_prompt_holds_it():
    """Gemma 3 has one that no text holds; the tokenizer of another model has many."""
    byte_level = byte_tokenizer()
    byte_level.add_tokens(["<image>"])
    assert len(make_prompts([problem("image")], byte_level, BARE, 258)[0]) == 1
    with refusal("...problem an <image>: token '<image>' (258) ...embedding of 258"):
        make_prompts([problem("a"), problem("an <image>")], byte_level, BARE, 258)


def test_order_is_kept(byte_level):
    texts = [f"{i}" * (1 + i % 4) for i in range(20)]
    assert prompt_tokens([problem(t) for t in texts], byte_level) == [bytes_of(t) for t in texts]


def test_prompts_that_hold_markup_are_told_which_and_what_to_do(byte_level):
    """As TinyZero's are: whole conversations, written out for another tokenizer's template."""
    marked = [
        problem((Message("user", f"<|end|>user {n} <|pad|><|end|>assistant"),)) for n in range(2)
    ] + [problem("<|end|>")]
    with refusal("data: ...3 control tokens (<|end|>, <|pad|>)...chat turns (role, content)"):
        make_prompts(marked, byte_level, BARE)
    many = byte_tokenizer()
    many.add_special_tokens(
        {"additional_special_tokens": [f"<{n}>" for n in range(9)] + ["<1><2>", "<\n>"]}
    )
    _, left_out = make_prompts(
        [problem("<1><2>"), problem("<3><4><5><6><7><3>"), problem("<3><\n>"), problem("a")],
        many,
        BARE,
    )
    assert left_out == {"control tokens (<3>, <\\n>, <1><2>, <4>, ...)": 3}


@pytest.mark.parametrize(
    "problems",
    [[], [problem("x" * 51)], [problem("<|end|>"), problem("y" * 60)]],
    ids=["none", "long", "both"],
)
def test_no_prompt_left(byte_level, problems):
    with refusal("data: no usable prompt"):
        make_prompts(problems, byte_level, BARE)


def test_a_tokenizer_whose_pattern_explodes_is_bad_input(folder):
    """The library gives a search up after so many steps, by a panic, which is no Exception."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pattern = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [pattern, tokenizer["pre_tokenizer"]],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = load_tokenizer(str(folder))
    with refusal(f"{folder}: the tokenizer fails on a prompt"):
        make_prompts([problem("a" * 40 + "!")], loaded, BARE)


def test_digests_of_prompts_tell_tokens_and_answers_apart():
    one, other = (Prompt(Problem("1", "a", answer), np.array([1, 2], np.int32)) for answer in "xy")
    split = [Prompt(one.problem, np.array([i], np.int32)) for i in (1, 2)]
    assert tokens_digest([one]) == tokens_digest([other]) != tokens_digest(split)
    assert len({prompts_digest([one]), prompts_digest([other]), prompts_digest(split)}) == 3


def test_held_out_prompts_are_left_out_however_they_are_written(byte_level):
    """The same text by way of the template and as a chat turn is the same prompt."""
    section = DataSection(template="Q: {prompt}", max_prompt_len=50)
    train, _ = make_prompts([problem(text) for text in "abca"], byte_level, section)
    held, _ = make_prompts([problem((Message("user", "Q: b"),)), problem("d")], byte_level, section)
    assert [p.problem.prompt for p in without(train, held)] == ["a", "c", "a"]
    assert without(train, []) == train


# Chat templates

HOLDING = "{{ 9 ** (9 ** 9) }}"  # for hours, and with the interpreter's lock
LOOPS = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"


@pytest.mark.default("*roles must alternate*", "*unsafe", "{% for i*")
@pytest.mark.parametrize(
    "template, says",
    [
        (
            "{{ raise_exception('roles must alternate\nand more') }}",
            "roles must alternate and more",
        ),
        ("{% for", "unexpected 'end of template'"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        (LOOPS, "timed out after 1 s"),
        (HOLDING, "timed out after 1 s"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ({"rag": "a", "tools": "b"}, "no default specified"),
    ],
)
def test_chat_templates_that_fail(template, says, monkeypatch):
    monkeypatch.setattr(chat, "DEADLINE_S", 1.0)
    with refusal(f"chat template of ...{says}...data.chat"):
        make_prompts([problem("a"), problem("b")], words_tokenizer(chat_template=template), BARE)


@pytest.mark.slow
def test_the_deadline_is_for_each_conversation(monkeypatch):
    """Twenty conversations of about 0.1 s each: within a second each, but not together."""
    monkeypatch.setattr(chat, "DEADLINE_S", 1.0)
    slow = (
        "{% for i in range(900) %}{% for j in range(2000) %}{% endfor %}{% endfor %}{{ "
        "messages[0].content }}"
    )
    texts = [str(n) for n in range(20)]
    assert [
        *chat.render(slow, {}, [[{"role": "user", "content": text}] for text in texts], max_chars=9)
    ] == texts


@pytest.mark.slow
def test_long_conversations_are_sent_one_at_a_time(monkeypatch):
    """Twenty of 4 MB, each within the memory of the process, but not together."""
    monkeypatch.setattr(chat, "_MEMORY_BYTES", 64 << 20)
    turns = [{"role": "user", "content": "a" * (4 << 20)}]
    texts = chat.render("{{ messages[0].content }}", {}, [turns] * 20, max_chars=9)
    assert [*texts] == [None] * 20


@pytest.mark.slow
def test_the_deadline_is_not_for_the_caller(monkeypatch):
    """It may take longer over one text than the process has for the next, which the pipe between
    them cannot hold.
    """
    monkeypatch.setattr(chat, "DEADLINE_S", 1.0)
    lengths = []
    for text in chat.render(
        "{{ messages[0].content * 10 ** 5 }}",
        {},
        [[{"role": "user", "content": "a"}]] * 3,
        max_chars=10**5,
    ):
        lengths.append(len(text))
        if len(lengths) == 1:
            time.sleep(3.2)
    assert lengths == [10**5] * 3


def test_texts_that_no_prompt_can_be_are_left_out_as_too_long_before_they_are_tokenised():
    """20 MB of a template for each problem; they stay in its process.

    Of 50 tokens none has more characters than 50 of the longest.
    """
    tokenizer = words_tokenizer(
        chat_template=(
            "{{ messages[0].content * (20 if messages[0].content == 'a' else 20 * 2 ** 20) }}"
        )
    )
    most = 50 * max(map(len, tokenizer.get_vocab()))
    assert 20 < most < 20 * 2**20
    prompts, left_out = make_prompts([problem("a"), problem("b"), problem("c")], tokenizer, BARE)
    assert ([p.problem.prompt for p in prompts], left_out) == (["a"], {"longer than 50 tokens": 2})


@pytest.mark.slow
def test_memory_holds_a_batch_of_texts_and_tokens(byte_level):
    section = DataSection(
        template="{prompt}" + "x" * 60_000, max_prompt_len=10_000
    )  # within what 10,000 of `<|pad|>` would have
    tracemalloc.start()
    try:
        with refusal("data: ...60 longer than 10000 tokens"):
            make_prompts([problem(str(n)) for n in range(60)], byte_level, section)
        assert (
            tracemalloc.get_traced_memory()[1] < 30e6
        )  # 1 MB of text and its tokens; all together 60 MB
    finally:
        tracemalloc.stop()


def test_a_template_that_writes_the_date_is_always_given_the_same():
    """As Llama 3.2's does: a run that resumes tomorrow has the same prompts."""
    tokenizer = words_tokenizer(
        chat_template=(
            "{% if strftime_now is defined %}{{ strftime_now('[ %d %b %Y ]') }}{% endif %}"
        )
    )
    tokenizer.add_tokens(["26", "Jul", "2024"])
    [found] = prompt_tokens([problem("a")], tokenizer, DataSection())
    assert tokenizer.decode(found) == "[ 26 Jul 2024 ]"


REAL_TEMPLATES = [
    CHATML,
    "{%- set ns = namespace(found=false) -%}{% for m in messages %}{% if "
    "loop.first and m.role != 'system' %}{{ bos_token }}{% endif %}"
    "{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}{{ '<|' + "
    "m['role'] + '|>\\n' + m['content'] | trim + eos_token }}\n"
    "{% if not m.content %}{% continue %}{% endif %}{% endfor %}\n{% if ns.found "
    "and add_generation_prompt %}{{ 'assistant' }}{% endif %}",
    "{% generation %}{{ messages | tojson(indent=2) }}{% endgeneration %}{{ tools "
    "is none }}{{ strftime_now('%Y') | length }}",
]


@pytest.mark.parametrize("template", REAL_TEMPLATES)
def test_texts_are_those_of_transformers(template):
    tokenizer = words_tokenizer(chat_template=template)
    conversations = [
        [{"role": "user", "content": "a b"}],
        [
            {"role": "system", "content": ""},
            {"role": "user", "content": " é\u2028\U0001f600 <b> {{ 1 }} \n"},
        ],
    ]
    found = [*chat.render(template, tokenizer.special_tokens_map, conversations, max_chars=1000)]
    assert found == [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for turns in conversations
    ]


@pytest.mark.slow
def test_a_last_turn_of_the_assistant_is_continued(chatty, byte_level):
    """Its turn is not closed and no other one opened: what follows is the response."""
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "<think>\n"}]
    for template in REAL_TEMPLATES[:2]:
        tokenizer = words_tokenizer(chat_template=template)
        [found] = chat.render(template, tokenizer.special_tokens_map, [turns], max_chars=1000)
        assert found == tokenizer.apply_chat_template(
            turns, tokenize=False, continue_final_message=True
        )
        assert found.rstrip().endswith("<think>")

    prefill = problem((Message("user", "a"), Message("assistant", "b\n")))
    words = [
        " ".join(chatty.convert_ids_to_tokens(ids))
        for ids in prompt_tokens([prefill, problem("c")], chatty)
    ]
    assert words == ["<s> [ user ] a [ assistant ] b", "<s> [ user ] c [ assistant ]"]
    assert prompt_tokens([prefill], byte_level) == [bytes_of("a\n\nb\n")]
    silent = words_tokenizer(
        chat_template=(
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
        )
    )
    with refusal("chat template of ...the assistant's last turn: continue_final_message"):
        make_prompts([prefill], silent, BARE)


@pytest.mark.slow
def test_a_template_without_a_caller_ends_itself():
    """Its process has a deadline of its own, for where the caller was killed."""
    code = f"""
from dapo_jax.data import chat
from dapo_jax.runtime import sandbox
receive = sandbox.Process.receive
def after_start(process):
    if process._patience_s == 1.0:  # it is ready
        print(process._process.pid, flush=True)
    return receive(process)
sandbox.Process.receive, chat.DEADLINE_S = after_start, 1.0
[*chat.render({HOLDING!r}, {{}}, [[{{"role": "user", "content": "a"}}]], max_chars=9)]
"""
    root = Path(dapo_jax.__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True
    ) as caller:
        pid = int(caller.stdout.readline())
        caller.kill()
    end = time.monotonic() + 20
    with contextlib.suppress(OSError):  # no such process any more
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            assert time.monotonic() < end
            time.sleep(0.1)


# Decoding


def test_decode_drops_one_final_stop_token_and_special_tokens(byte_level):
    stop = (1, 2 + ord("!"))
    assert decode(byte_level, np.array([*bytes_of("ab"), 1], np.int32), stop) == "ab"
    assert decode(byte_level, bytes_of("ab!!"), stop) == "ab!"
    assert decode(byte_level, bytes_of("a!b"), stop) == "a!b"
    assert decode(byte_level, [1, *bytes_of("a"), 0, *bytes_of("b")], stop) == "ab"
    assert decode(byte_level, [], stop) == "" == decode(byte_level, [1], stop)


def test_decode_keeps_spaces_even_if_the_tokenizer_would_rather_not():
    tidying = words_tokenizer(clean_up_tokenization_spaces=True)
    tokens = tidying.convert_tokens_to_ids(["a", ".", "b"])
    assert tidying.decode(tokens) == "a. b" and decode(tidying, tokens, (1,)) == "a . b"


def test_decode_survives_broken_characters_and_unknown_tokens(byte_level):
    assert decode(byte_level, [*bytes_of("a"), 2 + 0xC3, *bytes_of("b")], (1,)) == "a\ufffdb"
    assert (
        decode(byte_level, [*bytes_of("a"), 258, 10**6], (1,)) == "a"
    )  # a model's vocabulary may be larger than its tokenizer's
