"""Verbs on a run folder, with the config that lies in it: evaluate, export, generate, report."""

import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import jax
import pytest
from refusals import line_of, names
from runs import CONFIG, run_train, verb

from dapo_jax import evaluate, export, generate, restore, train
from dapo_jax.config import load_config
from dapo_jax.data.prompts import byte_tokenizer
from dapo_jax.runtime.checkpoint import stored_steps
from dapo_jax.runtime.metrics import best_step, read_metrics
from dapo_jax.training.state import Progress, RunState, RunStore
from dapo_jax.types import Message, Stopped


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps, evaluated before, after the second and after the last."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(__file__.rpartition("/")[0])
    folder = tmp_path_factory.mktemp("verbs")
    (folder / "tiny.yaml").write_text(CONFIG)
    assert run_train(folder / "tiny.yaml", folder / "run") == 0
    yield folder / "run"
    patch.undo()


def test_evaluate_needs_a_run_folder_only_and_writes_prompts_as_fed(run, tmp_path, capsys):
    out = tmp_path / "two.json", tmp_path / "two.jsonl"
    assert verb(evaluate, "--run-dir", run, "--step", 2, "--json", out[0], "--samples", out[1]) == 0
    found = json.loads(out[0].read_text())
    measured = {line["step"]: line.get("eval/heldout/avg") for line in read_metrics(run)}
    assert found["step"] == 2 and found["sets"]["heldout"]["avg"] == measured[2]
    assert "checkpoint of step 2" in capsys.readouterr().out
    rows = [json.loads(line) for line in out[1].read_text().splitlines()]
    assert len(rows) == 16 and all(row["prompt"].endswith("=") for row in rows)


@pytest.mark.parametrize("module", [evaluate, export, generate], ids=lambda m: m.__name__)
def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(module, run, tmp_path, capsys):
    more = ("--out", tmp_path / "out") if module is export else ()
    assert verb(module, "--run-dir", run, "--step", 3, *more) == 2
    assert names(line_of(capsys)[0], f"--step: {run} ...step 3...2, 4")


@pytest.mark.parametrize(
    "args, said",
    [
        (("--model", "x", "--best"), "--step, --best: go with --run-dir"),
        (("--model", "x"), "--config: is missing"),
    ],
)
def test_flags_that_need_each_other(args, said, capsys):
    assert verb(evaluate, *args) == 2 and said in capsys.readouterr().err


def accuracies(folder, *rows):
    lines = []
    for step, (avg, digest) in enumerate(rows):
        named = {"eval/a/avg": avg, "eval/b/avg": 0.5, "eval/a/digest": digest}
        lines.append({"step": step} | (named if avg is not None else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "steps, best",
    [([0, 1, 2, 3, 4], 2), ([0, 1, 4], 4), ([3], None), ([], None), ([2, 5], 2), ([0, 2, 4], 2)],
)
def test_the_best_step_by_hand(tmp_path, steps, best):
    """Step 1 was on other problems; 3 was not evaluated; 2 and 4 are equal, and 2 is earlier."""
    accuracies(tmp_path, (0.1, "x"), (0.9, "y"), (0.4, "x"), (None, ""), (0.4, "x"))
    assert best_step(tmp_path, steps) == best


def test_a_step_is_chosen_before_a_process_joins_the_others(tmp_path, monkeypatch):
    """jax refuses to join them once a device, or their number, was asked for."""
    monkeypatch.setattr(jax, "process_count", lambda: pytest.fail("asked for devices"))
    for step in (2, 4):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert restore.chosen_step(tmp_path, 2, False) == 2


def test_the_time_of_a_save_is_in_the_line_after_it_alone(run):
    """Saved after steps 2 and 4: in every line, a sum over them would count a save many times."""
    assert [line["step"] for line in read_metrics(run) if "time/save_s" in line] == [3]


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_beside_the_newest(run, tmp_path):
    """save_every 100: only evaluations and the end save. One is kept, and the best."""
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    kept = ["train.keep_best=true", "train.keep_checkpoints=1", "train.save_every=100"]
    assert run_train(config, tmp_path / "run", "eval.every=1", "train.steps=5", *kept) == 0
    measured = {line["step"]: line["eval/heldout/avg"] for line in read_metrics(tmp_path / "run")}
    best = max(range(1, 6), key=lambda step: (measured[step], -step))
    assert stored_steps(tmp_path / "run" / "checkpoints") == sorted({best, 5}, reverse=True)
    assert verb(evaluate, "--run-dir", tmp_path / "run", "--best", "--json", tmp_path / "b") == 0
    assert json.loads((tmp_path / "b").read_text())["step"] == best


# ------------------------------------------------------------------------------------------ train


@pytest.mark.slow
def test_the_learning_rate_changes_on_resume_if_it_may(run, tmp_path, capsys):
    """And clip bounds, not the group size. The change is in the run folder, with its step."""
    config, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    shutil.copytree(run, folder)
    new = ("--set", "optim.learning_rate=5e-4", "--set", "dapo.clip_eps_high=0.3")
    args = ("--config", config, "--run-dir", folder, "--set", "train.steps=5", *new)
    assert verb(train, *args) == 2
    assert names(line_of(capsys)[0], "dapo.clip_eps_high: ...0.3...0.28...--allow-change optim")
    more = ("--allow-change", "optim")
    assert verb(train, *args, *more, "--set", "dapo.responses_per_prompt=2") == 2
    said, _ = line_of(capsys)
    assert names(said, "dapo.responses_per_prompt: ...2") and "--allow-change" not in said
    assert verb(train, *args, *more) == 0
    out = capsys.readouterr().out
    assert "optim.learning_rate: was 0.001, is 0.0005\n" in out
    assert "checkpoints: steps " in out and "2, 4" in out.rpartition("checkpoints: ")[2]
    changed = [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]
    keys = {"optim.learning_rate": [0.001, 0.0005], "dapo.clip_eps_high": [0.28, 0.3]}
    assert changed == [{"after_step": 4} | keys]
    assert [line["optim/lr"] for line in read_metrics(folder)[-2:]] == pytest.approx([1e-3, 5e-4])
    assert verb(train, *args) == 0  # its checkpoint has the new values: nothing to allow
    assert len((folder / "changes.jsonl").read_text().splitlines()) == 1


def test_where_a_run_resumes_is_said():
    store = SimpleNamespace(config={"supervised": {"updates": 500}})
    for progress, said in (
        (Progress(warmed=64), "resumed in warm-up, update 64 of 500"),
        (
            Progress(step=3, warmed=500, begun=True, updates=6),
            "resumed from the checkpoint of step 3: 6 updates, 0 draws",
        ),
    ):
        assert RunStore.resumed(store, RunState(None, progress)) == said


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
def test_curves_are_drawn_when_a_signal_ends_a_run(run, tmp_path, recorded, curves):
    said = []
    if recorded:
        shutil.copy(run / "metrics.jsonl", tmp_path)
    with pytest.raises(Stopped), train.curves_at_end(tmp_path, said.append):
        raise Stopped(15)
    assert (tmp_path / "curves.png").exists() == recorded == bool(said)


@pytest.mark.slow
def test_an_evaluation_shows_a_sample(run, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    assert run_train(config, tmp_path / "run", "train.steps=1", "eval.every=1") == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("  | [")]
    assert len(rows) == 2 and all("the ground truth is " in row for row in rows)
    for name in ("update of the warm-up", "evaluation", "sampling", "log-probs", "update"):
        assert out.count(f"compiling {name} ...\n") == 1


# ----------------------------------------------------------------------------------------- export


def test_the_card_of_an_export(run, tmp_path):
    assert verb(export, "--run-dir", run, "--out", tmp_path / "out", "--step", 2) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    last = {line["step"]: line.get("eval/heldout/avg") for line in read_metrics(run)}
    assert "rollout step 2 of 4.\n\n- Start: random weights, and 2 updates" in card
    assert f"step 2: heldout avg@2 {last[2]:.3f} ±" in card and 'from_pretrained("out")' in card
    again = tmp_path / "again.yaml"
    again.write_text(card.rpartition("```yaml\n")[2].removesuffix("```\n"))
    assert load_config(again) == load_config(run / "config.yaml")


class Hub:
    """The two calls of huggingface_hub's HfApi."""

    calls: list = []
    fails = ""

    def create_repo(self, name, **how):
        self.calls.append(("create", name, how))
        if self.fails == "create":
            raise ConnectionError("401 for hf_abcdefghijklmnopqrstuvwxyz123456")

    def upload_folder(self, repo_id, folder_path):
        self.calls.append(("upload", repo_id, sorted(os.listdir(folder_path))))
        return f"https://hub/{repo_id}"


def test_push_uploads_the_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = tmp_path / "out"
    assert verb(export, "--run-dir", run, "--out", out, "--push", "me/sums") == 0
    create, upload = Hub.calls
    assert create == ("create", "me/sums", {"private": True, "exist_ok": True})
    assert upload[:2] == ("upload", "me/sums")
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= {
        *upload[2]
    }
    assert "uploaded to https://hub/me/sums\n" in capsys.readouterr().out
    assert "# me/sums" in (out / "README.md").read_text()


def test_a_hub_that_refuses_is_one_line_before_anything_is_written(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Hub, "fails", "create")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = tmp_path / "out"
    assert verb(export, "--run-dir", run, "--out", out, "--push", "me/sums") == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "dapo_jax: --push me/sums: the hub refuses (ConnectionError: 401 for ***"
    )
    assert "hf auth login" in said and not out.exists()


# --------------------------------------------------------------------------------------- generate


def generated(capsys, *args) -> str:
    assert verb(generate, *args, "--quiet") == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_streamed_response_is_the_one_that_is_sampled_at_once(run, monkeypatch):
    """Parts concatenate to the whole; the same draw gives the same tokens in either way."""
    found = []

    class Kept(generate.Generator):
        def __post_init__(self):
            super().__post_init__()
            found.append(self)

    monkeypatch.setattr(generate, "Generator", Kept)
    assert verb(generate, "--run-dir", run, "--quiet", "1+2") == 0
    [generator] = found
    tokens = generator.tokens("1+2")
    assert tokens.tolist() == byte_tokenizer()("1+2=")["input_ids"]  # data.template
    generator.__post_init__()
    parts = list(generator.stream(tokens))
    generator.__post_init__()
    [[whole]] = generator.samples([tokens], 1)
    assert "".join(parts) == whole


def test_a_stream_whose_earlier_text_changes_loses_nothing():
    """A run of bytes that turns out to be no UTF-8 changes the text before it: by ByteFallback."""
    texts = ["a", "a é", "a \ufffd\ufffdx", "a \ufffd\ufffdxyz"]

    class Stream:
        pending, live, part = 0, 1, -1

        def submit(self, requests):
            pass

        def advance(self):
            self.part += 1
            self.live = int(self.part < len(texts) - 1)
            return [(None, SimpleNamespace(tokens=self.part))]

    engine = SimpleNamespace(stream=lambda weights, seed: Stream())
    config = SimpleNamespace(seed=0)
    generator = generate.Generator(config, None, engine, None)
    generator._text = texts.__getitem__
    assert list(generator.stream(None)) == ["a", " é", "\ufffd\ufffdxyz"]


def test_samples_of_a_file_of_prompts(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("1+2\n\n3+4\n")
    args = ("--run-dir", run, "--prompts", tmp_path / "prompts.txt", "--samples", 3)
    assert verb(generate, *args) == 0
    out = capsys.readouterr().out
    assert out.count("---- ") == 2 and "---- 1+2=\n" in out and "---- 3+4=\n" in out
    assert out.count("\n----\n") == 6  # where a response of several lines ends
    assert verb(generate, "--run-dir", run, "--prompts", tmp_path / "gone") == 2
    assert names(line_of(capsys)[0], f"{tmp_path}/gone: ...No such file")


@pytest.mark.slow
def test_a_model_that_has_not_been_trained(run, tmp_path, capsys):
    """As a config starts it, and as a folder alone."""
    out, lengths = tmp_path / "hf", ("data.max_prompt_len=16", "rollout.max_response_len=24")
    assert verb(export, "--run-dir", run, "--out", out) == 0
    capsys.readouterr()
    sets = [part for length in lengths for part in ("--set", length)]
    assert generated(capsys, "--model", out, *sets, "1+2=")
    assert generated(capsys, "--config", run / "config.yaml", "1+2")


def test_lines_are_answered_one_by_one(run, monkeypatch, capsys):
    """Without a chat template each is a problem of its own; one that is too long ends nothing."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"1+2\n\n{'9' * 40}\n3+4\n"))
    out = generated(capsys, "--run-dir", run)
    assert "data: no usable prompt (1 longer than 16 tokens)" in out
    assert "; the chat starts over\n" in out


def test_a_chat_has_the_turns_before(monkeypatch, capsys):
    """The template joins the turns; the second prompt holds the first answer."""
    asked = []
    tokenizer = SimpleNamespace(chat_template="x")
    section = SimpleNamespace(chat=True)

    def tokens(turns):
        asked.append(turns)
        return turns

    chat = SimpleNamespace(
        config=SimpleNamespace(data=section),
        policy=SimpleNamespace(tokenizer=tokenizer),
        tokens=tokens,
        stream=lambda turns: iter(["an", "swer"]),
    )
    generate.chat(chat, iter(["a", "b"]))
    first = (Message("user", "a"),)
    assert asked == [first, (*first, Message("assistant", "answer"), Message("user", "b"))]
    assert capsys.readouterr().out == "answer\nanswer\n"


def test_the_config_of_a_run_without_one(tmp_path, capsys):
    assert verb(generate, "--run-dir", tmp_path, "x") == 2
    assert names(line_of(capsys)[0], f"{tmp_path}: ...config.yaml")
