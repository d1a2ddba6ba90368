"""Data sets in a bucket: the same problems, and one line where something is amiss.

The bucket is `fake_gcs.py`.
"""

import gzip
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refusal

from dapo_jax.config import ArithmeticConfig
from dapo_jax.data import __main__ as data
from dapo_jax.data.problems import load_problems, problems_digest
from dapo_jax.data.tfds_builder import prepare

pytestmark = pytest.mark.bucket

ROWS = [
    {"prompt": f"{n}+1\u00e9", "answer": n + 1, "solution": f"Answer: {n + 1}"} for n in range(50)
]


def load(source):
    return load_problems(str(source), ArithmeticConfig())


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same rows as files of each kind and as a prepared folder."""
    folder = tmp_path_factory.mktemp("data")
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "a.jsonl").write_bytes(text)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    prepare(str(folder / "a.jsonl"), str(folder))
    for number in range(2):
        (folder / "shards").mkdir(exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist(ROWS[25 * number :][:25]),
            folder / "shards" / f"train-{number}.parquet",
        )
    return folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "problems/1.0.0", "shards"])
def test_a_bucket_holds_the_same_problems(empty, local, name):
    for file in (local / name).iterdir() if (local / name).is_dir() else [local / name]:
        empty.put(f"deep/{file.relative_to(local).as_posix()}", file.read_bytes())
    there, report = load(f"gs://bucket/deep/{name}")
    here, _ = load(local / name)
    assert there == here and problems_digest(there) == problems_digest(here) and len(there) == 50
    assert report.summary() == f"gs://bucket/deep/{name}: 50 problems from 50 rows"
    assert {p.source for p in there} == {f"gs://bucket/deep/{name}"}


def test_the_verb_reads_from_a_bucket_and_prepares_in_it(
    empty,
    local,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(tmp_path)
    empty.put("a.jsonl", (local / "a.jsonl").read_bytes())
    assert (
        data.main("prepare --source gs://bucket/a.jsonl --out gs://bucket/out --name sums".split())
        == 0
    )
    assert "wrote gs://bucket/out/sums/1.0.0" in capsys.readouterr().out
    assert data.main("stats --source gs://bucket/out/sums/1.0.0 --json out.json".split()) == 0
    assert json.loads((tmp_path / "out.json").read_text())["source"]["problems"] == 50
    with refusal("gs://bucket/out/sums/1.0.0: already "):
        data.main("prepare --source gs://bucket/a.jsonl --out gs://bucket/out --name sums".split())
    assert {p.name for p in tmp_path.iterdir()} == {"out.json"}  # no folder `gs:`


@pytest.mark.parametrize(
    "source, said",
    {
        "gs://bucket/gone.jsonl": "no such file",
        "gs://bucket/gone": "no such file",
        "gs://bucket/texts": "*.parquet, *.jsonl, *.jsonl.gz, *.json, *.csv, *.arrow",
        "gs://bucket": "input (...gs://bucket/name",
        "gs://bucket/*.jsonl": "input (...gs://bucket/name",
        "gs://bucket/half.parquet": "corrupt Parquet",
        "gs://bucket/bad.jsonl": "0 problems from 1 rows ...JSON (row 1)",
    }.items(),
)
def test_what_is_no_data_set_is_one_line(empty, source, said):
    empty.put("half.parquet", b"PAR1")
    empty.put("bad.jsonl", b"{")
    empty.put("texts/a.txt", b"a")
    with refusal(f"{source}: ...{said}"):
        load(source)


def test_a_bucket_that_refuses_is_one_line(empty, tmp_path):
    empty.put("a.jsonl", b"{}")
    empty.failing = 403
    with refusal('gs://bucket/a.jsonl: ...read (Forbidden...pip install "etils[epath-gcs]"'):
        load("gs://bucket/a.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    with refusal("gs://bucket/out/problems/1.0.0: ...written (Forbidden"):
        prepare(str(tmp_path / "a.jsonl"), "gs://bucket/out")


def test_an_object_that_changes_while_it_is_read(empty, monkeypatch):
    empty.put("a.jsonl", b'{"prompt": "a", "answer": 1}\n')
    system = fsspec.filesystem("gs")
    get = system.get

    def get_while_another_program_writes(names, targets):
        get(names, targets)
        empty.put("a.jsonl", b'{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 1}\n')

    monkeypatch.setattr(system, "get", get_while_another_program_writes)
    with refusal("gs://bucket/a.jsonl: changed"):
        load("gs://bucket/a.jsonl")
