"""Bad inputs through the real command line: an exit status, one line that says what to do, no
traceback, nothing written.

What a reader alone refuses is in `test_config.py`, `test_problems.py`, `test_prompts.py`,
`test_weights.py`, `test_checkpoint.py`.
"""

import ast
import gzip
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import in_process
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from refusals import line_of, names
from safetensors.numpy import load_file, save_file

import dapo_jax
from dapo_jax import cli, evaluate, export, plan, supervised, train
from dapo_jax.config import ModelConfig, dump_yaml, load_config
from dapo_jax.data import __main__ as data_verb
from dapo_jax.data import chat, problems
from dapo_jax.data.prompts import byte_tokenizer
from dapo_jax.data.tfds_builder import prepare
from dapo_jax.model.families import base_params
from dapo_jax.model.weights import load_pretrained, save_pretrained
from dapo_jax.runtime.checkpoint import Checkpoints
from dapo_jax.types import TrainState

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("reward_module", "eight_devices")]

TESTS = Path(__file__).parent
SIZES = dict(
    family="qwen3",
    vocab_size=258,
    model_dim=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn_dim=32,
    max_position=64,
)
CONFIG = f"""
model:
  architecture: {json.dumps(SIZES)}
  compute_dtype: float32
  remat: none
data: {{template: "{{prompt}}=", max_prompt_len: 16, arithmetic: {{train_problems: 64, heldout_problems: 8, max_steps: 2, max_operand: 9}}}}
eval: {{sets: {{heldout: arithmetic}}, every: 0, samples_per_problem: 1, top_p: 1.0}}
rollout: {{max_response_len: 40, decode_slots: 8}}
reward: {{overlong_buffer_len: 10}}
dapo: {{prompts_per_step: 2, responses_per_prompt: 4, responses_per_update: 8, prompts_per_draw: 4}}
train: {{steps: 1, rows_per_microbatch: 8}}
"""
NO_MESH = "mesh.fsdp=3"  # refused after data and model, before anything is written: what comes before it was accepted
ACCEPTED = "mesh: data 1 x fsdp 3 x tensor 1 does not cover 8 devices"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def refused(tmp_path, capfd):
    """Runs a verb that must refuse, and name what is expected; returns stderr and stdout."""

    def refused(expected, verb, *args, unchanged=True):
        before = tree(tmp_path)
        with pytest.raises(SystemExit) as done:
            cli.run(verb.main, [str(a) for a in args])
        assert done.value.code == 2
        said, out = line_of(capfd)
        assert names(said, f"...{expected}"), said
        assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in said)
        if unchanged:
            assert tree(tmp_path) == before
        return said, out

    return refused


def tree(folder):
    """Everything below a folder, with its content."""
    return {
        p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")
    }


def train_args(config, run_dir, *overrides):
    return ("--config", config, "--run-dir", run_dir, *(x for o in overrides for x in ("--set", o)))


# ------------------------------------------------------------------------------------------------------------- configs

# What the line names: how it says what is wrong is free.
NO_CONFIGS = {
    "empty": (b"", "c.yaml: ...empty"),
    "only a comment": (b"# nothing\n", "c.yaml: ...empty"),
    "a list": (b"- 1\n", "c.yaml: ...list"),
    "text": (b"hello", "c.yaml: ...str"),
    "not UTF-8": (b"\xff\xfe", "c.yaml: ...UTF-8"),
    "NUL byte": (b"seed: 1\0", "c.yaml: ...YAML"),
    "a film": (b"\0" * 2_000_000, "c.yaml: ...1 MB"),
    "tabs": (b"dapo:\n\tdual_clip: 3\n", "c.yaml:2: "),
    "duplicate key": (b"seed: 1\nseed: 2", "c.yaml:2: ...'seed'"),
    "python tag": (
        b"seed: !!python/object/apply:os.system [ls]",
        "c.yaml:1: ...tag:yaml.org,2002:python/",
    ),
    "alias bomb": (b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "c.yaml:2: ...aliases"),
    "deep nesting": (b"seed: " + b"[" * 20_000, "c.yaml:1: ...nested"),
    "more keys than a config has": (
        b"".join(b"k%d: 1\n" % n for n in range(6_000)),
        "c.yaml:5000: ...10,000",
    ),
}
# What is said of other keys is in `test_config.py`.
BAD_CONFIGS = {
    "unknown key": ("dapo: {clip_eps: 1}", "c.yaml: dapo.clip_eps: ...'clip_eps_"),
    "key with controls": ('"a\\n\\e[31m": 1', r"c.yaml: 'a\n\x1b[31m': "),
    "nan": ("optim: {learning_rate: .nan}", "c.yaml: optim.learning_rate: "),
    "inf": ("rollout: {temperature: .inf}", "c.yaml: rollout.temperature: "),
    "negative size": ("rollout: {decode_slots: -8}", "c.yaml: rollout.decode_slots: ...-8"),
    "zero size": ("train: {rows_per_microbatch: 0}", "c.yaml: train.rows_per_microbatch: ...0"),
    "huge size": ("train: {row_len: 99999999999999999999}", "c.yaml: train.row_len: ...9999"),
    "G = 1": ("dapo: {responses_per_prompt: 1}", "c.yaml: dapo.responses_per_prompt: ...1"),
    "update splits groups": (
        "dapo: {responses_per_update: 100}",
        "c.yaml: dapo.responses_per_update: 100 ...responses_per_prompt 16",
    ),
    "heads": (
        "model: {architecture: {heads: 3, kv_heads: 2}}",
        "c.yaml: model.architecture.kv_heads: 2 ...heads 3",
    ),
    "epsilon": ("dapo: {clip_eps_low: 1}", "c.yaml: dapo.clip_eps_low: ...1"),
    "octal": ("seed: 010", "c.yaml: seed: ...'010'"),
    "base 60": ("seed: 1:30", "c.yaml: seed: ...'1:30'"),
    "NUL": ('data: {train: "x\\0.jsonl"}', "c.yaml: data.train: "),
    "NUL in a set": ('eval: {sets: {a: "x\\0.jsonl"}}', "c.yaml: eval.sets.a: "),
    "NUL in a list": (
        'reward: {allowed_modules: ["\\0"]}',
        "c.yaml: reward.allowed_modules.0: ",
    ),
    "lone surrogate": ('data: {train: "\\ud800.jsonl"}', "c.yaml: data.train: "),
    "set named ..": ("eval: {sets: {..: a.jsonl}}", "c.yaml: eval.sets: "),
    "function not allowed": (
        "reward: {verifier: custom, function: 'os:system'}",
        "c.yaml: reward.function: ...'os' ...reward.allowed_modules",
    ),
    "beyond the context": (
        "rollout: {max_response_len: 40000}",
        "rollout.max_response_len: ...40000 ...40960",
    ),
    "save interval 0": ("train: {save_every: 0}", "c.yaml: train.save_every: ...0"),
}


@pytest.mark.parametrize("case", NO_CONFIGS)
def test_a_file_that_is_no_config(tmp_path, refused, case):
    content, expected = NO_CONFIGS[case]
    (tmp_path / "c.yaml").write_bytes(content)
    refused(expected, train, *train_args(tmp_path / "c.yaml", tmp_path / "run"))


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(tmp_path, refused, case):
    text, expected = BAD_CONFIGS[case]
    needed = {"model": "{architecture: {}}", "eval": "{every: 0}"}
    (tmp_path / "c.yaml").write_text(
        "\n".join(
            [text, *(f"{key}: {value}" for key, value in needed.items() if f"{key}:" not in text)]
        )
    )
    refused(expected, train, *train_args(tmp_path / "c.yaml", tmp_path / "run"))


@pytest.mark.parametrize(
    "verb, others",
    [(train, ("--run-dir", "run")), (evaluate, ("--run-dir", "run")), (supervised, ("--out", "o"))],
)
def test_every_verb_refuses_a_missing_config_and_a_folder_for_one(
    tmp_path, monkeypatch, refused, verb, others
):
    monkeypatch.chdir(tmp_path)
    refused("missing.yaml: ...No such file", verb, "--config", "missing.yaml", *others)
    refused(f"{tmp_path}: ...Is a directory", verb, "--config", tmp_path, *others)


def test_verbs_without_work_say_so(config, refused, tmp_path):
    refused("supervised.updates: ...0", supervised, "--config", config, "--out", tmp_path / "out")
    config.write_text(CONFIG.replace("{heldout: arithmetic}", "{}"))
    refused("c.yaml: eval.sets: ", evaluate, "--config", config, "--run-dir", tmp_path)


@pytest.mark.parametrize("slots", [4, 12])
def test_evaluate_refuses_slots_that_do_not_divide_over_devices(
    config, sound_model, refused, slots
):
    """Fewer than the 8 devices, or more. Rows of training do not matter to it."""
    sizes = ("--set", f"rollout.decode_slots={slots}", "--set", "train.rows_per_microbatch=4")
    expected = f"rollout.decode_slots: {slots} ...8 "
    refused(expected, evaluate, "--config", config, "--model", sound_model, *sizes)


def test_supervised_refuses_rows_that_do_not_divide_over_devices(config, refused, tmp_path):
    sizes = ("supervised.updates=1", "train.rows_per_microbatch=4", "rollout.decode_slots=4")
    sets = (x for s in sizes for x in ("--set", s))
    where = ("--config", config, "--out", tmp_path / "out")
    refused("train.rows_per_microbatch: 4 ...8 ", supervised, *where, *sets)


def test_a_path_may_lead_upwards(config, refused, tmp_path, monkeypatch):
    """Paths of a config are the user's own, wherever they lead.

    Those in model folders are not (see the index below).
    """
    write_rows(tmp_path / "rows.jsonl", GOOD)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    arguments = train_args("../c.yaml", "../run", "data.train=../rows.jsonl", NO_MESH)
    assert "../rows.jsonl: 9 problems from 9 rows" in refused(ACCEPTED, train, *arguments)[1]


# ---------------------------------------------------------------------------------------------------------------- data

GOOD = [{"prompt": f"{n}+1", "answer": n + 1} for n in range(9)]


def write_rows(path, rows):
    path.write_bytes(
        b"".join(
            (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
        )
    )
    return path


def corrupt_gzip(folder):
    content = gzip.compress(
        b"".join(json.dumps(row).encode() + b"\n" for row in GOOD * 50), mtime=0
    )
    (folder / "d.jsonl.gz").write_bytes(content[: len(content) // 2])
    return "d.jsonl.gz"


def corrupt_parquet(folder):
    pq.write_table(pa.Table.from_pylist(GOOD * 50), folder / "d.parquet")
    content = (folder / "d.parquet").read_bytes()
    (folder / "d.parquet").write_bytes(content[: len(content) // 2])
    return "d.parquet"


def corrupt_records(folder):
    write_rows(folder / "rows.jsonl", GOOD)
    prepared = prepare(str(folder / "rows.jsonl"), str(folder / "d"))
    [records] = prepared.glob("*.array_record*")
    records.write_bytes(records.read_bytes()[:-200])
    return str(prepared.relative_to(folder))


def rows(*rows):
    def make(folder):
        write_rows(folder / "d.jsonl", rows)
        return "d.jsonl"

    return make


BAD_DATA = {
    "empty": (rows(), "d.jsonl: ...0 rows...`prompt` ...`answer`"),
    "no good row": (
        rows({"text": "a"}, b"{", b"\xff"),
        "d.jsonl: ...(row 1: columns text), 1 ...JSON (row 2), 1 ...UTF-8 (row 3)",
    ),
    "conflicts alone": (
        rows({"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 2}),
        "d.jsonl: ...1 conflicting",
    ),
    "too long": (
        rows({"prompt": "x" * 17, "answer": 1}),
        "1 longer than 16 tokens...data.max_prompt_len",
    ),
    "control tokens": (rows({"prompt": "<|end|>", "answer": 1}), "1 control tokens (<|end|>)"),
    "corrupt gzip": (corrupt_gzip, "d.jsonl.gz: ...gzip"),
    "corrupt parquet": (corrupt_parquet, "d.parquet: ...Parquet"),
    "corrupt records": (corrupt_records, "1.0.0: ...readable"),
    "missing": (lambda folder: "missing.jsonl", "missing.jsonl: ...no such file"),
    "a plain folder": (lambda folder: ".", "dataset_info.json"),
    "unknown kind": (lambda folder: "c.yaml", "c.yaml: ...kind...jsonl"),
    "a URL": (lambda folder: "https://host/a.jsonl", "https://host/a.jsonl: ...no such file"),
}


@pytest.mark.parametrize("key", ["data.train", "eval.sets.heldout"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(config, tmp_path, monkeypatch, refused, case, key):
    make, expected = BAD_DATA[case]
    monkeypatch.chdir(tmp_path)
    refused(expected, train, *train_args(config, "run", f"{key}={make(tmp_path)}"))


def test_bad_rows_are_counted_and_the_run_continues(config, tmp_path, refused):
    """Each kind of row that is left out is named with its count and its first row, and good rows
    around it are used.
    """
    bad = [
        b"\xef\xbb\xbf" + json.dumps(GOOD[0]).encode(),  # a byte-order mark is no fault
        {"prompt": "a"},
        {"prompt": "b", "answer": None},
        {"answer": 1},
        b'{"prompt": NaN, "answer": 1}',
        b'{"prompt": "c", "answer": NaN}',
        b'{"prompt": "d", "answer": ' + b"7" * 5000 + b"}",
        b'{"prompt": "\\ud800", "answer": 1}',
        {"prompt": "x" * 1_000_000, "answer": 1},
        {"prompt": "x" * 17, "answer": 1},
        GOOD[1],
        GOOD[1],
        {"prompt": "e", "answer": 1},
        {"prompt": "e", "answer": 2},
        {"prompt": "f<|end|>", "answer": 1},
        *GOOD[2:],
        json.dumps({"prompt": "half a li", "answer": 1})[:-4].encode(),
    ]
    path = write_rows(tmp_path / "d.jsonl", bad)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    arguments = train_args(config, tmp_path / "run", f"data.train={path}", NO_MESH)
    _, out = refused(ACCEPTED, train, *arguments)
    assert "d.jsonl: 12 problems from 23 rows (2 duplicates, 1 conflicting prompts dropped, " in out
    assert (
        "3 skipped: no answer (row 2: columns prompt), 2 skipped: no prompt (row 4: columns answer), 1 skipped: answer over"
        in out
    )
    assert "1 skipped: prompt is not valid Unicode (row 8), 1 skipped: not JSON (row 23))" in out
    assert "9 prompts, 1 skipped: control tokens (<|end|>), 2 skipped: longer than 16 tokens" in out


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_problems_than_a_step_needs(config, tmp_path, refused, count):
    path = write_rows(tmp_path / "d.jsonl", GOOD[:count])
    sets = (f"data.train={path}", "dapo.prompts_per_step=4")
    expected = f"data.train: {count} ...dapo.prompts_per_step ...4"
    refused(expected, train, *train_args(config, tmp_path / "run", *sets))


def test_problems_that_are_evaluated_on_are_not_trained_on(config, tmp_path, refused):
    paths = [
        write_rows(tmp_path / name, rows)
        for name, rows in (("d.jsonl", GOOD), ("e.jsonl", GOOD[2:4]), ("all.jsonl", GOOD))
    ]
    held_out = (f"data.train={paths[0]}", f"eval.sets.heldout={paths[1]}")
    _, out = refused(ACCEPTED, train, *train_args(config, tmp_path / "run", *held_out, NO_MESH))
    assert "problems: 2 of the prompts are in eval.sets too, and left out of training" in out
    more = train_args(config, tmp_path / "run", *held_out, f"eval.sets.more={paths[2]}")
    refused("data.train: 0 ...9 ...eval.sets...dapo.prompts_per_step ...2", train, *more)


def test_problems_that_are_evaluated_on_are_not_warmed_up_on(config, tmp_path, refused):
    """Of the problems that have a solution, some or all are held out. Nothing is written."""
    rows = [
        row | {"solution": f"Answer: {row['answer']}"} if n < 3 else row
        for n, row in enumerate(GOOD)
    ]
    paths = [
        write_rows(tmp_path / name, rows)
        for name, rows in (("d.jsonl", rows), ("e.jsonl", GOOD[:3]), ("all.jsonl", GOOD))
    ]
    held_out = ("supervised.updates=1", f"data.train={paths[0]}", f"eval.sets.heldout={paths[1]}")

    args = (
        *("--config", config, "--out", tmp_path / "out"),
        *(x for o in held_out for x in ("--set", o)),
    )
    _, out = refused("data.train: ...`solution`", supervised, *args)
    assert "problems: 3 of the prompts are in eval.sets too, and left out of training" in out
    more = ("--set", f"eval.sets.more={paths[2]}")
    refused("data.train: 0 ...9 ...eval.sets...warm-up ...1", supervised, *args, *more)


def test_warm_up_without_solutions(config, tmp_path, refused):
    path = write_rows(tmp_path / "d.jsonl", GOOD)
    sets = (f"data.train={path}", "supervised.updates=1")
    refused("data.train: ...`solution`", train, *train_args(config, tmp_path / "run", *sets))


def test_a_file_that_changes_while_it_is_read(config, tmp_path, monkeypatch, refused):
    path, parse = write_rows(tmp_path / "d.jsonl", GOOD), problems.problem_from_row

    def parse_while_another_program_writes(*args):
        with path.open("ab") as stream:
            stream.write(b"\n")
        return parse(*args)

    monkeypatch.setattr(problems, "problem_from_row", parse_while_another_program_writes)
    args = train_args(config, tmp_path / "run", f"data.train={path}")
    refused(f"{path}: changed", train, *args, unchanged=False)
    assert not (tmp_path / "run").exists()


HOSTILE_FEATURES = {
    "class": {"pythonClassName": "PACKAGE.evil.X", "text": {}},
    "old spelling": {"type": "PACKAGE.evil.X", "content": {}},
    "in a string": {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "jsonFeature": {"json": json.dumps({"x": {"type": "PACKAGE.evil.X", "content": {}}})},
    },
}


@pytest.mark.parametrize("case", HOSTILE_FEATURES)
def test_a_data_set_that_names_code_is_refused_and_its_code_not_run(
    config, tmp_path, monkeypatch, refused, case
):
    """tensorflow-datasets imports the modules that a features.json names; below the working folder,
    they may be the data set's own.
    """
    write_rows(tmp_path / "rows.jsonl", GOOD)
    folder = prepare(str(tmp_path / "rows.jsonl"), str(tmp_path / "hostile"))
    (tmp_path / "hostile" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "features.json").write_text(
        json.dumps(HOSTILE_FEATURES[case]).replace("PACKAGE", "hostile")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` does
    expected = "features.json: ...'hostile.evil.X'"
    refused(expected, train, *train_args(config, "run", f"data.train={folder}"))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------- model folders


@pytest.fixture(scope="module")
def sound_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    model = ModelConfig(**SIZES)
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.ones(leaf.shape, np.float32)
            if path[-1].key == "scale"
            else rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        ),
        base_params(model),
    )
    save_pretrained(folder, model, params, tokenizer=byte_tokenizer())
    return folder


@pytest.fixture
def model(sound_model, tmp_path):
    return Path(shutil.copytree(sound_model, tmp_path / "m"))


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def edit_weights(folder, change):
    file = load_file(folder / "model.safetensors")
    change(file)
    save_file(file, folder / "model.safetensors")


def with_index(change):
    """The weights in two shards, and an index that `change` spoils."""

    def spoil(folder):
        file = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(file)
        weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
        for part in set(weight_map.values()):
            save_file(
                {name: file[name] for name in names if weight_map[name] == part}, folder / part
            )
        change(folder, weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def leading_out(folder, weight_map):
    shutil.copyfile(folder / "part-0.safetensors", folder.parent / "outside.safetensors")
    weight_map["model.norm.weight"] = "../outside.safetensors"


def beyond_the_embedding(char):
    """Gives a character an id that has no row in the embedding."""

    def change(folder):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["vocab"][char] = 300
        path.write_text(json.dumps(content))

    return change


def placeholder(folder):
    """A token beyond the embedding that no text holds, as Gemma 3's small models have for images."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


NORM = "model.norm.weight"
BAD_MODELS = {
    "no folder": (shutil.rmtree, "m: ...no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "m/config.json: ...No such file"),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "m: ...no tokenizer.json",
    ),
    "remote code in the model": (
        lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "evil.M"}),
        "m/config.json: auto_map: ",
    ),
    "remote code in the tokenizer": (
        lambda f: edit_json(
            f / "tokenizer_config.json",
            auto_map={"AutoTokenizer": [None, "evil.T"]},
            tokenizer_class="T",
        ),
        "m/tokenizer_config.json: auto_map: ",
    ),
    "no end token": (
        lambda f: edit_json(f / "tokenizer_config.json", eos_token=...),
        "end-of-sequence token",
    ),
    "prompt beyond": (beyond_the_embedding("="), "token '=' (300) ...258"),
    "end token beyond": (
        lambda f: edit_json(f / "config.json", eos_token_id=[1, 10**12]),
        "m: stop tokens: ...(1000000000000) ...258",
    ),
    "short context": (
        lambda f: edit_json(f / "config.json", max_position_embeddings=50),
        "rollout.max_response_len: ...16 ...40 ...50 ",
    ),
    "template that hangs": (
        template("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"),
        "chat template of ...1 s",
    ),
    "template that holds the interpreter": (
        template("{{ 9 ** (9 ** 9) }}"),
        "chat template of ...1 s",
    ),
    "template that fills memory": (template("{{ 'a' * 10 ** 10 }}"), "chat template of"),
    "template that reaches out": (
        template("{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        "chat template of",
    ),
}
BAD_WEIGHTS = {
    "none": (lambda f: (f / "model.safetensors").unlink(), "m: no model.safetensors"),
    "only pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "m: ...pickled ...(.bin)",
    ),
    "missing shard": (
        with_index(lambda f, w: (f / "part-1.safetensors").unlink()),
        "part-1.safetensors ...missing",
    ),
    "repeated tensor": (
        with_index(
            lambda f, w: shutil.copyfile(f / "part-0.safetensors", f / "part-1.safetensors")
        ),
        "also in part-0",
    ),
    "shard outside": (with_index(leading_out), "'../outside.safetensors' "),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "m/model.safetensors: ...truncated",
    ),
    "misshapen": (
        lambda f: edit_weights(f, lambda t: t.update({NORM: np.ones(7, np.float32)})),
        "model.norm.weight: ...(16,)",
    ),
    "name with controls": (
        lambda f: edit_weights(f, lambda t: t.update({"\x1b[31m\n": t[NORM].copy()})),
        r"\x1b[31m\n",
    ),
}
NAN_WEIGHTS = {
    "nan": (
        lambda f: edit_weights(f, lambda t: t.update({NORM: t[NORM] * np.nan})),
        "model.norm.weight: ...NaN",
    )
}


def of_folder(folder):
    return "model.architecture=null", f"model.folder={folder}"


@pytest.mark.default("no *", "remote*", "*beyond", "short context")
@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_folder(config, model, tmp_path, monkeypatch, refused, case):
    spoil, expected = BAD_MODELS[case]
    spoil(model)
    monkeypatch.setattr(chat, "DEADLINE_S", 1.0)
    refused(expected, train, *train_args(config, tmp_path / "run", *of_folder(model)))


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_training_looks_at_weights_before_it_makes_a_folder(config, model, tmp_path, refused, case):
    spoil, expected = BAD_WEIGHTS[case]
    spoil(model)
    refused(expected, train, *train_args(config, tmp_path / "run", *of_folder(model)))


@pytest.mark.parametrize("case", BAD_WEIGHTS | NAN_WEIGHTS)
def test_bad_weights(config, model, refused, case):
    spoil, expected = (BAD_WEIGHTS | NAN_WEIGHTS)[case]
    spoil(model)
    refused(expected, evaluate, "--config", config, "--model", model)


@pytest.mark.default("pad = EOS", "no pad", "shards", "a*beyond")
@pytest.mark.parametrize(
    "change",
    [
        lambda f: edit_json(f / "tokenizer_config.json", pad_token="<|end|>"),
        lambda f: edit_json(f / "tokenizer_config.json", pad_token=...),
        template("{% for m in messages %}{{ m.content }}{% endfor %}"),
        template("{{ 9 ** 9 }}{{ messages[0]['content'] }}"),
        with_index(lambda f, w: None),
        beyond_the_embedding("!"),
        placeholder,
    ],
    ids=[
        "pad = EOS",
        "no pad",
        "chat template",
        "arithmetic in a template",
        "shards",
        "a token beyond",
        "a placeholder beyond",
    ],
)
def test_folders_that_are_odd_but_sound(config, model, tmp_path, refused, change):
    change(model)
    refused(ACCEPTED, train, *train_args(config, tmp_path / "run", *of_folder(model), NO_MESH))
    load_pretrained(model)


# ------------------------------------------------------------------------------------------------------------- rewards

NASTY = ["none", "nan", "text", "length", "raise", "sleep", "print", "exit", "allocate"]
FUNCTION = "import reward_functions\ndef f(problem, text, length):\n    return reward_functions.judge(problem, '!{}', length)\n"


@pytest.mark.default("raise", "sleep", "allocate")
@pytest.mark.parametrize("how", NASTY)
def test_a_reward_function_that_gives_no_verdicts(
    config, sound_model, tmp_path_factory, monkeypatch, refused, how
):
    folder = tmp_path_factory.mktemp("reward")
    (folder / f"nasty_{how}.py").write_text(FUNCTION.format(how))
    monkeypatch.syspath_prepend(str(folder))
    settings = (
        "reward.verifier=custom",
        f"reward.function=nasty_{how}:f",
        f"reward.allowed_modules=[nasty_{how}]",
        "reward.timeout_s=0.3",
    )
    overrides = (
        x for s in (*settings, "eval.max_problems=3", "reward.memory_mb=512") for x in ("--set", s)
    )
    monkeypatch.setattr(
        evaluate.setup,
        "load_params",
        lambda *_: pytest.fail("a model is loaded before the function is tried"),
    )
    limit = {
        "sleep": "reward.timeout_s (0.3)",
        "print": "reward.timeout_s (0.3)",
        "allocate": "reward.memory_mb (512)",
    }
    fix = limit.get(how, "reward.function: (problem, text, length) -> (correct, score)")
    expected = f"reward.function: nasty_{how}:f ...'Answer: ...{fix}"
    refused(expected, evaluate, "--config", config, "--model", sound_model, *overrides)


def test_a_reward_function_that_cannot_be_loaded_leaves_no_folder(config, tmp_path, refused):
    """So that the same command, corrected, does not meet the folder of another config."""
    settings = ("reward.verifier=custom", "reward.function=gone:f", "reward.allowed_modules=[gone]")
    arguments = train_args(config, tmp_path / "run", *settings)
    refused("reward.function: ...'gone'", train, *arguments)


# --------------------------------------------------------------------------------------------------------- run folders


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (
            ("model.architecture.layers=3",),
            "model.architecture.layers: ...3, ...{run} ...1; ...--config {run}/",
        ),
        (of_folder("{model}"), "model.folder: ...'{model}', ...{run} ...None"),
    ],
)
def test_a_config_that_contradicts_a_run_s_checkpoints(
    config, sound_model, tmp_path, refused, overrides, expected
):
    run, given = tmp_path / "run", {"model": sound_model, "run": tmp_path / "run"}
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(config.read_text())
    changes = (x for change in overrides for x in ("--set", change.format(**given)))
    arguments = ("--config", config, "--run-dir", run, *changes)
    refused(expected.format(**given), evaluate, *arguments)


def test_a_run_folder_that_cannot_be(config, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    for run_dir in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        "/proc/no/such/place",
        tmp_path / "file" / "two\nlines",
    ):
        refused(" ".join(str(run_dir).split()), train, *train_args(config, run_dir))


def test_a_run_folder_of_another_config(config, tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(load_config(config)))
    changed = train_args(config, tmp_path / "run", "optim.learning_rate=1e-5")
    refused("optim.learning_rate: ...1e-05, ...--run-dir", train, *changed)


def other_checkpoint(folder):
    """A checkpoint of another model."""
    state = TrainState({"embed": {"embedding": jax.numpy.ones((3, 2))}}, (), jax.numpy.int32(1))
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, state, {}, {})


def empty_999(folder):
    (folder / "999").mkdir(parents=True)


def file_for_a_step(folder):
    folder.mkdir(parents=True)
    (folder / "12").write_text("not a checkpoint")


def run_folder(config, tmp_path, make):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_yaml(load_config(config)))
    if make:
        make(run_dir / "checkpoints")
    return run_dir


@pytest.mark.parametrize("make", [None, empty_999, file_for_a_step, other_checkpoint])
def test_no_usable_checkpoint_is_status_3(config, tmp_path, capfd, make):
    """A line for each that is not used, then one that says what to do; nothing is exported."""
    run_dir = run_folder(config, tmp_path, make)
    before = tree(tmp_path)
    for verb, args in (
        (evaluate, ("--config", config, "--run-dir", run_dir)),
        (export, ("--run-dir", run_dir, "--out", tmp_path / "out")),
    ):
        with pytest.raises(SystemExit) as done:
            cli.run(verb.main, [str(a) for a in args])
        lines = [line for line in capfd.readouterr().err.splitlines() if line]
        assert done.value.code == 3 and len(lines) == (1 if make is None else 2)
        assert (
            all(line.startswith("dapo_jax: ") and "Traceback" not in line for line in lines)
            and str(run_dir) in lines[-1]
        )
        assert tree(tmp_path) == before


def test_a_run_whose_only_checkpoint_is_of_another_model_is_not_started_over(
    config, tmp_path, capfd
):
    run_dir = run_folder(config, tmp_path, other_checkpoint)
    with pytest.raises(SystemExit) as done:
        cli.run(train.main, [str(a) for a in train_args(config, run_dir)])
    said = capfd.readouterr().err
    assert done.value.code == 3 and "of another model" in said and "--run-dir" in said
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["1"]


def test_export_of_a_folder_without_a_run(tmp_path, refused):
    out = ("--out", tmp_path / "out")
    refused(f"{tmp_path}: ...config.yaml", export, "--run-dir", tmp_path, *out)


@pytest.mark.parametrize("flag", ["--json", "--samples"])
def test_a_place_for_results_is_looked_at_before_the_work(tmp_path, refused, flag):
    """Before anything is loaded: not even the config needs to be there."""
    verbs = [(evaluate, ("--model", "gone")), (plan, ()), (data_verb, ("stats",))]
    for verb, args in verbs if flag == "--json" else verbs[:1]:
        for place in (tmp_path, tmp_path / "gone" / "out"):
            refused(f"{place}: cannot write", verb, *args, "--config", "gone.yaml", flag, place)


def test_a_place_for_a_model_is_looked_at_before_the_work(config, tmp_path, refused):
    """Before anything is loaded: not even data and model need to be there."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    overrides = ("--set", "supervised.updates=1", "--set", "data.train=nowhere.jsonl")
    for place in (tmp_path / "full", config / "below"):
        refused(f"{place}: ", supervised, "--config", config, "--out", place, *overrides)
    full, run_dir = tmp_path / "full", run_folder(config, tmp_path, None)
    refused(f"{full}: ", export, "--run-dir", run_dir, "--out", full)


# ---------------------------------------------------------------------------------------------------------------- code

FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch"}


@pytest.mark.parametrize(
    "file", sorted(Path(dapo_jax.__file__).parent.rglob("*.py")), ids=lambda file: file.stem
)
def test_nothing_is_unpickled_evaluated_or_run_by_a_shell(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            assert not {name.split(".")[0] for name in names} & FORBIDDEN
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
            assert not called.startswith("yaml.") or called in (
                "yaml.parse",
                "yaml.dump",
                "yaml.MarkedYAMLError",
            )
            assert (
                keywords.get("shell", "False") == "False"
                and keywords.get("trust_remote_code", "False") == "False"
            )
            if called in ("np.load", "np.savez"):
                assert keywords.get("allow_pickle") == "False"


# ----------------------------------------------------------------------------------------------------------- processes


@pytest.mark.default("args1-*")
@pytest.mark.parametrize(
    "args, expected",
    [
        (("--config", "missing.yaml"), "missing.yaml: "),
        (("--config", "c.yaml", "--set", "data.train=gone.jsonl"), "gone.jsonl: "),
    ],
)
def test_the_same_from_a_shell(config, tmp_path, args, expected):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-m", "dapo_jax.train", "--run-dir", "run", *args]
    before = tree(tmp_path)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and expected in done.stderr
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------- secrets

CANARY = "canary-5f1b"
SECRETS = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "MY_PASSWORD",
)
SPY = """
import os
def f(problem, text, length):
    with open({place!r}, "wb") as file:
        file.write(repr(dict(os.environ)).encode() + open("/proc/self/environ", "rb").read() + open("/proc/self/cmdline", "rb").read())
    return len(text) % 2 == 0, 1.0
"""


@pytest.mark.slow
def test_secrets_of_the_environment_go_nowhere(model, tmp_path, monkeypatch, capfd, curves):
    """A run that renders a chat template, samples, judges in workers, trains, saves, and draws its
    curves. On two devices.
    """
    monkeypatch.setattr(in_process, "DEVICES", 2)
    template("{% for m in messages %}{{ m.content }}{% endfor %}")(model)
    (tmp_path / "spy_reward.py").write_text(SPY.format(place=str(tmp_path / "spied")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in SECRETS:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    (tmp_path / "tiny.yaml").write_text(runs.CONFIG)
    spy = ("reward.function=spy_reward:f", "reward.allowed_modules=[spy_reward]")
    quick = ("train.steps=1", "eval.every=0", "supervised.updates=0", "dapo.old_logprobs=sampler")
    arguments = (tmp_path / "tiny.yaml", tmp_path / "run", *of_folder(model), *spy, *quick)
    assert runs.run_train(*arguments) == 0
    assert CANARY not in "".join(capfd.readouterr())
    written = tree(tmp_path)
    for part in (
        "metrics.jsonl",
        "config.yaml",
        "checkpoints",
        "samples",
        "tensorboard",
        "curves.png",
    ):
        assert any(part in path.parts for path in written), part
    assert len(written[Path("spied")]) > 100
    assert not [path for path, content in written.items() if CANARY.encode() in (content or b"")]


def test_secrets_of_the_environment_stay_from_a_chat_template(monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    started, popen = [], subprocess.Popen

    def watched(*args, **kwargs):
        started.append((args, kwargs["env"]))
        return popen(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", watched)
    assert [
        *chat.render(
            "{{ messages[0].content }}",
            {},
            [[{"role": "user", "content": "a"}]],
            max_chars=9,
        )
    ] == ["a"]
    assert len(started) == 1 and "PATH" in started[0][1] and CANARY not in repr(started)


PLACES = [
    "data.train",
    "eval.sets.a",
    "model.folder",
    "data.template",
    "reward.function",
    "seed",
    "dapo",
    "data",
]


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize("in_file", [True, False], ids=["file", "override"])
def test_credentials_of_a_url_are_refused_and_not_repeated(config, tmp_path, refused, key, in_file):
    url = f"https://user:{CANARY}@host/a.jsonl {{prompt}}"
    args = train_args(config, tmp_path / "run", f"{key}='{url}'")
    if in_file:
        nested = json.dumps(url)
        for part in reversed(key.split(".")):
            nested = f"{{{part}: {nested}}}"
        (tmp_path / "secret.yaml").write_text(nested[1:-1])
        args = train_args(tmp_path / "secret.yaml", tmp_path / "run")
    assert CANARY not in "".join(refused(f": {key}: ", train, *args))


def test_a_secret_among_the_names_of_variables_is_refused_and_not_repeated(
    config, tmp_path, refused
):
    args = train_args(config, tmp_path / "run", f"reward.environment=[MY_PASSWORD={CANARY}]")
    assert CANARY not in "".join(refused(": reward.environment: ", train, *args))


def test_credentials_in_keys_and_paths_are_not_repeated(config, tmp_path, refused):
    url = f"https://user:{CANARY}@host/c.yaml"
    (tmp_path / "keys.yaml").write_text(f'"{url}": 1\n')
    (tmp_path / "tag.yaml").write_text(f"seed: !<{url}> 1\n")
    for args in (
        train_args(url, tmp_path / "run"),
        train_args(tmp_path / "keys.yaml", tmp_path / "run"),
        train_args(tmp_path / "tag.yaml", tmp_path / "run"),
        train_args(config, tmp_path / "run", f"{url}=1"),
        train_args(config, tmp_path / "run", url),
        train_args(config, url),
        train_args(config, config / url),
    ):
        assert CANARY not in "".join(refused("", train, *args))
