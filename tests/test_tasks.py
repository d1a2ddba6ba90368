"""Tasks of one's own in one Python file: what is read of it, who runs it, and what is said of a bad
one.
"""

import importlib.util
import json
from pathlib import Path

import pytest
from refusals import line_of, names
from runs import CONFIG, run_train

from dapo_jax.config import ConfigError, RewardSection, dump_yaml, load_config
from dapo_jax.reward.pool import RewardItem, RewardPool
from dapo_jax.runtime import multihost, same_run
from dapo_jax.types import InputError, Problem, Verdict

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "configs/tasks"
TASK = """
TEMPLATE = "Work out {prompt}. "

def reward(problem, text, length):
    correct = sum(text.encode("utf-8", "replace")) % 2 == 0
    return correct, 1.0 if correct else -1.0
"""


def function_of(name):
    spec = importlib.util.spec_from_file_location(name, TASKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder: paths of task files are relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(here, text="task: my.py\nreward: {allowed_modules: [my.py]}\n", overrides=()):
    """The config of a tiny model that names a task, without a reward section or template."""
    own = "".join(
        line + "\n" for line in CONFIG.splitlines() if not line.startswith(("reward:", "data:"))
    )
    (here / "c.yaml").write_text(own.replace("max_position: 64", "max_position: 4096") + text)
    return load_config("c.yaml", ["reward.overlong_buffer_len=10", *overrides])


# --------------------------------------------------------------------------------------------------
# ---------- the examples


@pytest.mark.parametrize(
    "text, answer, verdict",
    [
        ("3*4=12\nAnswer: 12", "12", (True, 1.0)),
        ("so it is 49.0", "50", (True, 1.0)),  # 2% off
        ("so it is 48.9", "50", (False, -1.0)),
        ("first 50, then 20", "50", (False, -1.0)),  # the last number counts
        ("-50", "50", (False, -1.0)),
        ("0.0", "0", (True, 1.0)),
        ("0.01", "0", (False, -1.0)),
        ("no idea", "50", (False, -1.0)),
    ],
)
def test_numeric(text, answer, verdict):
    assert function_of("numeric").reward(Problem("p", "?", answer), text, 5) == verdict


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("<think>3*4=12</think><answer>12</answer>", (True, 1.5)),
        ("<think>3*4=\n12</think>\n<answer> 12 </answer>", (True, 1.5)),
        ("<think>3*4=12</think><answer>12", (True, 0.5)),  # right, in no form
        ("<think>3*4=13</think><answer>13</answer>", (False, -0.5)),  # wrong, in form
        ("<answer>12</answer>", (True, 0.5)),
        ("Well. <think>3*4=12</think><answer>12</answer>", (True, 0.5)),
        ("<think>a</think><think>b</think><answer>12</answer>", (True, 0.5)),
        ("<think></think><answer>12</answer>", (True, 0.5)),
        ("<answer>12</answer><answer>13</answer>", (False, -1.5)),
        ("12", (False, -1.5)),
        ("", (False, -1.5)),
    ],
)
def test_format_and_answer(text, verdict):
    assert function_of("format_and_answer").reward(Problem("p", "?", "12"), text, 5) == verdict


@pytest.mark.parametrize("name", ["numeric", "format_and_answer"])
def test_the_configs_of_the_examples(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(f"configs/tasks/{name}_cpu.yaml")
    assert config.data.template == function_of(name).TEMPLATE
    assert config.reward.function == f"configs/tasks/{name}.py:reward"


def test_the_problems_of_the_second_example(capsys):
    function_of("format_and_answer").write_problems(200, unclosed=0.5)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    judge = function_of("format_and_answer").reward
    scores = [
        judge(Problem("p", row["prompt"], row["answer"]), row["solution"], 9)[1] for row in rows
    ]
    assert len(rows) == 200 and {-1.5, -0.5, 0.5, 1.5} == set(scores)
    assert 0.4 < sum(s in (-0.5, 1.5) for s in scores) / 200 < 0.6  # in form


# --------------------------------------------------------------------------------------------------
# -------------- configs


def test_a_task_sets_template_and_function(here):
    (here / "my.py").write_text(TASK)
    config = load(here)
    assert config.data.template == "Work out {prompt}. "
    assert (config.reward.verifier, config.reward.function) == ("custom", "my.py:reward")


def test_the_configs_own_keys_win(here):
    (here / "my.py").write_text(TASK)
    config = load(here, overrides=["data.template='{prompt}?'", "reward.function=my.py:other"])
    assert (config.data.template, config.reward.function) == ("{prompt}?", "my.py:other")
    strict = load(here, overrides=["reward.verifier=strict", "reward.function=null"])
    assert (strict.data.template, strict.reward.verifier) == ("Work out {prompt}. ", "strict")


def test_reading_a_config_runs_nothing_of_the_file(here):
    (here / "my.py").write_text("open('ran', 'w')\nTEMPLATE: str = ('a '\n  'b {prompt}')\n")
    assert load(here).data.template == "a b {prompt}"
    assert not (here / "ran").exists()


def test_a_resolved_config_needs_the_file_no_more(here):
    """So that the page of a run, and its export, can be made elsewhere."""
    (here / "my.py").write_text(TASK)
    config = load(here)
    (here / "my.py").unlink()
    (here / "resolved.yaml").write_text(dump_yaml(config))
    assert load_config("resolved.yaml") == config


NEEDS = 'needs TEMPLATE = "... {prompt} ...": one text in quotes with {prompt} exactly once'
BAD_FILES = {
    "missing": (
        None,
        "c.yaml: task: my.py: cannot read task (No such file or directory); give the "
        "path of a Python file",
    ),
    "syntax error": (
        "x = 1\ndef reward(:\n",
        "c.yaml: task: my.py:2: not valid Python (invalid syntax); correct the file",
    ),
    "NUL": ("TEMPLATE = '\0'", "(source code string cannot contain null bytes); correct the file"),
    "nested": ("TEMPLATE = " + "(" * 5000 + ")" * 5000, "c.yaml: task: my.py"),
    "not UTF-8": (b"\xff\xfe", "c.yaml: task: my.py: not UTF-8 text"),
    "no template": ("def reward(p, t, n): ...", f"c.yaml: task: my.py: {NEEDS}"),
    "inside a function": ("def f():\n    TEMPLATE = '{prompt}'", NEEDS),
    "computed": ("TEMPLATE = 'a' + '{prompt}'", NEEDS),
    "an f-string": ("TEMPLATE = f'{prompt}'", NEEDS),
    "bytes": ("TEMPLATE = b'{prompt}'", NEEDS),
    "no place": ("TEMPLATE = 'hello'", NEEDS),
    "two places": ("TEMPLATE = '{prompt} {prompt}'", NEEDS),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line(here, case):
    content, expected = BAD_FILES[case]
    if content is not None:
        (here / "my.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        load(here)
    assert (
        expected in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 400
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "task: my.py\n",
            "reward.function: file 'my.py' is not in reward.allowed_modules; add it if you "
            "trust it",
        ),
        (
            "task: my.py\nreward: {allowed_modules: [./my.py]}\n",
            "file 'my.py' is not in reward.allowed_modules",
        ),
        (
            "task: my\nreward: {allowed_modules: [my]}\n",
            "task: expected a Python file, name.py, got my",
        ),
        ("task: [my.py]\n", "task: must be a valid string, got ['my.py']"),
        ("data: 3\ntask: my.py\n", "data: must be an object"),
        (
            "task: my.py\nreward: {function: 'my.py:a.b', allowed_modules: [my.py]}\n",
            "expected package.module:function or file.py:function",
        ),
    ],
)
def test_a_task_that_is_not_allowed_or_no_file(here, text, expected):
    (here / "my.py").write_text(TASK)
    with pytest.raises(ConfigError) as error:
        load(here, text)
    assert expected in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# -------------- workers


def section(path="my.py", **changes):
    return RewardSection(
        verifier="custom", function=f"{path}:reward", allowed_modules=(path,), workers=1, **changes
    )


def item(text):
    return RewardItem(Problem("p", "What?", "42"), text, 3)


@pytest.mark.parametrize(
    "content, expected",
    [
        (
            None,
            "reward.function: my.py: cannot read reward (No such file or directory); give "
            "the path of a Python file",
        ),
        (
            "def reward(:",
            "reward.function: cannot import 'my.py' (SyntaxError: invalid syntax (my.py, "
            "line 1)); correct the name, or fix the file",
        ),
        ("1 / 0", "cannot import 'my.py' (ZeroDivisionError: division by zero)"),
        (
            "TEMPLATE = '{prompt}'",
            "reward.function: file 'my.py' has no 'reward'; correct the name",
        ),
        (
            "reward = 3",
            "reward.function: 'my.py:reward' is a int; name a function(problem, text, length)",
        ),
    ],
)
def test_a_file_without_a_function_is_one_line(here, content, expected):
    if content is not None:
        (here / "my.py").write_text(content)
    with pytest.raises(InputError) as error:
        RewardPool(section())
    assert expected in str(error.value) and "\n" not in str(error.value)


NONSENSE = """
import dataclasses, os

@dataclasses.dataclass
class Rules:
    "Looks its module up."
    exact: bool = True

def reward(problem, text, length):
    if text == "exit":
        os._exit(3)
    exact = Rules().exact and text.isdigit()
    return (text == problem.answer, float(length)) if exact else "very good"
"""


def test_workers_run_the_text_that_was_read_whatever_the_file_holds_since(here):
    (here / "my.py").write_text(NONSENSE)
    with RewardPool(section()) as pool:
        assert pool.judge([item("42"), item("41")]) == [Verdict(True, 3.0), Verdict(False, 3.0)]
        (here / "my.py").write_text("raise RuntimeError('edited')")
        first, second, third = pool.judge(
            [item("hm"), item("exit"), item("42")]
        )  # the last one by another worker
    assert first.error == "ValueError: the reward function must return (correct, score), not str"
    assert second.error == "worker exited with status 3"
    assert third == Verdict(True, 3.0)


def test_a_file_larger_than_a_sockets_buffer(here):
    (here / "my.py").write_text(TASK + "#" * 900_000)
    with RewardPool(section()) as pool:
        assert pool.judge([item("42")]) == [Verdict(True, 1.0)]  # 52 + 50 is even


# --------------------------------------------------------------------------------------------------
# ----------------- runs


@pytest.fixture
def config(here):
    (here / "my.py").write_text(TASK)
    own = CONFIG.replace(
        'function: "reward_functions:even_sum", allowed_modules: [reward_functions]',
        "allowed_modules: [my.py]",
    )
    own = own.replace('template: "{prompt}=", max_prompt_len: 16', "max_prompt_len: 24").replace(
        "verifier: custom, ", ""
    )
    (here / "tiny.yaml").write_text(own + "task: my.py\n")
    return here / "tiny.yaml"


def test_a_run_resumes_with_the_task_it_was_started_with(config, here, capfd):
    """(A real run, which writes the same folder, is in docs/tasks.md.)"""
    run, original = here / "run", (here / "my.py").read_text()
    same_run.write_config(load_config(config), run, original)
    assert (run / "reward_function.py").read_text() == original

    (here / "my.py").write_text(original + "# another\n")
    assert run_train(config, run) == 2
    said, _ = line_of(capfd)
    assert names(said, f"reward.function: my.py:reward ...{run} ...--allow-change reward.function")
    assert (run / "reward_function.py").read_text() == original

    mine, allow = load_config(config), ["reward.function"]
    assert same_run.check_same_run(mine, run, original + "# another\n", allow)
    assert not same_run.check_same_run(mine, run, original, allow)
    same_run.write_config(mine, run, original + "# another\n")
    assert (run / "reward_function.py").read_text() == original + "# another\n"
    # What it uses from now on.
    assert not same_run.check_same_run(load_config(config), run, original + "# another\n")

    (here / "my.py").write_text(original.replace("Work out", "Find"))
    assert run_train(config, run, allow="reward.function") == 2  # prompts are not the reward's
    assert names(line_of(capfd)[0], "data.template: ...'Find {prompt}. '")


def test_processes_must_have_the_same_file(config, here, monkeypatch):
    found = []

    def differ(facts):
        found.append(facts())
        raise InputError("something differs")

    monkeypatch.setattr(multihost, "check_alike", differ)
    for ending in ("", "# another\n"):
        (here / "my.py").write_text(TASK + ending)
        assert run_train(config, here / "run") == 2
    one, other = found
    assert {key for key in one if one[key] != other[key]} == {"the reward function"} and one[
        "the reward function"
    ] == TASK
