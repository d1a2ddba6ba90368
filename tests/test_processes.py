"""A job of two processes with 2 CPU devices each does what one process with 4 does."""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from refusals import names, refusal
from runs import CONFIG, VOLATILE, free_port

import dapo_jax
from dapo_jax import cli
from dapo_jax.config import config_from_dict
from dapo_jax.data.prompts import load_tokenizer
from dapo_jax.model import weights
from dapo_jax.model.weights import save_pretrained
from dapo_jax.runtime import multihost
from dapo_jax.runtime.metrics import read_metrics
from dapo_jax.training import setup
from dapo_jax.types import InputError, Problem, Prompt, RunError

TESTS = Path(__file__).parent
MESH = "mesh: {data: 2, fsdp: 2}\n"


def start(folder: Path, name: str, processes: int, devices: int) -> list[subprocess.Popen]:
    """The worker's processes, each with its own log."""
    (folder / "tiny.yaml").write_text(CONFIG.replace("steps: 4", "steps: 2") + MESH)
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(dapo_jax.__file__).parents[1]), str(TESTS), os.environ.get("PYTHONPATH", "")]
        ),
    }
    arguments = [
        sys.executable,
        str(TESTS / "process_worker.py"),
        str(folder / f"{name}.npz"),
        str(folder / "tiny.yaml"),
        str(folder / name),
    ]
    port, started = free_port(), []
    for i in range(processes):
        joined = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(i),
        }
        log = (folder / f"{name}{i}.log").open("w")
        started.append(
            subprocess.Popen(
                arguments,
                env=env | (joined if processes > 1 else {}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    return started


def finish(folder: Path, name: str, started: list[subprocess.Popen]) -> None:
    try:
        for i, process in enumerate(started):
            assert process.wait(timeout=600) == 0, (folder / f"{name}{i}.log").read_text()[-3000:]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for name, processes, devices in (("one", 1, 4), ("two", 2, 2)):
        finish(folder, name, start(folder, name, processes, devices))
    return folder


@pytest.mark.multiprocess
def test_loss_and_gradient_are_those_of_one_process(runs):
    """Measured: equal bit for bit; with 4 devices a process 1e-7 and 2e-8 relative."""
    one, *two = (np.load(runs / f"{name}.npz") for name in ("one0", "two0", "two1"))
    for part in two:
        assert tiny.gap(part["loss"], one["loss"]) < 1e-6
        assert tiny.gap(part["gradient"], one["gradient"]) < 1e-6
    assert np.linalg.norm(one["gradient"]) > 1e-3


@pytest.mark.multiprocess
def test_each_process_holds_rows_and_judges_answers_of_its_own(runs):
    rows = [set(np.load(runs / f"two{i}.npz")["rows"]) for i in (0, 1)]
    assert rows[0] and rows[1] and not rows[0] & rows[1] and rows[0] | rows[1] == set(range(8))
    assert [int(np.load(runs / f"two{i}.npz")["judged"]) for i in (0, 1)] == [4, 3]


@pytest.mark.multiprocess
def test_each_process_reads_its_own_shards_and_all_refuse_what_one_finds(runs):
    """Half of all but the norms, which both hold; bit for bit what `load_pretrained` reads."""
    goldens = TESTS / "goldens/qwen3_untied"
    leaves = jax.tree.leaves(weights.load_pretrained(goldens)[1])
    whole = sum(leaf.nbytes for leaf in leaves)
    norms = sum(leaf.nbytes for leaf in leaves if leaf.ndim < 3 and 96 not in leaf.shape)
    for i in (0, 1):
        part = np.load(runs / f"two{i}.npz")
        np.testing.assert_array_equal(part["weights"], np.concatenate([*map(np.ravel, leaves)]))
        assert part["read"] == part["own"] == (whole - norms) / 2 + norms
        assert str(part["nan"]).endswith(
            "model.safetensors: model.layers.1.self_attn.q_proj.weight: holds NaN or infinite "
            "values; use another copy of the model"
        )


@pytest.mark.multiprocess
def test_what_differs_between_processes_is_refused_on_each(runs):
    """The first fact that differs, in their order; and a run folder that a process does not find.

    Nothing is left of that folder.
    """
    for i in (0, 1):
        facts, folder = np.load(runs / f"two{i}.npz")["refusals"].tolist()
        assert facts.startswith(
            "weights is 1 on process 1, 0 on process 0; start every process with the same command"
        )
        assert facts.endswith("packages, model and data")
        assert (
            folder.startswith(f"{runs / f'two.{i}'}: process 1 of 2 on ")
            and "cannot see the file that process 0 wrote there" in folder
        )
        assert "one --run-dir that all hosts reach" in folder
    assert not list(runs.glob("two.*"))
    assert np.load(runs / "one0.npz")["refusals"].tolist() == []  # a process alone


@pytest.mark.multiprocess
def test_a_training_run_keeps_the_same_groups_and_learns_the_same(runs):
    """Counts and samples exactly; what devices compute within 1e-6 (the loss, near 0 by its nature,
    of the size of its terms).
    """
    one, two = (
        [
            {k: v for k, v in line.items() if not k.startswith(VOLATILE)}
            for line in read_metrics(runs / name)
        ]
        for name in ("one", "two")
    )
    exact = (
        "step",
        "updates",
        "draws",
        "filter/",
        "rollout/",
        "reward/",
        "optim/lr",
        "pack/",
        "eval/",
    )
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in a.items() if k.startswith(exact)} == {
            k: v for k, v in b.items() if k.startswith(exact)
        }
        assert a.keys() == b.keys()
        for key in ("policy/loss", "optim/grad_norm", "policy/entropy", "policy/token_prob_mean"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-6, abs=1e-7), key
    for file in sorted((runs / "one" / "samples").iterdir()):
        a, b = (
            [
                json.loads(line)
                for line in (runs / name / "samples" / file.name).read_text().splitlines()
            ]
            for name in ("one", "two")
        )
        # Log-probs are stored with 4 decimals: a difference of 1e-7 may move the last one.
        logprobs = [[p for sample in run for _, p in sample["tokens"]] for run in (a, b)]
        for sample in a + b:
            sample["tokens"] = [text for text, _ in sample["tokens"]]
        assert a == b and a
        assert logprobs[0] == pytest.approx(logprobs[1], rel=0, abs=1.01e-4)


@pytest.mark.multiprocess
def test_one_process_writes_the_logs(runs):
    assert "done: 2 steps" in (runs / "two0.log").read_text()
    assert "step" not in (runs / "two1.log").read_text()


NO_ADDRESSES = ("localhost", ":8476", "localhost:x", "localhost:99999", "::1")


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "JAX_NUM_PROCESSES: ...''"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID: ...''"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES: ...'two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: ...2 ...2"),
        (
            {"JAX_NUM_PROCESSES": "9" * 20, "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES: ...'99999999999999999999'",
        ),
        *(
            ({"JAX_COORDINATOR_ADDRESS": a}, f"JAX_COORDINATOR_ADDRESS: ...{a!r}...HOST:PORT")
            for a in NO_ADDRESSES
        ),
    ],
)
def test_an_incomplete_description_of_the_job_is_named(given, said, monkeypatch):
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"} | given).items():
        monkeypatch.setenv(name, value)
    with refusal(said):
        multihost.initialize()


def test_a_port_that_is_in_use_is_named(monkeypatch):
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for name, value in (
            ("COORDINATOR_ADDRESS", address),
            ("NUM_PROCESSES", "1"),
            ("PROCESS_ID", "0"),
        ):
            monkeypatch.setenv(f"JAX_{name}", value)
        # In a process of its own: jax does not forget an attempt to join.
        script = "from dapo_jax import cli; from dapo_jax.runtime import multihost; cli.run(lambda argv: multihost.initialize())"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert names(last, f"dapo_jax: JAX_COORDINATOR_ADDRESS: ...{address} (Address already in use)")


@pytest.mark.parametrize("pod, seconds", [(True, 60), (False, 10)])
def test_hosts_of_a_pod_may_pause_for_a_minute(pod, seconds, monkeypatch):
    """A live migration pauses a VM for longer than the 10 s after which a dead process is noticed
    elsewhere."""
    given = {"COORDINATOR_ADDRESS": "localhost:8476", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
    for name, value in given.items():
        monkeypatch.delenv(f"JAX_{name}", raising=False)
        if not pod:
            monkeypatch.setenv(f"JAX_{name}", value)
    monkeypatch.setattr(multihost, "on_tpu_vm", lambda: pod)
    asked = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: asked.update(kwargs))
    multihost._join()
    assert asked == {"heartbeat_timeout_seconds": seconds}


IN_USE = "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 4711. Not attempting to load libtpu.so"


@pytest.mark.parametrize(
    "devices, said",
    [
        (
            lambda: (_ for _ in ()).throw(RuntimeError(IN_USE)),
            "already in use by process with pid 4711",
        ),
        (jax.devices, "this host has TPU chips, but jax uses cpu: another process has them"),
    ],
)
def test_chips_that_another_process_holds_are_named(devices, said, monkeypatch):
    """jax raises where JAX_PLATFORMS names the TPU, and falls back to the CPU where it does not."""
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setattr(multihost, "on_tpu_vm", lambda: True)
    monkeypatch.setattr(multihost, "_join", lambda: None)
    monkeypatch.setattr(multihost.jax, "devices", devices)
    with refusal(f"...{said}...tpu_scripts/stop", RunError):
        multihost.initialize()


@pytest.mark.multiprocess
def test_a_signal_ends_a_process_that_starts_up(tmp_path):
    """One waits for the others, and prints that: started alone, the mistake of starting a pod's job on
    one host only. One has joined, is a job of its own, and loads something for long.
    """
    script = """
import sys, time
from dapo_jax import cli
from dapo_jax.runtime import multihost

def main(argv):
    multihost._WAIT_S = 0.5
    multihost.initialize()
    print("joined", file=sys.stderr, flush=True)
    time.sleep(60)

cli.run(main, [])
"""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PROCESS_ID": "0",
        "PYTHONPATH": str(Path(dapo_jax.__file__).parents[1]),
    }

    def start(processes):
        more = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(processes),
        }
        return subprocess.Popen(
            [sys.executable, "-c", script], env=env | more, stderr=subprocess.PIPE, text=True
        )

    with start(2) as waiting, start(1) as joined:
        assert "the same command must run on every host" in waiting.stderr.readline()
        assert joined.stderr.readline() == "joined\n"
        for process in (waiting, joined):
            process.terminate()
        try:
            assert [process.wait(timeout=20) for process in (waiting, joined)] == [143, 143]
        finally:
            for process in (waiting, joined):
                process.kill()
        assert joined.stderr.read().endswith(": interrupted by SIGTERM\n")


def two_processes(monkeypatch, first: dict):
    """Makes this process the second of two, the other of which holds `first`: what they gather,
    without the other process.
    """
    text = json.dumps(first, sort_keys=True).encode()

    def gather(mine):
        mine = np.asarray(mine)
        if mine.shape == (32,):
            return np.stack([np.frombuffer(hashlib.sha256(text).digest(), np.uint8), mine])
        if mine.ndim == 0:
            return np.array([len(text), mine])
        return np.stack([np.frombuffer(text.ljust(len(mine), b"\0")[: len(mine)], np.uint8), mine])

    monkeypatch.setattr(multihost.jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost.multihost_utils, "process_allgather", gather)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_are_even_over_many_calls_and_come_back_in_order(count, monkeypatch):
    """Segments of 0 to 7 items, as responses end: each process gets its share of all of them, not
    the first process one of each.
    """
    monkeypatch.setattr(multihost.jax, "process_count", lambda: count)
    before, got = 0, [0] * count
    for total in (3, 0, 1, 7, 1, 1, 2, 5):
        items, own = list(range(before, before + total)), []
        for index in range(count):
            monkeypatch.setattr(multihost.jax, "process_index", lambda index=index: index)
            own.append(list(multihost.share(items, before)))
            got[index] += len(own[-1])
        sent = [json.dumps(mine) for mine in own]
        monkeypatch.setattr(multihost, "gather_texts", lambda text, sent=sent: sent)
        found = [multihost.gather_shares(mine, total, before) for mine in own]
        assert all(rows == items for rows in found)
        before += total
    assert max(got) - min(got) <= 1 and sum(got) == before == 20


FACTS = {
    "seed": 0,
    "jax": "0.12.0",
    "the digest of data.train": "abc",
    "step": 3,
    "reward/mean": 0.25,
}


@pytest.mark.parametrize(
    "key, value",
    [
        ("jax", "0.10.2"),
        ("the digest of data.train", "abd"),
        ("reward/mean", 0.25000001),
        ("more", "x" * 999),
    ],
)
def test_what_differs_between_processes_is_named(key, value, monkeypatch):
    two_processes(monkeypatch, FACTS)
    assert multihost.disagreement(FACTS) is None
    assert (
        multihost.disagreement(FACTS | {key: value})
        == f"{key} is {value!r} on process 1, {FACTS.get(key)!r} on process 0"
    )


def test_software_names_versions_and_the_code_itself():
    found = multihost.software()
    assert found["jax"] == jax.__version__ and len(found["code"]) == 16
    assert found == multihost.software()


def names_of(requirements) -> set[str]:
    wanted = (line for line in requirements if line[:1].isalpha() and "extra ==" not in line)
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted}


def test_versions_of_all_packages_that_decide_an_outcome_are_compared():
    """All that running needs, and what tokenizer and verifier need, but for packages that only
    show, store or fetch.
    """
    show_store_or_fetch = {
        "matplotlib",
        "tensorboardx",
        "tqdm",
        "etils",
        "huggingface-hub",
        "packaging",
        "typer",
        "typer-slim",
    }
    show_store_or_fetch |= {"filelock", "jaxtyping"}
    needed = names_of((TESTS.parent / "requirements.txt").read_text().splitlines())
    for package in ("transformers", "math-verify", "sympy"):
        needed |= names_of(importlib.metadata.requires(package) or ())
    assert needed - show_store_or_fetch <= names_of(multihost.DECIDING_PACKAGES)
    assert multihost.software()["math-verify"] == importlib.metadata.version("math-verify")


@pytest.fixture
def compared(monkeypatch):
    """The facts that `check_alike` gets, in order."""
    found = []
    monkeypatch.setattr(multihost, "check_alike", lambda facts: found.append(dict(facts())))
    return found


@pytest.mark.parametrize("first_has_a_run, compares", [(True, False), (False, True)])
def test_process_0_says_whether_first_weights_are_compared(
    first_has_a_run, compares, compared, tmp_path, monkeypatch
):
    """Comparing is a collective: in a --run-dir of each host's own disk, where one holds an older
    run, some would skip it and all hang.
    """
    model, folder, run_dir = (
        tiny.model(family="llama", vocab_size=258),
        str(tmp_path / "model"),
        tmp_path / "run",
    )
    save_pretrained(folder, model, tiny.params(model), tokenizer=load_tokenizer(None))
    of_process_0 = "resumed" if first_has_a_run else ""
    monkeypatch.setattr(multihost, "from_main", lambda text: of_process_0)
    run_dir.mkdir()
    for mine in (False, True):
        if mine:
            (run_dir / "config.yaml").write_text("")
        setup.check_first_weights(setup.Policy(model, None, (), folder, folder), run_dir)
        assert bool(compared) == compares
        compared.clear()


def test_model_files_prompts_and_packages_are_compared(compared, tmp_path, monkeypatch):
    """What changes if one file, prompt or package of a process is another."""
    model = tiny.model(family="llama", vocab_size=258)
    folder = tmp_path / "model"
    save_pretrained(folder, model, tiny.params(model), tokenizer=load_tokenizer(None))
    reward = {"verifier": "custom", "function": "m:f", "allowed_modules": ["m", "matplotlib"]}
    config = config_from_dict(
        {"model": {"folder": str(folder)}, "eval": {"every": 0}, "reward": reward}
    )
    problem = Problem("a", "1+1=", "2", "It is 2.")
    tokens = np.array([5, 6], np.int32)

    def facts(prompt=Prompt(problem, tokens)):  # noqa: B008
        weights.file_digests.cache_clear()
        setup.check_same_start(
            config,
            setup.Policy(model, None, (), str(folder), str(folder)),
            {"data.train": [prompt]},
            {"more": 1},
        )
        setup.check_weights(str(folder))
        return compared.pop(-2) | compared.pop()

    def changed(*args) -> list[str]:
        return [key for key, value in facts(*args).items() if before.get(key) != value]

    before = facts()
    assert (
        before["more"] == 1
        and before["matplotlib"]
        and before["the model"] == str(folder)
        and before["model.folder"] == str(folder)
    )
    assert list(before).index("the digest of the model's tokenizer.json") < list(before).index(
        "the digest of data.train"
    )
    for prompt in (
        Prompt(problem, np.array([5, 7], np.int32)),
        Prompt(dataclasses.replace(problem, answer="3"), tokens),
        Prompt(dataclasses.replace(problem, solution="So 2."), tokens),
    ):
        assert changed(prompt) == ["the digest of data.train"]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert changed() == ["the digest of the model's chat_template.jinja"]
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-3] + bytes([content[-3] ^ 32]) + content[-2:])
        assert changed() == [f"the digest of the model's {name}"]
        (folder / name).write_bytes(content)
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "9" if name == "math-verify" else installed(name),
    )
    assert changed() == ["math-verify"]


@pytest.mark.parametrize("verb", ["train", "evaluate", "supervised"])
def test_every_verb_refuses_before_it_writes(verb, tmp_path, monkeypatch, capfd):
    (tmp_path / "tiny.yaml").write_text(CONFIG)

    def refuse(facts):
        found = facts()
        raise InputError(", ".join(key for key in found if key.startswith("the digest of")))

    monkeypatch.setattr(multihost, "check_alike", refuse)
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"dapo_jax.{verb}")
    options = {
        "train": ["--run-dir", "run"],
        "evaluate": ["--run-dir", "run"],
        "supervised": ["--out", "out"],
    }[verb]
    with pytest.raises(SystemExit) as done:
        cli.run(module.main, ["--config", "tiny.yaml", *options])
    sets = {
        "train": ["data.train", "eval.sets.heldout"],
        "evaluate": ["the checkpoints in --run-dir", "eval.sets.heldout"],
    }
    said = ", ".join(f"the digest of {name}" for name in sets.get(verb, ["data.train"]))
    assert done.value.code == 2 and f"dapo_jax: {said}\n" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
