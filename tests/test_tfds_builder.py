"""Prepared tensorflow-datasets folders: written, read back, damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

import dapo_jax
from dapo_jax.config import ArithmeticConfig
from dapo_jax.data import tfds_builder
from dapo_jax.data.problems import Skip, load_problems, problems_digest
from dapo_jax.data.tfds_builder import prepare
from dapo_jax.types import InputError, Message

pytestmark = pytest.mark.host

ROWS = [
    {"prompt": "1+1\n", "answer": 2, "solution": "1+1=2", "id": "own"},
    {"prompt": "\u00e9 \U0001f600 \0 {", "answer": "x"},
    {
        "prompt": [{"role": "system", "content": ""}, {"role": "user", "content": "hi \u00e9"}],
        "reward_model": {"ground_truth": "-3"},
    },
    {"prompt": "1+1\n", "answer": 2},
    {"prompt": "conflict", "answer": 1},
    {"prompt": "conflict", "answer": 2},
]


def read_problems(folder):
    return load_problems(folder, ArithmeticConfig())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    return prepare(source, str(tmp_path_factory.mktemp("prepared")))


def run_python(code):
    root = Path(dapo_jax.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def error_of(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Round trip


def test_a_prepared_folder_holds_the_same_problems_in_the_same_order(source, prepared):
    from_lines, _ = load_problems(source, ArithmeticConfig())
    from_folder, report = load_problems(str(prepared), ArithmeticConfig())
    assert from_folder == from_lines and len(from_folder) == 3
    assert from_folder[2].prompt == (Message("system", ""), Message("user", "hi \u00e9"))
    assert problems_digest(from_folder) == problems_digest(from_lines)
    assert report.summary() == f"{prepared}: 3 problems from 3 rows"


def test_the_folder_is_a_plain_tensorflow_dataset(prepared):
    builder = tfds.builder_from_directory(prepared)
    assert list(builder.info.splits) == ["train"] and builder.info.splits["train"].num_examples == 3
    records = builder.as_data_source(split="train")
    assert records[2]["answer"] == b"-3" and records[0]["prompt"] == b"1+1\n"
    assert sorted(os.listdir(prepared.parent.parent)) == ["problems"]  # nothing else is left behind


def test_batches_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_builder, "_BATCH", 7)
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded, report = read_problems(
        str(prepare(str(tmp_path / "rows.jsonl"), str(tmp_path / "out")))
    )
    assert [p.prompt for p in loaded] == [f"p{i}" for i in range(40)] and report.rows == 40


def test_neither_tensorflow_nor_jax_is_needed(source, prepared, tmp_path):
    code = (
        "from importlib.machinery import PathFinder\n"
        "find, absent = PathFinder.find_spec, ('tensorflow', 'jax', 'torch', "
        "'importlib_resources')\n"
        "PathFinder.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)\n"
        "from dapo_jax.config import ArithmeticConfig\n"
        "from dapo_jax.data.problems import load_problems\n"
        "from dapo_jax.data.tfds_builder import prepare, records\n"
        f"read = records({str(prepared)!r}, False)\n"
        "assert [len(rows) for _, rows in iter(lambda: read(None), None)] == [3]\n"
        f"assert len(load_problems(str(prepare({source!r}, {str(tmp_path)!r})), "
        f"ArithmeticConfig())[0]) == 3\n"
    )
    run_python(code)


@pytest.mark.slow
def test_data_is_loaded_without_importing_its_readers(source, prepared):
    code = (
        "import sys; from dapo_jax.data.problems import load_problems; from "
        "dapo_jax.config import ArithmeticConfig;"
        f"assert len([load_problems(s, ArithmeticConfig()) for s in ({source!r}, "
        f"{str(prepared)!r})]) == 2;"
        "sys.exit('tensorflow_datasets' in sys.modules or 'pyarrow' in sys.modules)"
    )
    run_python(code)


def test_preparing_twice_is_refused(source, prepared):
    before = sorted(prepared.iterdir())
    assert "already holds" in error_of(prepare, source, str(prepared.parent.parent))
    assert sorted(prepared.iterdir()) == before


def test_preparing_below_a_file_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of(prepare, source, str(tmp_path / "file"))


def test_preparing_an_unusable_source(tmp_path):
    assert "no such file" in error_of(
        prepare, str(tmp_path / "missing.parquet"), str(tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


# Folders that others prepared


def prepare_other(folder, features, splits):
    """A data set of another builder; `splits` maps names to lists of records."""

    class Other(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.1.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {name: iter(list(enumerate(records))) for name, records in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Other(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(
        download_dir=folder / "downloads",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    return str(builder.data_dir)


def test_numeric_answers_and_undecodable_text(tmp_path):
    features = {
        "prompt": tfds.features.Text(),
        "answer": np.int64,
        "note": tfds.features.Sequence(np.float32),
    }
    records = [
        {"prompt": "a", "answer": 5, "note": [0.5]},
        {"prompt": b"\xff", "answer": 6, "note": []},
        {"prompt": "a", "answer": 5, "note": []},
        {"prompt": "b", "answer": -6, "note": []},
    ]
    loaded, report = read_problems(prepare_other(tmp_path, features, {"test": records}))
    assert [(p.prompt, p.answer) for p in loaded] == [("a", "5"), ("b", "-6")]
    assert report.duplicates == 1 and report.skipped == {"prompt is not valid Unicode": Skip(1, 2)}


def test_dapo_schema(tmp_path):
    text = tfds.features.Text()
    features = {
        "prompt": tfds.features.Sequence({"role": text, "content": text}),
        "reward_model": {"ground_truth": text, "style": text},
        "extra_info": {"index": text},
    }
    records = [
        {
            "prompt": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": "go on"},
            ],
            "reward_model": {"ground_truth": str(i), "style": "rule"},
            "extra_info": {"index": f"index{i}"},
        }
        for i in range(3)
    ]
    loaded, _ = read_problems(prepare_other(tmp_path, features, {"train": records}))
    assert [(p.id, p.prompt, p.answer) for p in loaded] == [
        (f"index{i}", (Message("user", f"q{i}"), Message("assistant", "go on")), str(i))
        for i in range(3)
    ]


def test_splits(tmp_path):
    text = tfds.features.Text()
    records = {name: [{"prompt": name, "answer": "1"}] for name in ("train", "test", "other")}
    folder = prepare_other(tmp_path / "three", {"prompt": text, "answer": text}, records)
    assert [
        load_problems(folder, ArithmeticConfig(), heldout=h)[0][0].prompt for h in (False, True)
    ] == ["train", "test"]
    del records["train"]
    folder = prepare_other(tmp_path / "two", {"prompt": text, "answer": text}, records)
    assert "no split train among test, other" in error_of(read_problems, folder)


def test_no_usable_record(tmp_path):
    folder = prepare_other(
        tmp_path, {"image_name": tfds.features.Text()}, {"train": [{"image_name": "a"}]}
    )
    assert "1 skipped: no prompt (row 1: columns image_name)" in error_of(read_problems, folder)


# Damage


def damage(folder, how):
    [records] = folder.glob("*.array_record*")
    info, content = folder / "dataset_info.json", records.read_bytes()
    if how == "no info":
        info.unlink()
    elif how == "broken info":
        info.write_text("{")
    elif how == "info of another kind":
        info.write_text("[]")
    elif how == "no features":
        (folder / "features.json").unlink()
    elif how == "broken features":
        (folder / "features.json").write_text("[]")
    elif how == "no records":
        records.unlink()
    elif how == "empty records":
        records.write_bytes(b"")
    elif how == "half the records":
        records.write_bytes(content[: len(content) // 2])
    elif how == "all but one byte":
        records.write_bytes(content[:-1])
    elif how == "zeros":
        records.write_bytes(bytes(len(content)))
    elif how == "noise":
        records.write_bytes(np.random.default_rng(0).bytes(len(content)))
    elif how == "a bit":
        at = content.index(b"conflict") if b"conflict" in content else 200
        records.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "more records promised":
        info.write_text(info.read_text().replace('"3"', '"4"'))
    elif how == "another format":
        info.write_text(info.read_text().replace("array_record", "tfrecord"))


@pytest.mark.parametrize(
    "how",
    [
        "no info",
        "broken info",
        "info of another kind",
        "no features",
        "broken features",
        "no records",
        "empty records",
        "half the records",
        "all but one byte",
        "zeros",
        "noise",
        "a bit",
        "more records promised",
        "another format",
    ],
)
def test_damaged_folders(prepared, tmp_path, how):
    folder = tmp_path / "damaged"
    shutil.copytree(prepared, folder)
    damage(folder, how)
    reason = "holds no dataset_info.json" if how == "no info" else "not a readable data set"
    assert error_of(read_problems, str(folder)).startswith(f"{folder}: {reason}")


def test_records_that_read_as_empty_are_not_taken_for_rows_without_a_prompt(tmp_path):
    features = {"prompt": tfds.features.Text(), "answer": tfds.features.Text()}
    folder = prepare_other(
        tmp_path, features, {"train": [{"prompt": str(i), "answer": "1"} for i in range(5)]}
    )
    damage(Path(folder), "half the records")
    assert "empty record 1" in error_of(read_problems, folder)


def test_folder_without_a_data_set(tmp_path):
    assert "dataset_info.json" in error_of(read_problems, str(tmp_path))
