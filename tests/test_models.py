"""Where a model comes from: a folder, a bucket, the hub.

The hub is a stand-in, or huggingface_hub's own cache without a network.
"""

import dataclasses
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import tiny
from huggingface_hub import errors
from refusals import refusal

from dapo_jax.config import (
    Config,
    ConfigError,
    DataSection,
    EvalSection,
    MeshSection,
    ModelSection,
    RewardSection,
    RolloutSection,
    load_config,
)
from dapo_jax.data import __main__ as data_verb
from dapo_jax.data.prompts import byte_tokenizer
from dapo_jax.model.weights import load_pretrained, save_pretrained
from dapo_jax.plan import load_model
from dapo_jax.runtime import same_run
from dapo_jax.runtime.files import DESCRIPTION_FILES, local_model
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.training.setup import describe, load_params, load_policy, weights_folder, with_commit

ID = "some-lab/Tiny-0.1B"
FILES = ("config.json", "tokenizer.json", "model*.safetensors")
TOKEN = "hf_canarycanarycanary"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as hubs hold them: with code, pickles, pictures and other weights besides."""
    folder = tmp_path_factory.mktemp("hub") / "m"
    model = tiny.model(vocab_size=258)
    save_pretrained(
        folder, model, tiny.params(model), tokenizer=byte_tokenizer(), max_shard_bytes=20_000
    )
    for other in (
        "modeling_tiny.py",
        "pytorch_model.bin",
        "original/consolidated.safetensors",
        "README.md",
    ):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("raise SystemExit")
    return folder


def settings(name):
    return dataclasses.replace(
        Config(),
        model=ModelSection(folder=name, compute_dtype="float32"),
        data=DataSection(max_prompt_len=16),
        eval=EvalSection(every=0),
        rollout=RolloutSection(max_response_len=40),
        reward=RewardSection(overlong_buffer_len=10),
    )


def names(folder):
    return {
        p.relative_to(folder).as_posix()
        for p in Path(folder).rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


# ----------------------------------------------------------------------------------------------------------------- the hub


def snapshot(cache, source, commit, *, ref="main", files=("*",)):
    """The layout of huggingface_hub's cache: blobs by digest, and links to them by commit and name."""
    repo = cache / f"models--{ID.replace('/', '--')}"
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        name = file.relative_to(source).as_posix()
        if any(fnmatch.fnmatch(name, pattern) for pattern in files):
            blob, link = (
                repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest(),
                repo / "snapshots" / commit / name,
            )
            for path in (blob, link, repo / "refs" / ref):
                path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link.unlink(missing_ok=True)
            link.symlink_to(blob)
    (repo / "refs" / ref).write_text(commit)
    return repo / "snapshots" / commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture
def hub(cache, folder, monkeypatch):
    """A hub with one model: refs by name, and what was fetched by commit.

    It looks into the real cache's folders.
    """
    refs = {"main": "a" * 40, "v1": "b" * 40}

    def snapshot_download(repo_id, *, revision=None, allow_patterns, local_files_only):
        assert repo_id == ID
        commit = refs.get(revision or "main", revision)
        return str(snapshot(cache, folder, commit, ref=revision or "main", files=allow_patterns))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return refs


def test_a_folder_that_is_there_is_taken_as_it_is(tmp_path, monkeypatch, folder):
    """Also where it is called like a model of the hub: nobody is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    shutil.copytree(folder, ID)
    for name in (str(folder), ID, f"./{ID}"):
        assert local_model(name, FILES) == (name, name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_model_of_one_s_own_has_its_own_tokenizer(tmp_path, family):
    """What `supervised` writes after a random start.

    The classes of transformers would add tokens.
    """
    model = tiny.model(family, vocab_size=258)
    save_pretrained(tmp_path / "m", model, tiny.params(model), tokenizer=byte_tokenizer())
    policy = load_policy(settings(str(tmp_path / "m")))
    assert policy.tokenizer.get_vocab() == byte_tokenizer().get_vocab() and policy.stop == (1,)
    assert "; responses end with <|end|>; " in describe(policy, make_mesh(MeshSection()))


def test_a_model_in_the_cache_needs_no_network(offline, folder):
    where = snapshot(offline, folder, "c" * 40)
    assert (
        local_model(ID, FILES)
        == (f"{ID}@{'c' * 40}", str(where))
        == local_model(f"{ID}@main", FILES)
        == local_model(f"{ID}@{'c' * 40}", FILES)
    )
    policy = load_policy(settings(ID))
    found = load_params(settings(ID), policy, make_mesh(MeshSection(1, 1, 1), jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, found, load_pretrained(folder)[1])
    assert policy.tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    assert load_model(settings(ID)).model_dim == 16


@pytest.mark.parametrize("name", [ID, f"{ID}@{'d' * 40}", f"{ID}@v9"])
def test_without_network_and_not_in_the_cache(offline, folder, name):
    snapshot(offline, folder, "c" * 40)
    shutil.rmtree(offline / f"models--{ID.replace('/', '--')}/refs")
    with refusal(f"{name}: ...LocalEntryNotFoundError: ...hf download {ID}"):
        local_model(name, FILES)


def test_only_what_is_read_is_fetched_and_weights_when_they_are_needed(hub, cache, folder):
    policy = load_policy(settings(ID))
    assert policy.source == f"{ID}@{'a' * 40}" and f"qwen3 of {policy.source}, " in describe(
        policy, make_mesh(MeshSection())
    )
    assert names(policy.folder) < set(DESCRIPTION_FILES) and {
        "config.json",
        "tokenizer.json",
    } < names(policy.folder)
    assert weights_folder(policy) == policy.folder
    shards = {p.name for p in folder.glob("model-*-of-*.safetensors")}
    assert len(shards) == 2 and names(policy.folder) - set(DESCRIPTION_FILES) == shards | {
        "model.safetensors.index.json"
    }


@pytest.mark.parametrize("verb", ["show", "stats"])
@pytest.mark.parametrize("source", ["--source", "--config"])
def test_rows_of_a_data_set_through_the_tokenizer_of_a_hub_model(
    hub, tmp_path, capsys, verb, source
):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    given = {"--source": [tmp_path / "a.jsonl", "--tokenizer", ID]}
    text = f"model: {{folder: {ID}}}\ndata: {{train: {tmp_path}/a.jsonl}}\n"
    (tmp_path / "c.yaml").write_text(text)
    given["--config"] = [tmp_path / "c.yaml"]
    assert data_verb.main([verb, source, *map(str, given[source])]) == 0
    said = {"show": "1+1?\n\nRemember to put", "stats": "  prompt tokens: min "}
    assert said[verb] in capsys.readouterr().out


def test_a_run_resumes_with_the_commit_it_was_started_with(hub, tmp_path):
    begun = with_commit(settings(ID), tmp_path)
    assert begun.model.folder == f"{ID}@{'a' * 40}"
    same_run.write_config(begun, tmp_path, None)
    assert load_config(tmp_path / "config.yaml").model.folder == f"{ID}@{'a' * 40}"
    hub["main"] = "e" * 40
    assert with_commit(settings(ID)).model.folder == f"{ID}@{'e' * 40}"
    assert with_commit(settings(ID), tmp_path) == begun
    same_run.check_same_run(with_commit(settings(ID), tmp_path), tmp_path, None)
    for other in ("main", "v1", "e" * 40):
        commit = {"v1": "b"}.get(other, "e") * 40
        with refusal(f"model.folder: ...'{ID}@{commit}', ...'{ID}@{'a' * 40}'", ConfigError):
            same_run.check_same_run(
                with_commit(settings(f"{ID}@{other}"), tmp_path), tmp_path, None
            )


def test_what_is_no_id_of_the_hub_stays_as_it_is(tmp_path, folder):
    config = settings(str(folder))
    same_run.write_config(config, tmp_path, None)
    assert with_commit(config, tmp_path) == config and with_commit(
        settings("no/such/folder"), tmp_path
    ) == settings("no/such/folder")


class Answer:
    """Of an HTTP client, as far as huggingface_hub's errors look at it."""

    headers: dict = {}
    request = None

    def __init__(self, status_code):
        self.status_code = status_code


def http(kind, status):
    return kind(f"Authorization: Bearer {TOKEN}", response=Answer(status))


REFUSALS = {
    "gated": http(errors.GatedRepoError, 403),
    "unknown or private": http(errors.RepositoryNotFoundError, 404),
    "no such revision": http(errors.RevisionNotFoundError, 404),
    "refused": http(errors.HfHubHTTPError, 401),
    "no network": errors.LocalEntryNotFoundError("no\nnetwork"),
    "illegal header": ValueError(f"Illegal header value b'Bearer {TOKEN}'"),
    "token of another form": ValueError("Illegal header value b'Bearer canary other words'"),
    "signed query": OSError("403 for https://cdn.hub/x?Expires=1&Signature=canary~1 (forbidden)"),
    "password": OSError("no answer of http://me:canary/1@proxy:3128"),
    "password that is no port": ValueError("Invalid port: 'canary'"),
    "full disk": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses_is_one_line_with_its_reason_and_no_token(cache, monkeypatch, case):
    def snapshot_download(*args, **options):
        raise REFUSALS[case]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    name = type(REFUSALS[case]).__name__
    with refusal(f"{ID}@v1: ...{name}: ...HF_TOKEN...hf download {ID}") as e:
        local_model(f"{ID}@v1", FILES)
    assert "canary" not in str(e.value)


def test_the_inputs_of_shipped_configs_are_not_looked_for_on_the_hub(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with refusal("real/smollm2-135m: ...`make real`"):
        local_model("real/smollm2-135m", FILES)


def test_the_hub_is_asked_by_a_process_that_has_imported_nothing_of_it(tmp_path):
    """huggingface_hub loads its modules late: `constants` is no attribute before it is imported."""
    code = "from dapo_jax.runtime.files import local_model; local_model('lab/missing', ['*'])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    *_, line = ended.stderr.splitlines()
    assert line.startswith(
        "dapo_jax.types.InputError: lab/missing: no such folder, and no download"
    )


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "./a/b",
        "/no/where",
        "a/b/c",
        "a/b@",
        "a/../b",
        "a/b@../c",
        "s3://bucket/m",
        "https://hub/a/b",
        "a b/c",
        "",
    ],
)
def test_what_is_neither_a_folder_nor_an_id_asks_nobody(cache, monkeypatch, name):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    with refusal(f"{name}: no such folder"):
        local_model(name, FILES)


# ---------------------------------------------------------------------------------------------------------------- a bucket

URL = "gs://bucket/models/tiny"


@pytest.fixture
def uploaded(empty, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for file in folder.rglob("*"):
        if file.is_file():
            empty.put(f"models/tiny/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return empty


@pytest.mark.bucket
def test_a_model_in_a_bucket(uploaded, folder, capfd):
    policy = load_policy(settings(URL))
    assert names(policy.folder) < set(DESCRIPTION_FILES) and policy.source == URL
    found = load_params(settings(URL), policy, make_mesh(MeshSection(1, 1, 1), jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, found, load_pretrained(folder)[1])
    assert not names(policy.folder) & {
        "modeling_tiny.py",
        "pytorch_model.bin",
        "original/consolidated.safetensors",
        "README.md",
    }
    assert capfd.readouterr().err.count(f"from {URL} to {policy.folder}") == 2
    assert (
        load_policy(settings(URL + "/")).folder == policy.folder and not capfd.readouterr().err
    )  # all there


@pytest.mark.bucket
def test_processes_of_a_machine_fetch_once_and_changed_objects_again(uploaded, folder, capfd):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(local_model(URL, FILES).folder))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and capfd.readouterr().err.count("copying") == 1
    uploaded.put("models/tiny/config.json", (folder / "config.json").read_bytes() + b"\n")
    other = local_model(URL, FILES).folder
    assert (
        other != found[0]
        and Path(other, "config.json").read_bytes()
        == Path(found[0], "config.json").read_bytes() + b"\n"
    )


@pytest.mark.bucket
def test_a_bucket_folder_that_is_empty_or_cannot_be_read(uploaded):
    for name in ("gs://bucket/models/none", "gs://bucket/models"):
        with refusal(f"{name}: ...config.json"):
            local_model(name, FILES)
    with refusal("gs://bucket: ...model folder"):
        local_model("gs://bucket", FILES)
    for uploaded.failing, uploaded.fails_at in ((403, ""), (403, "tiny/tokenizer.json")):
        with refusal(f"{URL}: ...copied ...access to the bucket"):
            local_model(URL, FILES)
    uploaded.failing = 0
    assert "tokenizer.json" in names(local_model(URL, FILES).folder)


@pytest.mark.bucket
def test_a_copy_that_cannot_be_written(uploaded, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with refusal(f"{URL}: ...file/dapo_jax/models (XDG_CACHE_HOME) (Not a directory"):
        local_model(URL, FILES)
