"""The reward pool: right verdicts in order, and nothing that an answer or a custom function does
gets further than its worker.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torture_rewards
from refusals import refusal

from dapo_jax.config import RewardSection
from dapo_jax.reward.pool import (
    PendingVerdicts,
    RewardItem,
    RewardPool,
    check_errors,
    error_counts,
    no_answer_fraction,
)
from dapo_jax.types import InputError, Message, Problem, Verdict

pytestmark = pytest.mark.host

HERE = Path(__file__).parent
LIMIT_S = 1.0


def item(text, answer="42", response_len=10):
    return RewardItem(Problem("p", "What?", answer), text, response_len)


def custom_section(**changes):
    settings = (
        dict(workers=1, timeout_s=LIMIT_S, memory_mb=512, allowed_modules=("reward_functions",))
        | changes
    )
    return RewardSection(verifier="custom", function="reward_functions:judge", **settings)


@pytest.fixture(scope="module", autouse=True)
def helper_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.setenv("MY_CANARY_TOKEN", "canary-value")
        yield


@pytest.fixture(scope="module")
def pool(helper_on_path):
    """One worker for many tests: each that kills it shows that the next still gets its verdicts."""
    with RewardPool(custom_section()) as pool:
        yield pool


def test_strict_needs_no_worker():
    before = set(threading.enumerate())
    with RewardPool(RewardSection(verifier="strict")) as pool:
        assert set(threading.enumerate()) <= before  # those of other tests may end meanwhile
        verdicts = pool.judge([item("Answer: 42"), item("Answer: 43"), item(r"\boxed{42}")])
    assert verdicts == [
        Verdict(True, 1.0),
        Verdict(False, -1.0),
        Verdict(False, -1.0, answered=False),
    ]


def test_lenient_judges_in_order_and_survives_bombs():
    answers = [
        ("Answer: 42.0", True),
        ("Answer: 43", False),
        (r"\boxed{84/2}", True),
        ("no answer", False),
    ] * 10
    items = [item("Let $x = 5$. " * 1500 + text) for text, _ in answers]
    items.insert(7, item("Answer: $9^{9^{9^9}}$"))
    with RewardPool(RewardSection(verifier="lenient", workers=2, timeout_s=LIMIT_S)) as pool:
        began = time.monotonic()
        verdicts = pool.judge(items)
        assert time.monotonic() - began < 4 * LIMIT_S
    assert verdicts.pop(7) == Verdict(False, -1.0, "timed out after 1 s")
    assert verdicts == [
        Verdict(correct, 1.0 if correct else -1.0) for _, correct in answers
    ]  # `x = 5` is an answer too


def test_the_share_of_responses_without_an_answer():
    found = []
    for verifier in ("strict", "lenient"):
        with RewardPool(RewardSection(verifier=verifier, workers=1)) as pool:
            verdicts = pool.judge(
                [item("Answer: 42"), item("Answer: 43"), item(r"\boxed{42}"), item("I do not know")]
            )
        found.append(
            (
                no_answer_fraction(verdicts),
                no_answer_fraction([*verdicts, Verdict(False, -1.0, "timed out")]),
            )
        )
    assert found == [(0.5, 0.5), (0.25, 0.25)]
    assert no_answer_fraction([]) == 0.0


def test_custom_function_gets_the_item_whole(pool):
    turns = (Message("system", "Be brief."), Message("user", "\ud800 ½\n\0"))
    odd = "\ud800 ½\r\n\0\u2028"
    items = [
        RewardItem(Problem("p", turns, odd), odd, 7),
        item("42", response_len=30),
        item("41", response_len=5),
        item("x" * 10**6),
    ]
    assert pool.judge(items) == [
        Verdict(True, 0.7),
        Verdict(True, 3.0),
        Verdict(False, 0.5),
        Verdict(False, 1.0),
    ]
    assert pool.judge([]) == []
    filled = Problem("p", turns, odd, "a solution", "some/data.jsonl")
    assert all(dataclasses.asdict(filled).values())
    assert pool.judge(
        [RewardItem(filled, "!problem " + json.dumps(dataclasses.asdict(filled)), 0)]
    ) == [Verdict(True, 0.0)]


def test_variables_that_the_config_names_reach_workers_and_no_message(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-0123456789")
    with RewardPool(custom_section(environment=("JUDGE_KEY",))) as pool:
        assert pool.judge(
            [item("!key sk-0123456789"), item("!key other"), item("!environment")]
        ) == [
            Verdict(True, 0.0),
            Verdict(False, 0.0),
            Verdict(True, 0.0),  # and no others
        ]
        quoted = [verdict.error for verdict in pool.judge([item("!quote"), item("!quote far")])]
    assert quoted[0] == "ValueError: bad key $JUDGE_KEY." and quoted[1].endswith(
        "bad key $JUDGE_KEY"
    )
    monkeypatch.delenv("JUDGE_KEY")
    with refusal("reward.environment: JUDGE_KEY "):
        RewardPool(custom_section(environment=("JUDGE_KEY",)))


def test_submissions_run_while_the_caller_continues(pool):
    pending = [
        pool.submit([item(str(n), answer="42", response_len=n) for n in range(size)])
        for size in (300, 0, 1, 50)
    ]
    for batch, size in zip(pending, (300, 0, 1, 50), strict=True):
        assert isinstance(batch, PendingVerdicts)
        assert batch.result() == [Verdict(n == 42, n / 10) for n in range(size)]
        assert batch.result() == batch.result()


@pytest.mark.parametrize(
    ("nasty", "error"),
    [
        ("!sleep", "timed out after 1 s"),
        ("!print", "timed out after 1 s"),
        ("!exit", "worker exited with status 3"),
        ("!sys.exit", "worker exited with status 4"),
        ("!crash", "worker killed by SIGSEGV"),
        ("!allocate", "MemoryError: needs more than reward.memory_mb 512"),
        ("!raise", "ValueError: two lines " + "x" * 178),
        ("!none", "ValueError: the reward function must return (correct, score), not NoneType"),
        ("!text", "ValueError: the reward function must return (correct, score), not str"),
        ("!length", "ValueError: the reward function must return (correct, score), not tuple of 3"),
        ("!nan", "ValueError: score must be finite in float32, got nan"),
        ("!number", "ValueError: correct must be True or False, not int"),
    ],
)
def test_only_the_nasty_answer_goes_without_a_verdict(pool, nasty, error):
    items = [item("42") for _ in range(20)]
    items[9] = item(nasty)
    verdicts = pool.judge(items)
    assert verdicts.pop(9) == Verdict(False, -1.0, error)
    assert verdicts == [Verdict(True, 1.0)] * 19


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [torture_rewards.bombs, torture_rewards.nasty], ids=lambda case: case.__name__
)
def test_two_in_a_hundred_nasty_answers_in_small(case):
    """One of each kind among hundreds of plain answers; `torture_rewards.py` does the same with
    8,192.
    """
    count = torture_rewards.EVERY * len(
        {"bombs": torture_rewards.BOMBS, "nasty": torture_rewards.NASTY}[case.__name__]
    )
    assert f"among {count:,} answers" in case(count, timeout_s=LIMIT_S)


@pytest.mark.slow
def test_long_answers_in_small():
    assert torture_rewards.long_answers(40).startswith("40 right verdicts each")


@pytest.mark.parametrize("text", ["!fork", "!fork and allocate"])
def test_a_function_that_forks_shifts_no_verdict(pool, text):
    """Parent and child both return from the function, or the child runs out of memory; only the
    parent's verdict counts.
    """
    items = [item(text), item("41"), item("42"), item("41")] * 8
    assert [verdict.correct for verdict in pool.judge(items)] == [True, False, True, False] * 8


def test_a_worker_that_outgrew_its_memory_is_replaced(pool):
    first, _, second = pool.judge([item("!pid"), item("!allocate"), item("!pid")])
    assert first.score != second.score


def test_worker_is_shut_off_from_its_caller(pool):
    assert (
        pool.judge([item(f"!{what}") for what in ("environment", "jax", "main", "group")])
        == [Verdict(True, 0.0)] * 4
    )


def test_signals_for_the_whole_job_leave_workers_alone(pool):
    pid = int(pool.judge([item("!pid")])[0].score)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert pool.judge([item("!pid")])[0].score == pid


def test_what_a_worker_started_dies_with_it(pool):
    pid = int(pool.judge([item("!pid")])[0].score)
    assert pool.judge([item("!child")])[0].error == "timed out after 1 s"
    assert not _group_lives(pid)


@pytest.mark.parametrize(
    ("end", "error"), [("!sleep", "timed out after 1 s"), ("!exit", "worker exited with status 3")]
)
def test_what_has_left_the_session_of_its_worker_dies_with_it(pool, end, error):
    started, ended = pool.judge([item("!leave session"), item(end)])
    assert ended.error == error
    assert not _group_lives(int(started.score))


def _group_lives(pid, wait_s=5.0):
    """Whether a process group still has running members after at most `wait_s` (zombies that await
    their parent do not count).
    """
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        states = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                states += [state] if int(group) == pid else []
        if all(state in "ZX" for state in states):
            return False
        time.sleep(0.05)
    return True


def test_close_ends_workers_and_fails_what_is_under_way():
    with RewardPool(custom_section(timeout_s=60.0)) as pool:
        pid = int(pool.judge([item("!pid")])[0].score)
        pending = pool.submit([item("42"), item("!sleep")])
        time.sleep(0.2)
    with pytest.raises(RuntimeError, match="closed"):
        pending.result()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit([item("42")])
    pool.close()
    assert not _group_lives(pid)


SCRIPT = """
import os, sys, time
sys.path.insert(0, {package!r})
from dapo_jax.config import RewardSection
from dapo_jax.reward.pool import RewardItem, RewardPool
from dapo_jax.types import Problem

print("script runs", flush=True)
assert "jax" not in sys.modules
section = RewardSection(verifier="custom", function="next_to_me:judge", allowed_modules=("next_to_me",), workers=1, timeout_s=0.5)
problem = Problem("p", "What?", "42")
with RewardPool(section) as pool:
    print(pool.judge([RewardItem(problem, "42", 1)])[0], flush=True)
    if "be killed" in sys.argv:
        pool.submit([RewardItem(problem, "hang", 1)])
        while not os.path.exists("pid"):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
"""
MODULE = """
import os, signal, time

def judge(problem, text, response_len):
    if text == "hang":
        with open("new", "w") as f:
            f.write(str(os.getpid()))
        signal.alarm(0)  # takes the worker's own
        os.rename("new", "pid")
        time.sleep(1000)
    return text == problem.answer, 1.0
"""


def run_script(folder, *arguments):
    (folder / "script.py").write_text(SCRIPT.format(package=str(HERE.parent)))
    (folder / "next_to_me.py").write_text(MODULE)
    return subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    done = run_script(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "script runs",
        "Verdict(correct=True, score=1.0, error=None, answered=True)",
    ]


def test_a_worker_soon_follows_a_killed_caller(tmp_path):
    assert run_script(tmp_path, "be killed").returncode == -signal.SIGKILL
    assert not _group_lives(int((tmp_path / "pid").read_text()), wait_s=10.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"function": "os:system"}, "'os' ...reward.allowed_modules"),
        ({"function": "reward_functions:missing"}, "has no 'missing'"),
        ({"function": "reward_functions:not_callable"}, "is a int"),
        (
            {"function": "missing_module:judge", "allowed_modules": ("missing_module",)},
            "'missing_module'",
        ),
        (
            {"function": "exits_at_import:judge", "allowed_modules": ("exits_at_import",)},
            "worker exited with status 5",
        ),
    ],
)
def test_a_function_that_cannot_be_loaded_is_bad_input(tmp_path, monkeypatch, changes, says):
    (tmp_path / "exits_at_import.py").write_text("import os\nos._exit(5)")
    monkeypatch.syspath_prepend(str(tmp_path))
    section = RewardSection(
        **({"verifier": "custom", "workers": 1, "allowed_modules": ("reward_functions",)} | changes)
    )
    threads = set(threading.enumerate())
    with refusal(f"reward.function: ...{says}"):
        RewardPool(section)
    assert set(threading.enumerate()) <= threads  # those of other tests may end meanwhile


@pytest.mark.slow
def test_workers_that_stop_starting_give_errors_not_silence(tmp_path, monkeypatch):
    module = tmp_path / "fails_later.py"
    module.write_text("import os\ndef judge(problem, text, response_len):\n    os._exit(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    section = RewardSection(
        verifier="custom", function="fails_later:judge", allowed_modules=("fails_later",), workers=1
    )
    with RewardPool(section) as pool:
        module.write_text("raise RuntimeError('gone')")
        verdicts = pool.judge([item("42")] * 3)
    assert verdicts[0].error == "worker exited with status 1"
    assert all("RuntimeError: gone" in verdict.error for verdict in verdicts[1:])


@pytest.mark.slow
def test_workers_that_stop_starting_one_after_the_other_give_errors(tmp_path, monkeypatch):
    """While one start fails, another is always under way."""
    module = tmp_path / "fails_slowly.py"
    module.write_text(
        "import os, time\ndef judge(problem, text, response_len):\n"
        "    time.sleep(float(text))\n    os._exit(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("dapo_jax.reward.pool._RETRY_S", 0.01)
    section = RewardSection(
        verifier="custom", function="fails_slowly:judge", allowed_modules=("fails_slowly",)
    )
    with RewardPool(dataclasses.replace(section, workers=2)) as pool:
        time.sleep(2.0)  # both are ready
        module.write_text("import time\ntime.sleep(1.0)\nraise RuntimeError('gone')")
        pending = pool.submit([item("0.0"), item("0.6"), *[item("0.0")] * 3])
        assert pending.wait(30.0)
    assert all("RuntimeError: gone" in verdict.error for verdict in pending.result()[2:])


def test_too_many_errors_stop_the_run():
    fine, late, bad = (
        Verdict(True, 1.0),
        Verdict(False, -1.0, "timed out after 10 s"),
        Verdict(False, -1.0, "ValueError: bad\nthing"),
    )
    section = custom_section(max_error_fraction=0.2)
    assert error_counts([fine, late, bad, bad, fine]) == (1, 2)
    check_errors([], section)
    check_errors([fine] * 8 + [late, bad], section)
    memory, thread = (
        Verdict(False, -1.0, e)
        for e in ("MemoryError: needs more than reward.memory_mb 512", "can't start new thread")
    )
    for found, says in (
        (
            [late, bad, bad],
            "(1 time-outs, 2 errors; most often: ValueError: bad thing); fix reward.function: (problem, text, length) -> (correct, score),",
        ),
        (
            [bad, late, late],
            "(2 time-outs, 1 errors; most often: timed out after 10 s); raise reward.timeout_s (1),",
        ),
        (
            [bad, memory, thread],
            "most often: MemoryError: needs more than reward.memory_mb 512); raise reward.memory_mb (512),",
        ),
    ):
        with pytest.raises(InputError) as info:
            check_errors([fine] * 7 + found, section)
        assert str(info.value).startswith("reward: 3 of 10 answers got no verdict (")
        assert str(info.value).endswith(f"{says} or raise reward.max_error_fraction 0.2")
