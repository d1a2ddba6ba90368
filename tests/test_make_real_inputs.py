"""The pure parts of make_real_inputs.py, on tiny synthetic packages."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import make_real_inputs as real
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from dapo_jax.types import InputError

pytestmark = pytest.mark.scripts

SCRIPT = Path(real.__file__)
HEADS, KV_HEADS, DIM, FFN, LAYERS = 3, 1, 12, 5, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(ByteLevel.alphabet())


def gguf_fields() -> dict:
    """Fields of a tiny llama GGUF whose tokenizer knows bytes, "th", "the", " the" and, as a trap,
    "12".
    """
    tokens = SPECIAL + ALPHABET + ["th", "the", "Ġthe", "12"]
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 64,
        "llama.embedding_length": DIM,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": ["t h", "th e", "Ġ the", "1 2"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}",
    }


def gguf_tensors() -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    head_dim = DIM // HEADS
    shapes = {
        "token_embd.weight": (len(SPECIAL) + len(ALPHABET) + 4, DIM),
        "output_norm.weight": (DIM,),
    }
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{part}.weight": (DIM,) for part in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{part}.weight": (DIM, DIM) for part in ("attn_q", "attn_output")}
        shapes |= {
            f"blk.{i}.{part}.weight": (KV_HEADS * head_dim, DIM) for part in ("attn_k", "attn_v")
        }
        shapes |= {f"blk.{i}.{part}.weight": (FFN, DIM) for part in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (DIM, FFN)
    return [(name, rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()]


def rotate(x: np.ndarray, position: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Rotary embedding of one head: pair j turns by position * 100^(-j / pairs)."""
    out = x.copy()
    for j, (a, b) in enumerate(pairs):
        angle = position * 100.0 ** (-j / len(pairs))
        out[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
        out[b] = x[b] * np.cos(angle) + x[a] * np.sin(angle)
    return out


def test_unpermuted_rows_give_the_attention_scores_of_the_interleaved_ones():
    heads, half, rng = 3, 4, np.random.default_rng(1)
    q_rows, k_rows, x, y = (
        rng.normal(size=(24, 5)),
        rng.normal(size=(24, 5)),
        rng.normal(size=5),
        rng.normal(size=5),
    )
    neighbours = [(2 * j, 2 * j + 1) for j in range(half)]
    halves = [(j, j + half) for j in range(half)]

    def scores(wq, wk, pairs):
        q, k = (wq @ x).reshape(heads, 2 * half), (wk @ y).reshape(heads, 2 * half)
        return np.array([rotate(q[h], 7, pairs) @ rotate(k[h], 3, pairs) for h in range(heads)])

    expected = scores(q_rows, k_rows, neighbours)
    got = scores(real.unpermute_rows(q_rows, heads), real.unpermute_rows(k_rows, heads), halves)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert not np.allclose(scores(q_rows, k_rows, halves), expected)


def test_model_folder_has_hugging_face_names_shapes_and_values(tmp_path):
    tensors = gguf_tensors()
    parameters = real.write_model(tmp_path / "a" / "b", gguf_fields(), tensors)
    weights = load_file(tmp_path / "a" / "b" / "model.safetensors")
    assert parameters == sum(t.size for _, t in tensors) == sum(w.size for w in weights.values())
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}
    source = dict(tensors)
    same = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    for name, origin in same.items():
        np.testing.assert_array_equal(weights[name], source[origin], err_msg=name)
    # Head size 4: rows 0, 1, 2, 3 of a head hold the pairs (0, 1) and (2, 3), which belong in rows
    # (0, 2) and (1, 3).
    order = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
    np.testing.assert_array_equal(
        weights["model.layers.1.self_attn.q_proj.weight"], source["blk.1.attn_q.weight"][order]
    )
    np.testing.assert_array_equal(
        weights["model.layers.1.self_attn.k_proj.weight"], source["blk.1.attn_k.weight"][order[:4]]
    )


def test_an_unknown_tensor_is_not_dropped_in_silence():
    with pytest.raises(KeyError):
        real.hf_weights([("blk.0.attn_sinks.weight", np.zeros((4, 4)))], HEADS, KV_HEADS)


def test_configs_carry_what_the_gguf_says(tmp_path):
    real.write_model(tmp_path, gguf_fields(), gguf_tensors())
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": DIM,
        "head_dim": 4,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    expected |= {
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": FFN,
        "max_position_embeddings": 64,
        "rope_theta": 100000.0,
    }
    expected |= {
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_splits_digits_and_round_trips(tmp_path):
    real.write_model(tmp_path, gguf_fields(), gguf_tensors())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("the the 12").tokens == ["the", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer.encode("<|im_start|>the<|im_end|>").ids[::2] == [1, 2]
    for text in ("  the  12.5\n\tnaïve 東京 😀 don't ", "½ ٣", "a<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_folder_opens_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    real.write_model(tmp_path, gguf_fields(), gguf_tensors())
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.convert_ids_to_tokens(tokenizer("the 12").input_ids) == ["the", "Ġ", "1", "2"]
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        == "<|im_start|>a<|im_end|>"
    )
    assert transformers.AutoConfig.from_pretrained(str(tmp_path)).rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("9 apples", "9"),
        ("13", "13"),
        ("14  seats", "14"),
        (" 36 sq. inches ", "36"),
        ("65.0 dollars", "65"),
        ("9.80 dollars", "9.8"),
        ("0.395 kilometers", "0.395"),
        ("100 people", "100"),
        ("1,059,955 kids", "1059955"),
        ("-3 degrees", "-3"),
        ("0 marbles", "0"),
        ("Mrs. Hilt", None),
        ("6th", None),
        ("5/2", None),
        ("3:4", None),
        ("3:30 p.m.", None),
        ("11; 12", None),
        ("20 years old; 22 years old", None),
        ("1,2 apples", None),
        ("", None),
    ],
)
def test_plain_number(answer, number):
    assert real.plain_number(answer) == number


def asdiv_line(passage: str, question: str, answer: str) -> str:
    return json.dumps({"passage": passage, "question": question, "answer": answer})


def test_problems_are_joined_filtered_and_unique():
    lines = [
        asdiv_line("Ann has 2  pens.", "How many? ", "2 pens"),
        asdiv_line("Ann ran.", "When?", "3:30 p.m."),
        asdiv_line("ann has 2 pens. ", "How many?", "2 pens"),
        asdiv_line("If Bo has 3 cups,", "how many has Bo?", "3 cups"),
    ]
    assert real.asdiv_problems(lines) == [
        {"id": "asdiv-0001", "prompt": "Ann has 2 pens. How many?", "answer": "2"},
        {"id": "asdiv-0004", "prompt": "If Bo has 3 cups, how many has Bo?", "answer": "3"},
    ]


def test_split_is_disjoint_complete_and_blind_to_order():
    rows = [{"id": str(i), "prompt": f"problem {i}", "answer": str(i)} for i in range(100)]
    train, heldout = real.split_problems(rows, 30)
    assert (len(train), len(heldout)) == (70, 30)
    assert sorted(int(row["id"]) for row in train + heldout) == list(range(100))
    assert real.split_problems(rows[::-1], 30) == (train, heldout)
    assert (
        35 < np.mean([int(row["id"]) for row in heldout]) < 65
    )  # neither the first rows nor the last


def test_jsonl_round_trips(tmp_path):
    rows = [{"id": "1", "prompt": "Zoë has 2 €.\u2028How many?", "answer": "2"}]
    real.write_jsonl(tmp_path / "x.jsonl", rows)
    assert [
        json.loads(line)
        for line in (tmp_path / "x.jsonl").read_bytes().decode().strip("\n").split("\n")
    ] == rows


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="gguf-0.19.0.*not found"):
        real.wheel(real.GGUF, tmp_path)
    (tmp_path / "gguf-0.19.0-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(InputError, match="SHA-256"):
        real.wheel(real.GGUF, tmp_path)
    (tmp_path / "tiny_one-1-py3-none-any.whl").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of "abc", FIPS 180-2
    assert real.wheel(real.Package("tiny-one", "1", abc), tmp_path).read_bytes() == b"abc"


def test_files_that_an_interrupted_write_leaves_are_not_taken_for_whole_ones(tmp_path, monkeypatch):
    def cut_short(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "save_file", cut_short)
    with pytest.raises(KeyboardInterrupt):
        real.write_model(tmp_path, gguf_fields(), gguf_tensors())
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    real.write_model(tmp_path, gguf_fields(), gguf_tensors())
    assert load_file(tmp_path / "model.safetensors") and not list(tmp_path.glob("*.part"))


PYTHON = """#!/bin/sh
echo "$DAPO_REAL $*" >> log
case "$*" in
*make_real_inputs*)
    mkdir -p real/smollm2-135m
    test -e network || exit 2
    touch real/asdiv_train.jsonl real/asdiv_heldout.jsonl real/smollm2-135m/model.safetensors
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_real_continues_until_all_of_it_is_there(tmp_path, monkeypatch):
    monkeypatch.delenv("DAPO_REAL", raising=False)
    shutil.copy(SCRIPT.parent.parent / "Makefile", tmp_path)
    for name in ("requirements.txt", "pyproject.toml", "venv/bin/python", "venv/installed"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PYTHON)
    (tmp_path / "venv/bin/python").chmod(0o755)

    def make() -> tuple[bool, list[str]]:
        (tmp_path / "log").unlink(missing_ok=True)
        done = subprocess.run(
            ["make", "real", "VENV=venv"], cwd=tmp_path, capture_output=True, check=False
        )
        return done.returncode == 0, (tmp_path / "log").read_text().splitlines()

    fetch, test = " tests/make_real_inputs.py --out real", "real -m pytest tests/test_real.py"
    assert make() == make() == (False, [fetch])
    (tmp_path / "network").touch()
    assert make() == (True, [fetch, test])
    assert make() == (True, [test])
    (tmp_path / "real/asdiv_heldout.jsonl").unlink()
    assert make() == (True, [fetch, test])


@pytest.mark.parametrize("bad", ["no wheels", "out is a file"])
def test_the_script_reports_bad_input_in_one_line(tmp_path, bad):
    packages, out = tmp_path / "packages", tmp_path / "out"
    packages.mkdir()
    if bad == "out is a file":
        out.write_text("")
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--packages", str(packages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(packages if bad == "no wheels" else out) in done.stderr
