"""Any bytes in a file, an answer or a checkpoint: a valid result or a one-line error, without
delay.

A few seconds in the suite, the same examples every time. A search of any length, with new examples:

    FUZZ=1000 python -m pytest tests/test_fuzz.py --hypothesis-profile=default
"""

import gzip
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import unicodedata
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from dapo_jax.config import (
    ArithmeticConfig,
    Config,
    ConfigError,
    DataSection,
    RewardSection,
    dump_yaml,
    load_config,
)
from dapo_jax.data.problems import load_problems
from dapo_jax.data.prompts import byte_tokenizer, decode, load_tokenizer, make_prompts, stop_tokens
from dapo_jax.model.weights import load_pretrained
from dapo_jax.reward import pool
from dapo_jax.reward.verify import (
    LENIENT_TAIL,
    _marked_answer,
    _readings,
    check_verdict,
    extract_answer,
    normalize_answer,
    strict_verify,
)
from dapo_jax.runtime import checkpoint, sandbox
from dapo_jax.runtime.checkpoint import Checkpoints, restore_params
from dapo_jax.types import InputError, NoCheckpointError, Problem, TrainState, Verdict

pytestmark = pytest.mark.fuzz

HERE = Path(__file__).parent
FUZZ = int(os.environ.get("FUZZ", "1"))


def examples(count):
    """So many examples in the suite, FUZZ times as many in a search."""
    quiet = [
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ]
    return hypothesis.settings(
        max_examples=count * FUZZ, deadline=None, suppress_health_check=quiet
    )


def is_one_line(text):
    """No line ends, no controls of a terminal, nothing that cannot be written as UTF-8."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def within(seconds, call, *args, refusals=(InputError,)):
    """What `call` returns, or None if it refuses in one line.

    Processor time is bounded, so that a busy machine is no failure.
    """
    began = time.process_time()
    try:
        return call(*args)
    except refusals as e:
        assert str(e) and len(str(e)) < 1000 and is_one_line(str(e))
        return None
    finally:
        assert time.process_time() - began < seconds


def mutations(seeds, pieces):
    """Bytes of one of the seeds after some edits: a cut, a changed byte, a piece put in, a stretch
    repeated or removed.
    """
    seeds = list(seeds)

    def edit(content, edits):
        for kind, where, piece, length in edits:
            at = int(where * len(content))
            if kind == "cut":
                content = content[:at]
            elif kind == "flip" and content:
                at = min(at, len(content) - 1)
                content = (
                    content[:at] + bytes([content[at] ^ (1 << length % 8)]) + content[at + 1 :]
                )
            elif kind == "insert":
                content = content[:at] + piece + content[at:]
            elif kind == "replace":
                content = content[:at] + piece + content[at + len(piece) :]
            elif kind == "repeat":
                content = content[:at] + content[at : at + length] * 2 + content[at + length :]
            elif kind == "remove":
                content = content[:at] + content[at + length :]
        return content

    kinds = st.sampled_from(["cut", "flip", "insert", "replace", "repeat", "remove"])
    one = st.tuples(
        kinds, st.floats(0, 1), st.sampled_from(pieces) | st.binary(max_size=4), st.integers(1, 40)
    )
    return st.builds(edit, st.sampled_from(seeds), st.lists(one, min_size=1, max_size=4))


JSON_PIECES = [
    *(
        b'""',
        b"null",
        b"NaN",
        b"-1e999",
        b"1e400",
        b"true",
        b"{}",
        b"[]",
        b"[[[[",
        b'{"a":',
        b"\\ud800",
        b"\\u0000",
        b"\xff",
        b"\x00",
    ),
    *(
        b"9" * 30,
        b"1" * 5000,
        b"\\n",
        b"\n",
        b"\r",
        b"\x1b[31m",
        b"0",
        b"-1",
        b"1.5",
        b'"x"',
        b",",
        b":",
        b'"',
        b"../",
        b"\xef\xbb\xbf",
    ),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


# ------------------------------------------------------------------------------------------------------------- configs

CONFIGS = [path.read_bytes() for path in sorted((HERE.parent / "configs").glob("*.yaml"))]
YAML_PIECES = [
    *(
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object/apply:os.system ",
        b"!!binary ",
        b"!!set ",
        b"!!timestamp ",
        b"? ",
        b"| ",
        b"> ",
        b"---\n",
    ),
    *(
        b"...\n",
        b"%YAML 9.9\n",
        b"\t",
        b"010",
        b"1:30",
        b".nan",
        b"-.inf",
        b"1e999",
        b"9" * 30,
        b"9" * 5000,
        b"{" * 30,
        b"[" * 2000,
    ),
    *(
        b'"\\0"',
        b'"\\ud800"',
        b"https://a:b@c",
        b"\x1b",
        b"\xff",
        b"\x00",
        b"\xef\xbb\xbf",
        b"'",
        b'"',
        b": ",
        b"- ",
        b"# ",
        b"\n  ",
        b"null",
    ),
    *(
        b"dapo: ",
        b"model: ",
        b"eval: {sets: {a: b}}",
        b"seed: ",
        b"~",
        b"true",
        b"0",
        b"-1",
        b"\xc2\x85",
        b"\xe2\x80\xa8",
    ),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A folder for files that every example overwrites."""
    return tmp_path_factory.mktemp("fuzz")


@examples(150)
@given(mutations(CONFIGS, YAML_PIECES))
@example(b'eval: {every: 0, sets: {a: "\\0"}}\nmodel: {folder: x}')
@example(b'model: {folder: "\\ud800"}\neval: {every: 0}')
@example(b'reward: {allowed_modules: ["\\0"]}\nmodel: {folder: x}\neval: {every: 0}')
@example(b"!!timestamp [")
@example(b"!!timestamp a")
@example(b"seed: !!bool maybe")
@example(b"seed: !!int ''")
def test_config_files(path, content):
    (path / "c.yaml").write_bytes(content)
    config = within(3, load_config, path / "c.yaml", refusals=ConfigError)
    if config is not None:
        texts = [
            *(one.path for one in (*config.data.train, *config.eval.sets.values())),
            config.data.template,
            config.model.folder or "",
            *config.reward.allowed_modules,
        ]
        assert all("\0" not in text and text.encode() is not None for text in texts)
        (path / "again.yaml").write_text(dump_yaml(config), encoding="utf-8")
        assert load_config(path / "again.yaml") == config


KEYS = [
    "dapo.dual_clip",
    "model.architecture",
    "eval.sets.a",
    "seed",
    "model.rope",
    "data.template",
    "reward.allowed_modules",
    "optim",
]
KEYS += [
    "data.train",
    "data.train.0",
    "data.train.1.weight",
    "data.train.0.columns.prompt",
    "eval.sets.a.columns",
]
KEYS += ["model.lora", "model.lora.rank"]


@examples(100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KEYS) | st.text(max_size=6),
            st.text(max_size=12) | st.sampled_from(YAML_PIECES).map(repr),
        )
    )
)
def test_overrides(pairs):
    config = within(
        3,
        load_config,
        HERE.parent / "configs" / "tiny_cpu.yaml",
        [f"{k}={v}" for k, v in pairs],
        refusals=ConfigError,
    )
    assert config is None or isinstance(config, Config)


# ---------------------------------------------------------------------------------------------------------------- data

ROWS = [
    {"prompt": "What is 6 x 7?", "answer": 42, "id": "a", "solution": "6 x 7 = 42"},
    {
        "prompt": [{"role": "user", "content": "$6^2$?"}],
        "reward_model": {"ground_truth": "36"},
        "extra_info": {"index": 7},
    },
    {"prompt": "é", "answer": 0.5},
]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def check_problems(found):
    """Every row is accounted for, and what is kept can be tokenised, written and judged."""
    if found is None:
        return
    problems, report = found
    assert report.rows == report.problems + report.duplicates + report.conflicts + sum(
        s.count for s in report.skipped.values()
    )
    assert len(problems) == report.problems > 0 and len({p.id for p in problems}) == len(problems)
    assert is_one_line(report.summary())
    for p in problems:
        turns = (
            [p.prompt]
            if isinstance(p.prompt, str)
            else [text for turn in p.prompt for text in (turn.role, turn.content)]
        )
        "".join([p.id, p.answer, p.solution or "", *turns]).encode()
        assert "".join(turns).strip() and p.answer.strip()


@examples(150)
@given(mutations([LINES, LINES * 3], JSON_PIECES))
def test_json_lines(path, content):
    (path / "a.jsonl").write_bytes(content)
    check_problems(within(2, load_problems, str(path / "a.jsonl"), ArithmeticConfig()))


@examples(60)
@given(
    mutations(
        [gzip.compress(LINES * 20, mtime=0), gzip.compress(LINES, 0, mtime=0)],
        [b"\x1f\x8b\x08", b"\0" * 8, b"\xff" * 8],
    )
)
def test_gzip(path, content):
    (path / "a.jsonl.gz").write_bytes(content)
    check_problems(within(2, load_problems, str(path / "a.jsonl.gz"), ArithmeticConfig()))


def parquet(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


PARQUET = [parquet(pa.Table.from_pylist(ROWS[i::2])) for i in range(2)] + [
    parquet(pa.table({"prompt": ["a"] * 300, "answer": [1] * 300}))
]


@examples(60)
@given(mutations(PARQUET, [b"PAR1", b"\0" * 8, b"\xff" * 8, b"\x15\x00"]))
def test_parquet_bytes(path, content):
    (path / "a.parquet").write_bytes(content)
    check_problems(within(5, load_problems, str(path / "a.parquet"), ArithmeticConfig()))


TYPES = [
    *(
        pa.int8(),
        pa.uint64(),
        pa.float16(),
        pa.float64(),
        pa.bool_(),
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.null(),
    ),
    *(
        pa.date32(),
        pa.date64(),
        pa.timestamp("s"),
        pa.timestamp("ns"),
        pa.timestamp("us", "Mars/Phobos"),
        pa.time64("us"),
        pa.duration("s"),
    ),
    *(
        pa.decimal128(38, 10),
        pa.list_(pa.string()),
        pa.struct([("role", pa.string()), ("content", pa.int32())]),
    ),
    *(
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        pa.map_(pa.string(), pa.string()),
    ),
    pa.dictionary(pa.int32(), pa.string()),
]
BITS = st.binary(min_size=64, max_size=64)


def column(kind, bits, count=4):
    """Values of a type, from any bits where all of its values are of one width."""
    if pa.types.is_primitive(kind) or pa.types.is_decimal(kind):
        return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(bits)])
    if pa.types.is_dictionary(kind):
        return pa.array(["a", None, "b", "a"]).dictionary_encode()
    return pa.array(
        [None, [], None, []]
        if pa.types.is_nested(kind) and not pa.types.is_struct(kind)
        else [None] * count,
        kind,
    )


@examples(80)
@given(st.sampled_from(TYPES), st.sampled_from(TYPES), BITS)
@example(pa.string(), pa.timestamp("s"), b"\x7f" * 64)
@example(pa.string(), pa.duration("s"), b"\x7f" * 64)
@example(pa.string(), pa.timestamp("us", "Mars/Phobos"), b"\0" * 64)
@example(pa.date64(), pa.date64(), b"\x7f" * 64)
def test_parquet_types(path, prompt, answer, bits):
    texts = pa.array([f"p{i}" for i in range(4)])
    columns = {
        "prompt": texts if pa.types.is_string(prompt) else column(prompt, bits),
        "answer": column(answer, bits[::-1]),
    }
    try:
        pq.write_table(pa.table(columns), path / "b.parquet")
    except pa.ArrowException:  # not a type of Parquet's
        return
    check_problems(within(5, load_problems, str(path / "b.parquet"), ArithmeticConfig()))


# ----------------------------------------------------------------------------------------------------------- verifiers

PIECES = [
    *r"Answer: |answer :|\boxed{|\frac|\sqrt|\text{|\mbox{|$|\$|{|}|{,}|,|=|.|1|42|9^|a |an | |^\circ|\(|\[|**|_|\\".split(
        "|"
    ),
    *("\n", "\r", "\ud800", "\0", "\u0660", "\u2028"),
]
ANSWERS = st.lists(
    st.tuples(st.sampled_from(PIECES) | st.text(max_size=3), st.integers(1, 60) | st.just(7000)),
    max_size=8,
).map(lambda parts: "".join(piece * count for piece, count in parts))


@examples(150)
@given(ANSWERS, ANSWERS)
def test_strict_verifier(response, truth):
    assert isinstance(within(0.5, strict_verify, response, truth), bool)
    assert isinstance(within(0.5, extract_answer, "Answer:" + response), str | None)
    assert isinstance(within(0.5, normalize_answer, truth), str)
    labelled = "Answer: " + truth.split("\n")[0]
    if len(labelled) <= 300 and truth.strip() and "Answer" not in truth and "answer" not in truth:
        assert strict_verify(labelled, truth.split("\n")[0]) or not truth.split("\n")[0].strip()


@examples(150)
@given(ANSWERS)
@example("Answer: 1" + " " * 1900 + "x")
def test_what_the_lenient_verifier_hands_to_the_parser(response):
    tail = response[-LENIENT_TAIL:]
    marked = within(0.5, _marked_answer, tail)
    readings = [tail] if marked is None else within(0.5, _readings, marked, tail)
    assert readings and all(len(reading) <= LENIENT_TAIL + 20 for reading in readings)


@examples(100)
@given(
    st.one_of(
        JSON,
        st.tuples(JSON, JSON),
        st.tuples(st.booleans(), st.floats()),
        st.builds(Verdict, JSON, JSON, JSON),
        st.complex_numbers(),
    )
)
def test_what_a_custom_verifier_returns(value):
    verdict = within(0.5, check_verdict, value, refusals=ValueError)
    assert verdict is None or (
        type(verdict.correct) is bool and np.isfinite(np.float32(verdict.score))
    )


class Absent(sandbox.Process):
    """A fake process that sends one line."""

    def __init__(self, line):
        self._patience_s, self._max_line_bytes = 1.0, pool._MAX_LINE_BYTES
        self._channel, self._other = socket.socketpair()
        self._other.sendall(line + b"\n")

    def kill(self):
        self._channel.close()
        self._other.close()


def verdict_of(line):
    worker = pool._Worker(RewardSection(verifier="lenient"), None, threading.Event())
    worker._process = Absent(line)
    verdict = worker.judge(pool.RewardItem(Problem("p", "a", "1"), "1", 1))
    worker.discard()
    return verdict


@examples(100)
@given(
    mutations(
        [b'["result", [true, 1.0, null]]', b'["result", [false, -1, "ValueError: x"]]'], JSON_PIECES
    )
    | st.tuples(st.just("result"), JSON).map(json.dumps).map(str.encode)
    | JSON.map(json.dumps).map(str.encode)
)
@example(b'["result", [true, 1e999, null]]')
@example(b"[" * 100_000)
@example(b"7")
@example(b'["refused", "no"]')
@example(b'["failed", "no"]')
@example(b'["result", [true, 1.0, null]] 7')
@example(b'["result", {"correct": true, "score": 1, "error": null}]')
def test_what_a_worker_says(line):
    """A custom function can reach the worker's socket: the caller gets a verdict whatever comes."""
    verdict = within(0.5, verdict_of, line.replace(b"\n", b""))
    assert type(verdict.correct) is bool and np.isfinite(np.float32(verdict.score))
    if not line.startswith(b'["result"'):
        assert verdict.error is not None and not verdict.correct


# ------------------------------------------------------------------------------------------------------- model folders

GOLDEN = HERE / "goldens" / "qwen3_tied"
FILES = {name: (GOLDEN / name).read_bytes() for name in ("config.json", "model.safetensors")}
HEADER = 8 + int.from_bytes(FILES["model.safetensors"][:8], "little")


def put_files(folder, **contents):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def check_params(found):
    if found is not None:
        config, params = found
        assert all(
            np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params)
        )
        assert params["embed"]["embedding"].shape == (config.vocab_size, config.model_dim)


@examples(100)
@given(mutations([FILES["config.json"]], JSON_PIECES))
@example(FILES["config.json"].replace(b"Qwen3ForCausalLM", b"1" * 5000))
@example(FILES["config.json"].replace(b"{", b'{"rope_scaling": {"a\\n\\u001b": 1},', 1))
def test_model_configs(path, content):
    folder = put_files(
        path / "m", config__json=content, model__safetensors=FILES["model.safetensors"]
    )
    check_params(within(3, load_pretrained, folder))


@examples(150)
@given(
    mutations(
        [FILES["model.safetensors"][:HEADER]],
        [*JSON_PIECES, b'"F32"', b'"BF16"', b'"I64"', b"[0,", b"[32]", b'"__metadata__"'],
    ),
    st.booleans(),
)
def test_safetensors(path, header, right_length):
    """Edits in the header; with `right_length` its length is corrected, so that they are read."""
    if right_length:
        header = (
            (len(header) - 8).to_bytes(8, "little", signed=True) + header[8:]
            if len(header) >= 8
            else header
        )
    content = header + FILES["model.safetensors"][HEADER:]
    folder = put_files(path / "m", config__json=FILES["config.json"], model__safetensors=content)
    check_params(within(3, load_pretrained, folder))


@examples(60)
@given(
    st.dictionaries(
        st.sampled_from(["model.norm.weight", "a\nb"]) | st.text(max_size=5),
        JSON | st.sampled_from(["m.safetensors", "../m.safetensors"]),
    ),
    JSON,
)
def test_weight_indices(path, weight_map, metadata):
    index = json.dumps({"metadata": metadata, "weight_map": weight_map}).encode()
    files = {"config__json": FILES["config.json"], "m__safetensors": FILES["model.safetensors"]}
    folder = put_files(path / "m", **files, model__safetensors__index__json=index)
    check_params(within(3, load_pretrained, folder))


@pytest.fixture(scope="module")
def tokenizer_files(path):
    byte_tokenizer().save_pretrained(path / "t")
    return {
        name: (path / "t" / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json")
    }


@examples(40)
@given(st.data())
def test_tokenizers(path, tokenizer_files, data):
    name = data.draw(st.sampled_from(sorted(tokenizer_files)))
    content = data.draw(
        mutations(
            [tokenizer_files[name]],
            [*JSON_PIECES, b'"type":"Split"', b'"Regex":"(a+)+$"', b'"eos_token":', b'"auto_map":'],
        )
    )
    eos = data.draw(JSON)
    files = {
        **tokenizer_files,
        name: content,
        "config.json": json.dumps({"eos_token_id": eos}).encode(),
    }
    folder = put_files(path / "t", **{n.replace(".", "__"): c for n, c in files.items()})
    tokenizer = within(10, load_tokenizer, str(folder))
    if tokenizer is None:
        return
    stops = within(3, stop_tokens, tokenizer, str(folder), DataSection(chat=False))
    assert stops is None or all(type(i) is int and i >= 0 for i in stops)
    problems = [Problem(text, text, "1") for text in ("a" * 40 + "!", "Find \\frac{1}{2} of é.\n")]
    found = within(
        10, make_prompts, problems, tokenizer, DataSection(template="{prompt}", chat=False)
    )
    for prompt in found[0] if found else ():
        assert prompt.tokens.min() >= 0
        assert isinstance(decode(tokenizer, prompt.tokens, stops or ()), str)


# --------------------------------------------------------------------------------------------------------- checkpoints

STATE = TrainState({"w": jnp.arange(6.0).reshape(2, 3)}, (), jnp.int32(1))


@pytest.fixture(scope="module")
def saved(path):
    """The files of a checkpoint, by path."""
    with Checkpoints(path / "saved", keep=2) as checkpoints:
        checkpoints.save(1, STATE, {"progress": [1, 2]}, {"tokens": np.arange(5)})
    return {
        p.relative_to(path / "saved"): p.read_bytes()
        for p in sorted((path / "saved").rglob("*"))
        if p.is_file()
    }


def put_checkpoint(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


RECORD = Path("1") / "host" / "metadata"


@examples(100)
@given(st.data())
def test_checkpoint_records(path, saved, data):
    """A damaged record is refused; the only one that is accepted is the one that was written."""
    content = data.draw(mutations([saved[RECORD]], JSON_PIECES))
    folder = put_checkpoint(path / "record", {RECORD: content})
    record = within(
        2,
        checkpoint._agreed,
        lambda: checkpoint._read_record(folder / "1"),
        refusals=checkpoint._Unusable,
    )
    if record is not None:
        assert record == {k: v for k, v in json.loads(saved[RECORD]).items() if k != "digest"}


LEAF = ("leaves", "params", "w")
PLACES = [
    ("leaves",),
    ("groups",),
    ("format",),
    LEAF[:2],
    LEAF,
    *((*LEAF, key) for key in ("digest", "kind")),
]


@examples(60)
@given(st.sampled_from(PLACES), JSON)
@example(LEAF, {"kind": "float32[2, 3]"})
def test_forged_checkpoint_records(path, saved, capsys, keys, value):
    """Digests hold against damage, not against forgery: a record may say anything in its place."""
    record = json.loads(saved[RECORD])
    del record["digest"]
    at = record
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    try:
        record["digest"] = hashlib.sha256(
            json.dumps(record, sort_keys=True, allow_nan=False).encode()
        ).hexdigest()
    except ValueError:
        return
    folder = put_checkpoint(path / "c", {**saved, RECORD: json.dumps(record).encode()})
    restored = within(5, restore_params, folder, STATE.params, refusals=NoCheckpointError)
    assert restored is None or np.array_equal(restored[1]["w"], STATE.params["w"])
    capsys.readouterr()


@examples(40)
@given(st.data())
def test_checkpoint_files(path, saved, capsys, data):
    """Bit-equal arrays or a refusal, whichever file is damaged."""
    name = data.draw(st.sampled_from(sorted(saved)))
    files = {**saved, name: data.draw(mutations([saved[name]], [b"\0" * 8, b"\xff" * 8]))}
    folder = put_checkpoint(path / "c", files)
    groups = within(
        5,
        checkpoint._agreed,
        lambda: checkpoint._read_groups(
            folder / "1" / "groups", json.loads(saved[RECORD])["groups"]
        ),
        refusals=checkpoint._Unusable,
    )
    assert groups is None or np.array_equal(groups["tokens"], np.arange(5))
    restored = within(5, restore_params, folder, STATE.params, refusals=NoCheckpointError)
    assert restored is None or np.array_equal(restored[1]["w"], STATE.params["w"])
    capsys.readouterr()
