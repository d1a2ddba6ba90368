"""What people read of a step: the right fields, and tokens whose texts make up the response."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dapo_jax.config import DapoSection
from dapo_jax.data.prompts import byte_tokenizer, decode
from dapo_jax.training.samples import sample_rows, scored_texts
from dapo_jax.training.setup import Policy
from dapo_jax.types import Group, Message, Problem, Prompt, Response

BYTES = Policy(None, byte_tokenizer(), (1,))  # byte b is token b + 2, the end is token 1


def byte_tokens(text: bytes, end: bool = True) -> list[int]:
    return [b + 2 for b in text] + [1] * end


def scored(policy, tokens, **ends):
    """The pairs, and the text they should make up. Log-probs are -0.5, -1, -1.5 ..."""
    response = Response(
        np.array(tokens, np.int32), -0.5 * np.arange(1, len(tokens) + 1, dtype=np.float32), False
    )
    text = decode(policy.tokenizer, tokens, policy.stop)
    return scored_texts(policy, response, text, **ends), text


def metaspace_policy() -> Policy:
    """A tokenizer in the manner of Llama 2: spaces as ▁, the first one not shown, bytes for rare
    characters.
    """
    vocab = {"<s>": 0, "</s>": 1, "▁": 2, "▁two": 3, "▁and": 4, "three": 5} | {
        f"<0x{b:02X}>": 6 + b for b in range(256)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    return Policy(None, wrapped, (1,))


def test_each_token_has_its_text_and_its_logprob():
    pairs, text = scored(BYTES, byte_tokens(b"1+1=2"))
    assert text == "1+1=2"
    assert pairs == [("1", -0.5), ("+", -1.0), ("1", -1.5), ("=", -2.0), ("2", -2.5), ("", -3.0)]


def test_the_last_byte_of_a_character_shows_it():
    pairs, text = scored(BYTES, byte_tokens("aπ€".encode(), end=False))
    assert text == "aπ€"
    assert [piece for piece, _ in pairs] == ["a", "", "π", "", "", "€"]


def test_half_a_character_at_the_end_belongs_to_the_last_token():
    assert scored(BYTES, byte_tokens("a€".encode()[:-1], end=False)) == (
        [("a", -0.5), ("", -1.0), ("\ufffd", -1.5)],
        "a\ufffd",
    )


def test_a_space_between_words_belongs_to_a_token():
    pairs, text = scored(metaspace_policy(), [3, 4, 5, 4, 0, 3, 6 + 0xCF, 6 + 0x80, 1])
    assert text == "two andthree and twoπ"
    assert [piece for piece, _ in pairs] == [
        "two",
        " and",
        "three",
        " and",
        "",
        " two",
        "",
        "π",
        "",
    ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("policy", [BYTES, metaspace_policy()], ids=["bytes", "metaspace"])
def test_texts_of_any_tokens_make_up_the_response(policy, seed):
    """Half characters, stray bytes, spaces and control tokens at every place, whole or with only
    the ends token by token.
    """
    tokens = np.random.default_rng(seed).integers(0, 258, 40).tolist()
    for ends in (1024, 20, 7):
        pairs, text = scored(policy, tokens, ends=ends)
        assert "".join(piece for piece, _ in pairs) == text
        assert sum(logprob is None for _, logprob in pairs) <= 1
        logprobs = [logprob for _, logprob in pairs if logprob is not None]
        assert logprobs == sorted(logprobs, reverse=True) and set(logprobs) <= {
            -0.5 * i for i in range(1, 41)
        }


def test_only_the_ends_of_a_long_response_come_token_by_token():
    pairs, _ = scored(BYTES, byte_tokens(b"abcdefghij"), ends=3)
    assert pairs == [
        ("a", -0.5),
        ("b", -1.0),
        ("c", -1.5),
        ("defgh", None),
        ("i", -4.5),
        ("j", -5.0),
        ("", -5.5),
    ]


def group(draw, correct, prompt="1+1="):
    tokens = np.array(byte_tokens(b"2"), np.int32)
    response = Response(tokens, np.array([-0.25, -0.125], np.float32), True)
    reward = np.where(correct, 1, -1).astype(np.float32)
    return Group(
        draw=draw,
        prompt=Prompt(Problem(f"p{draw}", prompt, "2"), np.zeros(3, np.int32)),
        responses=(response,) * len(correct),
        correct=np.array(correct, bool),
        reward=reward - np.float32(0.5),
        penalty=np.full(len(correct), -0.5, np.float32),
        old_logprobs=(response.behavior_logprobs,) * len(correct),
    )


def test_a_row_says_what_became_of_the_group():
    groups = [
        group(4, [1, 0, 0, 0]),
        group(5, [0, 0, 0, 0], (Message("user", "?"),)),
        group(6, [1, 1, 1, 1]),
        group(7, [1, 0, 0, 0]),
    ]
    kept, wrong, right = sample_rows(groups, 3, DapoSection(), BYTES)
    assert kept == {
        "draw": 4,
        "id": "p4",
        "prompt": "1+1=",
        "answer": "2",
        "response": "2",
        "correct": True,
        "group": "kept",
        "group_correct": 1,
        "group_size": 4,
        "reward": 0.5,
        "penalty": -0.5,
        "advantage": pytest.approx(1.5, abs=1e-5),  # rewards 0.5, -1.5, -1.5, -1.5: mean -1, std 1
        "length": 2,
        "truncated": True,
        "tokens": [("2", -0.25), ("", -0.125)],
        "fed": "<|pad|><|pad|><|pad|>",
        "siblings": [
            {"response": "2", "correct": False, "reward": -1.5, "length": 2, "truncated": True}
        ]
        * 3,
    }
    # Then the std is of all rewards that the step trains on, which are not known yet.
    [other] = sample_rows(groups, 1, DapoSection(advantage_scale="batch"), BYTES)
    assert other == {key: value for key, value in kept.items() if key != "advantage"}
    assert (wrong["group"], wrong["group_correct"], wrong["prompt"]) == (
        "all_wrong",
        0,
        [{"role": "user", "content": "?"}],
    )
    assert (right["group"], right["group_correct"]) == ("all_correct", 4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("policy", [BYTES, metaspace_policy()], ids=["bytes", "metaspace"])
def test_every_log_prob_belongs_to_its_own_token(policy, seed):
    """Also where only the ends of a response come token by token, and texts do not: token i has
    log-prob -i / 2.
    """
    tokens = np.random.default_rng(seed).integers(0, 258, 40).tolist()
    for ends in (1024, 20, 7, 1):
        pairs, _ = scored(policy, tokens, ends=ends)
        of_tokens = [logprob for _, logprob in pairs if logprob is not None]
        assert len(of_tokens) == 40 or len(pairs) == len(of_tokens) + 1
        head = next((i for i, (_, logprob) in enumerate(pairs) if logprob is None), 40)
        assert of_tokens[:head] == [-0.5 * i for i in range(1, head + 1)]
        assert of_tokens[head:] == [-0.5 * i for i in range(41 - len(of_tokens[head:]), 41)]
