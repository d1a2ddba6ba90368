"""Files of every kind hold the same rows; folders and patterns are read shard by shard."""

import gzip
import json
import os
import resource
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo_jax.config import ArithmeticConfig, ColumnsConfig
from dapo_jax.data import files
from dapo_jax.data.problems import Skip, load_problems
from dapo_jax.types import InputError

ROWS = [{"question": f"{n}+1?\u00e9", "key": f"{n + 1}", "note": '"a,\nb"'} for n in range(20)]
COLUMNS = {"answer": "key"}


def load(path, heldout=False, **columns):
    return load_problems(
        str(path), ArithmeticConfig(), columns=ColumnsConfig(**columns), heldout=heldout
    )


def answers(path, **kwargs):
    return [p.answer for p in load(path, **COLUMNS, **kwargs)[0]]


def error_of(path, **columns):
    with pytest.raises(InputError) as caught:
        load(path, **columns)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def write(path, rows=ROWS):
    """Rows as a file of the kind that its extension names."""
    path.parent.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=9)
    elif path.suffix == ".csv":
        lines = [[*rows[0]], *([*row.values()] for row in rows)]
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines]
        path.write_text("\ufeff" + "\r\n".join(quoted), newline="")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_to_disk(folder, rows=ROWS):
    """As `datasets.Dataset.save_to_disk` writes it, a cache of `map` next to it."""
    shards = [write(folder / f"data-0000{n}-of-00002.arrow", rows[10 * n :][:10]) for n in range(2)]
    write(folder / "cache-1234.arrow", [{"question": "cached", "key": "0"}])
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": shard.name} for shard in shards], "_split": None})
    )
    (folder / "dataset_info.json").write_text(
        json.dumps({"features": {"question": {"dtype": "string", "_type": "Value"}}})
    )
    return folder


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrow", "csv", "json"])
def test_every_kind_holds_the_same_rows(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(files, "_BATCH", 7)
    path = write(
        tmp_path / f"a.{ending}",
        [*ROWS, {"question": "no answer", "key": None if ending != "csv" else "", "note": "x"}],
    )
    loaded, report = load(path, **COLUMNS)
    assert loaded == load(write(tmp_path / "b.jsonl"), **COLUMNS)[0] and len(loaded) == 20
    assert dict(report.skipped) == {"no answer (column key)": Skip(1, 21)}
    assert "(row 1: columns question, key, note)" in error_of(path)


def test_a_folder_that_datasets_saved(tmp_path):
    assert answers(save_to_disk(tmp_path / "saved")) == [row["key"] for row in ROWS]
    splits = tmp_path / "splits"
    for name, rows in {"train": ROWS[:12], "test": ROWS[12:]}.items():
        save_to_disk(splits / name if splits.mkdir(exist_ok=True) is None else splits, rows)
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert (len(answers(splits)), len(answers(splits, heldout=True))) == (12, 8)
    for damaged in ("{", "[]", '{"_data_files": []}', '{"_data_files": [5]}'):
        (tmp_path / "saved/state.json").write_text(damaged)
        assert "state.json: _data_files: " in error_of(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text(
        '{"_data_files": [{"filename": "../../etc/gone.arrow"}]}'
    )
    assert "no such file" in error_of(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text('{"_data_files": [{"filename": "a\\u0000.arrow"}]}')
    assert r"state.json: _data_files: 'a\x00.arrow' " in error_of(tmp_path / "saved")


def test_folders_and_patterns_of_shards(tmp_path):
    plain, split = tmp_path / "plain", tmp_path / "split"
    for n in range(2):
        write(plain / f"{n}.jsonl", ROWS[10 * n :][:10])
        write(split / f"train-0000{n}-of-00002.parquet", ROWS[8 * n :][:8])
    write(split / "test-00000-of-00001.parquet", ROWS[16:])
    (split / "dataset_infos.json").write_text("{}")
    assert answers(plain) == answers(plain / "*.jsonl") == [row["key"] for row in ROWS]
    assert (
        len(answers(split)),
        len(answers(split, heldout=True)),
        len(answers(split / "*.parquet")),
    ) == (16, 4, 20)
    loaded, report = load(plain / "[01].jsonl", **COLUMNS)
    assert report.rows == 20 and {p.source for p in loaded} == {str(plain / "[01].jsonl")}

    (plain / "1.jsonl").write_text('{"question": "q"}\n')
    assert load(plain, **COLUMNS)[1].skipped == {
        "no answer (column key)": Skip(1, 11)
    }  # rows are numbered through
    (split / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    assert f"{split}: train-00001-of-00002.parquet: corrupt Parquet (" in error_of(split)
    for name in (
        "test-00000-of-00001.parquet",
        "train-00001-of-00002.parquet",
        "train-00000-of-00002.parquet",
    ):
        os.remove(split / name)
    write(split / "validation.parquet")
    write(split / "test.parquet")
    assert "train among test, validation" in error_of(split)


def test_a_shard_that_changes_while_another_is_read(tmp_path, monkeypatch):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl")
    read = files._json_lines

    def write_then_read(path):
        Path(tmp_path, "a.jsonl").write_text("")
        return read(path)

    monkeypatch.setattr(files, "_json_lines", write_then_read)
    assert "changed while it was read" in error_of(tmp_path, **COLUMNS)


def test_json_that_is_no_array_is_read_by_lines(tmp_path, monkeypatch):
    lines = tmp_path / "a.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert answers(lines) == [row["key"] for row in ROWS]
    for wrapped in ({"data": ROWS}, {"rows": ROWS}):
        lines.write_text(json.dumps(wrapped, indent=2))
        assert answers(lines) == [row["key"] for row in ROWS]
    lines.write_text('{"data": [], "data": 5}')
    assert "not a JSON array (several values of one key)" in error_of(lines)
    lines.write_text(json.dumps({"version": 1, "data": ROWS}, indent=2))
    assert "a JSON object over several lines" in error_of(lines)
    for text in ('[{"question": "q", "key": "1"}', "[" * 100_000):
        lines.write_text(text)
        assert "not a JSON array" in error_of(lines)
    lines.write_bytes(b'["\xff"]')
    assert "not a JSON array ('utf-8' codec can't decode" in error_of(lines)
    monkeypatch.setattr(files, "_MAX_ARRAY_BYTES", 3)
    assert "write it as .jsonl, a row a line" in error_of(lines)


def test_csv_rows_that_are_no_rows(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,answer\n1+1?,2\nshort\nlong,3,,\n\xff,6\n\n,7\n1,000+1?,1001\n")
    loaded, report = load(path)
    assert [(p.prompt, p.answer) for p in loaded] == [("1+1?", "2"), ("long", "3")]
    assert report.skipped == {
        "no answer": Skip(1, 2),
        "prompt is not valid Unicode": Skip(1, 4),
        "no prompt": Skip(1, 5),
        "more cells than columns": Skip(1, 6),
    }
    for quotes in (
        '"1+2?,3\n1+3?,4\n',
        '"1"+2?,3\n',
    ):  # which would hide the rows behind them, or stand in a cell
        path.write_text("question,answer\n1+1?,2\n" + quotes)
        assert ": after row 1: not CSV (" in error_of(path)
    for separator in ";\t":
        path.write_text(f'question{separator}answer\n"1,5+1?{separator}"{separator}2,5\n')
        [found], _ = load(path)
        assert (found.prompt, found.answer) == (f"1,5+1?{separator}", "2,5")
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 200)
    path.write_text("question,answer\n1+1?,2\n" + '"' + "x\n" * 200)
    assert ": after row 1: not CSV (field larger than field limit (200))" in error_of(path)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_decimals_are_numbers(tmp_path, ending):
    rows = [
        {"question": f"q{n}", "answer": Decimal(text)}
        for n, text in enumerate(("1.50", "2.00", "-100.00", "0.00"))
    ]
    loaded, _ = load(write(tmp_path / f"a.{ending}", rows))
    assert [p.answer for p in loaded] == ["1.5", "2", "-100", "0"]


def test_damaged_arrow(tmp_path):
    path = write(tmp_path / "a.arrow")
    content = path.read_bytes()
    for damaged in (b"", b"ARROW1\0\0" * 9, content[: len(content) // 2]):
        path.write_bytes(damaged)
        assert "corrupt Arrow (" in error_of(path, **COLUMNS)


# Hostile sizes


def test_a_table_is_read_in_a_process_with_a_memory_limit(tmp_path, monkeypatch, table_process):
    """A sound one, and one whose few kB hold a prompt of 100 MB."""
    monkeypatch.setattr(files, "_MEMORY_BYTES", 200 << 20)
    sound = write(tmp_path / "a.parquet")
    assert answers(sound) == [str(n + 1) for n in range(20)]
    pq.write_table(
        pa.table({"prompt": ["y" * 100_000_000], "answer": ["1"]}),
        tmp_path / "c.parquet",
        compression="zstd",
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = error_of(tmp_path / "c.parquet")
    assert ": cannot be read (out of memory)" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow"])
def test_a_row_of_a_table_may_be_as_long_as_a_line_of_json(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    rows = [{"question": "a" * n, "key": "1"} for n in (900, 1100, 899)]
    loaded, report = load(write(tmp_path / kind, rows), **COLUMNS)
    assert [len(p.prompt) for p in loaded] == [900, 899] and report.skipped == {
        "longer than 0 MB": Skip(1, 2)
    }


@pytest.mark.slow
def test_a_table_that_repeats_a_long_row_is_refused_before_its_rows_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LEAST_BYTES", 1 << 20)
    texts = pa.DictionaryArray.from_arrays(
        pa.array([0] * 4096, pa.int32()), pa.array(["x" * 10**5])
    )
    table = pa.table({"question": texts, "key": ["1"] * 4096})
    pq.write_table(
        table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    assert ": the rows so far are over 1000 times the file's " in error_of(
        tmp_path / "a.parquet", **COLUMNS
    )


def test_text_without_rows_is_not_read_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LEAST_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(b'{"prompt": "a", "answer": 1}\n' + b"\n" * 1000)
    )
    assert ": the rows so far are over 1000 times the file's " in error_of(tmp_path / "a.jsonl.gz")
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"x" * 10**7))
    assert ": the rows so far are over 1000 times" in error_of(tmp_path / "b.jsonl.gz")


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_only_regular_files_are_read(tmp_path, ending):
    os.mkfifo(path := tmp_path / f"d{ending}")
    assert ": cannot be read (not a regular file)" in error_of(path)
