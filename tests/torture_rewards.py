"""Rewards and data under load and abuse, at full size: what is promised, what was injected, what
happened.

    python tests/torture_rewards.py [case ...]        all cases take about ten minutes on 2 cores

`test_pool.py` and `test_problems.py` run the same cases in small. A broken promise is an
AssertionError and a non-zero exit status.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dapo_jax.config import ArithmeticConfig, RewardSection
from dapo_jax.data.problems import load_problems
from dapo_jax.reward.pool import RewardItem, RewardPool, error_counts
from dapo_jax.types import Problem, Verdict

HERE = Path(__file__).parent
EVERY = 50  # one answer in so many is a nasty one: 2%

BOMBS = (
    "Answer: $9^{9^{9^9}}$",
    r"\boxed{10^{10^{10^{10}}}}",
    "Answer: $2^{2^{2^{2^{2^{2^2}}}}}$",
    r"Answer: \boxed{\binom{10^9}{5 \cdot 10^8}}",
    "Answer: $1000000000!$",
    "Answer: $" + r"\frac{1}{" * 200 + "2" + "}" * 200 + "$",
    "Answer: $" + "(" * 900 + "1" + ")" * 900 + "$",
    "Answer: $" + "9" * 1900 + "^{" + "9" * 50 + "}$",
)
NASTY = (
    "!exit",
    "!sys.exit",
    "!crash",
    "!allocate",
    "!print",
    "!sleep",
    "!raise",
    "!none",
    "!nan",
    "!length",
)
DEADLINES = ("!print", "!sleep")


def _item(text: str) -> RewardItem:
    return RewardItem(Problem("p", "What?", "42"), text, 10)


def _judge(items: list[RewardItem], section: RewardSection) -> tuple[list[Verdict], float]:
    with RewardPool(section) as pool:
        began = time.monotonic()
        return pool.judge(items), time.monotonic() - began


def bombs(count: int, *, workers: int = 2, timeout_s: float = 2.0) -> str:
    """Expressions that would take for ever: none is right, none outlives its deadline, all other
    verdicts are what they were.
    """
    plain = [
        ("Answer: 42.0", True),
        ("Answer: 43", False),
        (r"so \boxed{84/2}", True),
        ("no idea", False),
    ]
    items, expected = [], []
    for n in range(count):
        text, correct = (
            (BOMBS[n // EVERY % len(BOMBS)], None) if n % EVERY == 0 else plain[n % len(plain)]
        )
        items.append(_item(text))
        expected.append(correct)
    verdicts, seconds = _judge(
        items, RewardSection(verifier="lenient", workers=workers, timeout_s=timeout_s)
    )
    assert len(verdicts) == count
    assert [v.correct for v, e in zip(verdicts, expected, strict=True) if e is not None] == [
        e for e in expected if e is not None
    ]
    assert all(v.error is None for v, e in zip(verdicts, expected, strict=True) if e is not None)
    of_bombs = [v for v, e in zip(verdicts, expected, strict=True) if e is None]
    assert not any(v.correct for v in of_bombs)
    timeouts, errors = error_counts(of_bombs)
    # A time-out costs its deadline and a new worker; math-verify takes a second or two to import.
    assert seconds < 60 + 0.02 * count + timeouts * (timeout_s + 5) / workers
    return f"{len(of_bombs)} bombs among {count:,} answers: {timeouts} timed out, {errors} other errors, the rest judged wrong"


def long_answers(count: int, *, workers: int = 2) -> str:
    """Answers of 20,000 characters, by both verifiers: their ends are judged, in order."""
    texts = [f"Let $x_{{{n}}} = {n}$. " * 1200 for n in range(7)]
    items = [
        _item(texts[n % 7][: 20_000 - 12] + f" Answer: {42 if n % 3 else 41}") for n in range(count)
    ]
    assert all(19_990 <= len(item.text) <= 20_000 for item in items)
    took = []
    for verifier in ("strict", "lenient"):
        verdicts, seconds = _judge(items, RewardSection(verifier=verifier, workers=workers))
        assert verdicts == [
            Verdict(True, 1.0) if n % 3 else Verdict(False, -1.0) for n in range(count)
        ]
        took.append(f"{verifier} {seconds:.1f} s")
    return f"{count:,} right verdicts each: {', '.join(took)}"


def nasty(count: int, *, workers: int = 2, timeout_s: float = 1.0) -> str:
    """A custom function that exits, crashes, allocates 10 GB, prints without end, hangs: only that
    answer goes without a verdict.
    """
    items = [
        _item(NASTY[n // EVERY % len(NASTY)] if n % EVERY == 0 else "42" if n % 2 else "41")
        for n in range(count)
    ]
    section = RewardSection(
        verifier="custom",
        function="reward_functions:judge",
        allowed_modules=("reward_functions",),
        workers=workers,
        timeout_s=timeout_s,
        memory_mb=512,
    )
    verdicts, seconds = _judge(items, section)
    for n, (item, verdict) in enumerate(zip(items, verdicts, strict=True)):
        assert (
            (verdict.error is not None) if n % EVERY == 0 else verdict == Verdict(bool(n % 2), 1.0)
        ), (item.text, verdict)
    hung = sum(item.text in DEADLINES for item in items)
    timeouts, errors = error_counts(verdicts)
    assert timeouts == hung and errors == len(items[::EVERY]) - hung
    kinds = Counter(v.error.split()[0] for v in verdicts if v.error)
    return f"{timeouts} time-outs and {errors} other errors among {count:,} answers, all where injected ({dict(kinds)}), {seconds:.0f} s"


def rows(count: int) -> str:
    """A file of `count` rows, a hundred to a distinct prompt: counted, in bounded memory."""
    distinct = max(1, count // 100)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w") as f:
            for n in range(count):
                turns = [
                    {
                        "role": "user",
                        "content": f"{n % distinct}: " + "Let x be the sum of two numbers. " * 8,
                    }
                ]
                f.write(
                    json.dumps(
                        {
                            "prompt": turns,
                            "reward_model": {"ground_truth": str(n % distinct)},
                            "extra_info": {"index": n},
                        }
                    )
                    + "\n"
                )
        size = path.stat().st_size
        done = subprocess.run(
            [sys.executable, __file__, "--load", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
    problems, total, duplicates, seconds, megabytes = json.loads(done.stdout)
    assert (problems, total, duplicates) == (distinct, count, count - distinct)
    assert megabytes < 2048
    return f"{count:,} rows, {size / 1e6:,.0f} MB: {problems:,} problems in {seconds:.0f} s, at most {megabytes:,.0f} MB of memory, all told"


def _load(path: str) -> None:
    """In a process of its own, so that its peak memory is the reader's."""
    began = time.monotonic()
    _, report = load_problems(path, ArithmeticConfig())
    status = Path(
        "/proc/self/status"
    ).read_text()  # of this program alone; getrusage counts the process that started it, too
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(
        json.dumps(
            [report.problems, report.rows, report.duplicates, time.monotonic() - began, peak]
        )
    )


CASES = {
    "bombs": (
        lambda: bombs(8192),
        "no answer can stop or slow the trainer beyond its deadline",
        "2% reward bombs in 8,192 answers, math-verify",
    ),
    "long_answers": (
        lambda: long_answers(8192),
        "right verdicts in order",
        "8,192 answers of 20,000 characters",
    ),
    "nasty": (
        lambda: nasty(8192),
        "only the nasty answer goes without a verdict",
        "2% of 8,192 answers exit, crash, allocate 10 GB, print, hang",
    ),
    "rows": (lambda: rows(1_790_000), "below 2 GB", "a file of 1.79 M rows"),
}


def main() -> None:
    sys.path.insert(0, str(HERE))  # workers import reward_functions
    for name in sys.argv[1:] or CASES:
        case, promised, injected = CASES[name]
        began = time.monotonic()
        happened = case()
        print(
            f"{name}: promised: {promised}; injected: {injected}; happened: {happened}; {time.monotonic() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        _load(sys.argv[2])
    else:
        main()
