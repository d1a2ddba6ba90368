"""The report shows a run's own numbers, loads nothing, and what a model wrote stays text.

With a Chromium also in a browser.
"""

import json
import math
import re
from html.parser import HTMLParser

import chromium
import numpy as np
import pytest

from dapo_jax import cli, report
from dapo_jax.config import dump_yaml, load_config
from dapo_jax.runtime.console import duration
from dapo_jax.runtime.metrics import METRICS, write_samples

pytestmark = pytest.mark.host

CONFIG = """
model:
  architecture:
    {vocab_size: 258, model_dim: 16, layers: 1, heads: 2, kv_heads: 1, head_dim: 8, ffn_dim: 32}
data: {train: arithmetic}
eval: {every: 0}
train: {steps: 40}
"""
# What a response could try: to end the script, to open a comment, to be an element, to be a line
# end of JavaScript alone.
HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> &lt; "
    "\u2028\u2029 \x00 \u202e \ud800 @data@ @script@ $& `${1}`"
)


def record(step: int, rng) -> dict:
    values = {key: float(rng.uniform(0.1, 0.9)) for key in METRICS if "<set>" not in key}
    return {"step": step, "updates": 2 * step, "draws": 60 * step, **values}


def evaluation(avg: float, error: float) -> dict:
    names = ("avg", "pass", "cons", "pass_at_1", "pass_at_2")
    return {
        f"eval/heldout/{name}{end}": number
        for name in names
        for end, number in (("", avg), ("_se", error))
    }


def row(i: int, group: str, text: str, **more) -> dict:
    tokens = [[text[:3], -0.01], [text[3:], -2.5]]
    fields = {
        "draw": i,
        "id": f"p{i}",
        "prompt": f"problem {i} {text}",
        "answer": text,
        "response": text,
        "correct": group == "all_correct",
    }
    fields |= {
        "group": group,
        "group_correct": 1,
        "group_size": 4,
        "reward": 0.5,
        "penalty": -0.5,
        "advantage": 1.5,
        "length": 2,
    }
    return fields | {"truncated": False, "tokens": tokens} | more


def make_run(folder, steps: int = 5, text: str = HOSTILE, **overrides):
    """A run with evaluations 0.25 ± 0.03, 0.75 ± 0.04 (the best) and 0.5 ± 0.04, and samples of two
    steps.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = [
        {"step": 0, "updates": 0, "draws": 0, **evaluation(0.25, 0.03)},
        *(record(step, rng) for step in range(1, steps + 1)),
    ]
    lines[-2] |= evaluation(0.75, 0.04)
    lines[-1] |= evaluation(0.5, 0.04)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "given.yaml").write_text(CONFIG)
    config = load_config(
        folder / "given.yaml", [f"{key}={value}" for key, value in overrides.items()]
    )
    (folder / "config.yaml").write_text(dump_yaml(config))
    for step in (steps - 1, steps):
        groups = ("kept", "kept", "all_wrong", "all_correct")
        rows = [row(i, group, text) for i, group in enumerate(groups)]
        write_samples(folder, step, rows)
    return lines


def make_report(capsys, out, *run_dirs) -> tuple[int, str]:
    """Exit status, and what was said of an error."""
    with pytest.raises(SystemExit) as done:
        cli.run(
            report.main, ["--run-dir", *map(str, run_dirs), *(["--out", str(out)] if out else [])]
        )
    return int(done.value.code or 0), capsys.readouterr().err


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.scripts, self._inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def page_of(capsys, tmp_path, *run_dirs) -> Page:
    out = tmp_path / "page.html"
    assert make_report(capsys, out, *run_dirs) == (0, "")
    return Page(out.read_text("utf-8"))


# ---- What it holds -------------------------------------------------------------------------------


def test_the_page_holds_the_numbers_of_the_run(tmp_path, capsys):
    lines = make_run(tmp_path / "run")
    data = page_of(capsys, tmp_path, tmp_path / "run").data
    (run,) = data["runs"]
    assert data["metrics"] == dict(METRICS)
    assert (run["name"], run["step"], run["planned"], run["updates"], run["draws"]) == (
        "run",
        5,
        40,
        10,
        300,
    )
    for key in METRICS:
        if "<set>" not in key:
            curve = run["series"][key]
            assert curve["steps"] == [1, 2, 3, 4, 5]
            values = [line[key] for line in lines[1:]]
            assert curve["values"] == pytest.approx(values, rel=1e-5)
            found = [curve[name][1] for name in ("first", "last", "low", "high")]
            assert found == pytest.approx(
                [values[0], values[-1], min(values), max(values)], rel=1e-5
            )
    assert "vocab_size: 258" in run["config"] and run["config_note"] == ""
    assert run["dynamic_sampling"] is True
    took = sum(line.get(f"time/{key}_s", 0) for line in lines for key in ("step", "eval", "save"))
    assert (run["took"], run["started"], run["checkpoints"]) == (duration(took), None, "")


def test_held_out_accuracy_first_best_last_and_gain(tmp_path, capsys):
    make_run(tmp_path / "run")
    (run,) = page_of(capsys, tmp_path, tmp_path / "run").data["runs"]
    found = run["evals"]["heldout"]
    assert (found["first"], found["best"], found["last"]) == (
        [0, 0.25, 0.03],
        [4, 0.75, 0.04],
        [5, 0.5, 0.04],
    )
    assert found["gain"] == pytest.approx([0.25, 0.05])  # 0.05² = 0.03² + 0.04²


def test_accuracies_of_other_problems_are_not_compared(tmp_path, capsys):
    """Not between runs whose sets share a name alone, nor within a run whose set was changed.

    Without a digest, nobody knows.
    """
    digests = {"a": "xxxxx", "b": "xxyyy", "c": "     ", "d": "yyyyy"}
    for name, digest in digests.items():
        lines = make_run(tmp_path / name)
        for line, mark in zip(
            [line for line in lines if "eval/heldout/avg" in line], digest, strict=False
        ):
            line |= {"eval/heldout/digest": mark * 64} if mark != " " else {}
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    page = page_of(capsys, tmp_path, *(tmp_path / name for name in digests))
    found = [run["evals"]["heldout"] for run in page.data["runs"]]
    assert [f["comparable"] for f in found] == [True, False, True, False]
    assert [f["first"][0] for f in found] == [
        0,
        5,
        0,
        0,
    ] and "eval/heldout/digest" not in page.data["runs"][0]["series"]


def test_several_runs_have_names_that_tell_them_apart_and_options_that_differ(tmp_path, capsys):
    make_run(tmp_path / "a" / "run")
    make_run(
        tmp_path / "b" / "run", **{"optim.learning_rate": "1e-5", "dapo.overlong_filtering": "true"}
    )
    data = page_of(capsys, tmp_path, tmp_path / "a" / "run", tmp_path / "b" / "run").data
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"]
    assert data["differing"] == [
        ["dapo.overlong_filtering", "false", "true"],
        ["optim.learning_rate", "1e-06", "1e-05"],
    ]


def test_a_run_that_measured_little(tmp_path, capsys):
    """One step, no evaluation, no config, no samples; keys that the table does not know and values
    that are no numbers.
    """
    (tmp_path / "run").mkdir()
    line = (
        '{"step": 1, "reward/mean": 0.5, "<b>": 1, "policy/loss": NaN, "policy/entropy": "x", '
        '"optim/lr": true, "eval/a/b/avg": 1}\n'
    )
    (tmp_path / "run" / "metrics.jsonl").write_text(line)
    (run,) = page_of(capsys, tmp_path, tmp_path / "run").data["runs"]
    assert list(run["series"]) == ["reward/mean"] and run["series"]["reward/mean"]["values"] == [
        0.5
    ]
    assert (run["updates"], run["evals"], run["samples"], run["planned"]) == (None, {}, [], None)
    assert "no config.yaml" in run["config_note"] and "no samples" in run["sample_note"]


def test_a_config_that_this_version_does_not_read_is_shown_as_it_is(tmp_path, capsys):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("gone: {option: 1}\n")
    (run,) = page_of(capsys, tmp_path, tmp_path / "run").data["runs"]
    assert run["config"] == "gone: {option: 1}\n" and "gone" in run["config_note"]


# ---- Size ----------------------------------------------------------------------------------------


def test_thinning_keeps_spikes_ends_and_means():
    rng = np.random.default_rng(1)
    values = rng.normal(size=20_000)
    values[[0, 7777, 19_999]] = 5, 50, -5
    curve = report.series("optim/grad_norm", np.arange(20_000) + 1, values)
    steps = curve["steps"]
    assert (
        len(steps) <= 1000 and steps == sorted(set(steps)) and (steps[0], steps[-1]) == (1, 20_000)
    )
    assert curve["high"] == [7778, 50] and 7778 in steps
    assert curve["values"] == pytest.approx([values[step - 1] for step in steps], rel=1e-5)
    at = steps[500]
    assert curve["means"][500] == pytest.approx(
        values[at - 401 : at + 400].mean(), rel=1e-4
    )  # 1 + 2 * (20,000 // 50) values


def test_thinned_evaluations_keep_their_errors():
    steps = np.arange(5000)
    curves = [
        report.series("eval/a/avg", steps, np.sin(steps)),
        report.series("eval/a/avg_se", steps, np.cos(7 * steps)),
    ]
    assert (
        curves[0]["steps"] == curves[1]["steps"]
        and len(curves[0]["steps"]) == 1000
        and curves[0]["steps"][-1] == 4999
    )


def test_samples_of_a_long_run_are_evenly_spaced_the_last_among_them(tmp_path):
    for step in range(1, 501):
        write_samples(tmp_path, step, [row(0, "kept", "x" * 1000)])
    shown, note = report.read_samples(tmp_path, 10_000_000)
    steps = [step for step, _ in shown]
    assert (
        len(steps) == 100
        and steps[-1] == 500
        and set(np.diff(steps)) == {5, 6}
        and "100 of 500" in note
    )
    fewer, note = report.read_samples(tmp_path, 100_000)
    assert fewer[-1][0] == 500 and 10 < len(fewer) < 30 and f"{len(fewer)} of 500" in note
    assert report.read_samples(tmp_path, 100) == (
        [],
        "Samples of 0 of 500 steps are on this page, evenly spaced.",
    )


def test_several_runs_share_the_room_for_samples(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        make_run(tmp_path / name, text="x" * 1000)
    sizes = [file.stat().st_size for file in (tmp_path / "a" / "samples").iterdir()]
    monkeypatch.setattr(report, "_SAMPLE_BYTES", 2 * sum(sizes))
    assert [
        len(run["samples"])
        for run in page_of(capsys, tmp_path, tmp_path / "a", tmp_path / "b").data["runs"]
    ] == [2, 2]
    monkeypatch.setattr(report, "_SAMPLE_BYTES", 2 * sum(sizes) - 2)
    assert [
        len(run["samples"])
        for run in page_of(capsys, tmp_path, tmp_path / "a", tmp_path / "b").data["runs"]
    ] == [1, 1]


# ---- Hostile and damaged input -------------------------------------------------------------------


def test_what_a_model_wrote_stays_text(tmp_path, capsys):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(f"# {HOSTILE}\n", errors="replace")
    page = page_of(capsys, tmp_path, tmp_path / "run")
    raw = (tmp_path / "page.html").read_bytes().decode("utf-8")
    assert len(page.scripts) == 2 and not [
        attributes for _, attributes in page.elements if "onerror" in attributes
    ]
    inside = raw.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert not re.search("[<>&\u2028\u2029\x00]", inside) and "alert(1)" in inside
    (run,) = page.data["runs"]
    ((_, before), (_, rows)) = run["samples"]
    assert len(before) == len(rows) == 4
    assert "".join(text for text, *_ in rows[0]["tokens"]) == HOSTILE == rows[0]["answer"] and rows[
        0
    ]["turns"][0][1].endswith(HOSTILE)
    assert run["config"].startswith("# </script>") and "not read" in run["config_note"]


def test_a_hostile_name_stays_text(tmp_path, capsys):
    make_run(tmp_path / "<img src=x onerror=alert(1)>")
    page = page_of(capsys, tmp_path, tmp_path / "<img src=x onerror=alert(1)>")
    assert (
        not [tag for tag, _ in page.elements if tag == "img"]
        and page.data["runs"][0]["name"] == "<img src=x onerror=alert(1)>"
    )


def test_the_page_loads_nothing_and_runs_no_other_script(tmp_path, capsys):
    make_run(tmp_path / "run", text="plain")
    page = page_of(capsys, tmp_path, tmp_path / "run")
    addresses = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "data")
    ]
    assert addresses and all(
        address.startswith("#") or address == "data:," for address in addresses
    )
    text = (tmp_path / "page.html").read_text("utf-8")
    assert set(re.findall(r"https?://[\w./]+", text)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not a place
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|@import|url\(|"
        r"fetch\(|XMLHttp",
        text,
    )
    policy = next(
        a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert (
        "default-src 'none'" in policy
        and "unsafe" not in policy
        and policy.count("sha256-") == 2
        and "@" not in policy
    )


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"response": 3}', "[" * 100_000, '{"id": "x"}']
)
def test_a_damaged_sample_is_left_out_and_counted(tmp_path, line):
    path = write_samples(tmp_path, 3, [row(0, "kept", "good")])
    path.write_text(path.read_text() + line + "\n")
    ((step, rows),), note = report.read_samples(tmp_path, 10**6)
    assert (
        step == 3
        and [found["id"] for found in rows] == ["p0"]
        and note == "1 damaged samples are left out."
    )


def test_a_sample_of_an_older_run_lacks_what_it_lacks():
    """Without tokens and group; other types where a field should be."""
    old = {
        "draw": 1,
        "id": 3,
        "prompt": [{"role": "user", "content": "?"}, 7],
        "response": "four",
        "correct": "yes",
        "reward": math.nan,
    }
    assert report.sample(json.dumps(old).encode()) == {
        "draw": 1,
        "turns": [["user", "?"]],
        "response": "four",
    }


@pytest.mark.parametrize(
    "tokens",
    [
        None,
        3,
        [["fo", -1.0]],
        [["four", "x"]],
        [["four", -1.0, 2]],
        [["four", -1.0, 2, "x"]],
        [["four", None, 2, ""]],
        [[4, -1.0]],
        [["four", math.inf]],
        ["four"],
    ],
)
def test_tokens_that_do_not_make_up_the_response_are_not_shown(tokens):
    assert report.sample(json.dumps(row(0, "kept", "four", tokens=tokens)).encode()).keys() >= {
        "response"
    }
    for good in ([["four", None]], [["fo", None], ["ur", -1.0]]):
        assert "response" not in report.sample(
            json.dumps(row(0, "kept", "four", tokens=good)).encode()
        )


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "metrics.jsonl: cannot read metrics"),
        ("", "metrics.jsonl: holds no steps yet"),
        ("nonsense\n{}\n", "metrics.jsonl: line 1"),
    ],
)
def test_a_folder_without_metrics(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text(content)
    make_run(tmp_path / "good")
    status, error = make_report(capsys, tmp_path / "page.html", tmp_path / "good", tmp_path / "run")
    assert status == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists() and not list((tmp_path / "good").glob("*.html"))


def test_other_bad_input(tmp_path, capsys):
    make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for out, run_dirs, said in (
        (None, ["s3://x/y"], "not gs://"),
        (None, [tmp_path / "run", tmp_path / "run" / "." / ""], "given twice"),
        (tmp_path, [tmp_path / "run"], "--out"),
        ("gs://bucket/page.html", [tmp_path / "run"], "--out"),
        (tmp_path / "file" / "page.html", [tmp_path / "run"], "cannot be written"),
    ):
        status, error = make_report(capsys, out, *run_dirs)
        assert status == 2 and said in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html*"))


def test_without_out_the_page_lies_in_the_run_folder(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert make_report(capsys, None, tmp_path / "run") == (0, "")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_start_and_checkpoints_are_read_from_the_folder(tmp_path, capsys):
    """The best of the stored steps is 4, not the last."""
    make_run(tmp_path / "run")
    for name in ("tensorboard", *(f"checkpoints/{step}" for step in (0, 4, 5))):
        (tmp_path / "run" / name).mkdir(parents=True)
    for second in (1_700_000_060, 1_700_000_000):
        name = f"events.out.tfevents.{second * 10**9}.host"
        (tmp_path / "run" / "tensorboard" / name).touch()
    (run,) = page_of(capsys, tmp_path, tmp_path / "run").data["runs"]
    assert (run["started"], run["checkpoints"]) == ("2023-11-14 22:13 UTC", "0, 4 (best), 5")


def test_siblings_and_the_prompt_as_fed_are_on_the_page():
    one = {"response": "4", "correct": True, "reward": 1.0, "length": 2, "truncated": False}
    line = row(0, "kept", "four", fed="<|user|>2+2?", siblings=[one, {"correct": True}, 7])
    found = report.sample(json.dumps(line).encode())
    assert found["fed"] == "<|user|>2+2?" and found["siblings"] == [one | {"turns": []}]


# ---- In a browser --------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(tmp_path, capsys, width):
    make_run(tmp_path / "one", steps=120)
    one = {"response": "a Sibling", "correct": True, "reward": 1.0, "length": 2}
    old = {
        key: value
        for key, value in row(0, "kept", "four").items()
        if key not in ("tokens", "group", "group_size", "answer")
    }
    write_samples(tmp_path / "one", 119, [old | {"siblings": [one] * 7}])
    make_run(tmp_path / ("two_with_a_rather_long_name_" * 3), **{"optim.learning_rate": "1e-5"})
    runs = [path for path in sorted(tmp_path.iterdir())]
    page_of(capsys, tmp_path, *runs)
    with chromium.Browser(tmp_path / "profile", width, dark=width == 390) as browser:
        browser.open(tmp_path / "page.html")
        charts = browser.run(
            "[...document.querySelectorAll('.chart')].map("
            "(c) => c.querySelectorAll('.plot path').length)"
        )
        assert (
            len(charts) == 17 and min(charts) >= 2
        )  # the curves to watch, with the time of a step
        assert browser.run(
            "document.querySelectorAll('.plot path').length"
            " === document.querySelectorAll('.plot path[d]').length"
        )
        assert not browser.run(
            "[...document.querySelectorAll('path')].some("
            "(p) => /NaN|Infinity|undefined/.test(p.getAttribute('d')))"
        )
        # Two runs side by side: a row for each fact, on a phone too.
        rows = browser.run(
            "[...document.querySelectorAll('#summary + .card tbody tr')].map("
            "(r) => [...r.cells].map((c) => c.innerText.replace(/\\s+/g, ' ').trim()))"
        )
        facts = {name: cells for name, *cells in rows}
        assert facts["rollout steps"] == ["120 of 40", "5 of 40"]
        assert facts["heldout, best"] == ["75.0% ± 4.0 step 119", "75.0% ± 4.0 step 4"]
        assert facts["heldout, last − last of one"] == ["–", "+0.0 ± 5.7"]
        # Nothing overflows the page.
        assert browser.run("document.documentElement.scrollWidth") == width

        # Pointing at a chart shows step and values; at its title, what is measured.
        assert "step 120" in browser.run(
            "(() => { const p = document.querySelector('.plot'), b = p.getBoundingClientRect();"
            "p.dispatchEvent(new PointerEvent('pointermove',"
            "{clientX: b.right - 11, clientY: b.top + 50}));"
            "return document.getElementById('tip').textContent; })()"
        )
        assert METRICS["policy/entropy"] in browser.run(
            "new Promise((done) => { [...document.querySelectorAll('.title')]"
            ".find((t) => t.textContent === 'Entropy').focus();"
            "setTimeout(() => done(document.getElementById('tip').textContent), 100); })"
        )
        # A run that is switched off leaves the charts.
        browser.run("document.querySelector('#runs input').click()")
        assert (
            browser.run("document.querySelector('.chart').querySelectorAll('.plot path').length")
            == charts[0] // 2
        )
        browser.run("document.querySelector('#runs input').click()")
        # Logarithmic, other metrics, no running mean.
        browser.run(
            "document.querySelectorAll('.log').forEach((b) => b.click());"
            "document.querySelector('#others').open = true; 0"
        )
        browser.run("new Promise((done) => setTimeout(done, 50))")
        assert browser.run("document.querySelectorAll('#others .plot path').length") > 20
        browser.run("document.querySelector('.bar input').click()")
        assert browser.run("document.querySelectorAll('.plot path.raw').length") == 0

        # Samples: of each group, of each step, and their text as it is.
        count = "document.querySelectorAll('.sample').length"
        pressed = {}
        for group in ("all", "kept", "all_correct", "all_wrong"):
            browser.run(f"document.querySelector('[data-group={group}]').click()")
            pressed[browser.run(f"document.querySelector('[data-group={group}]').textContent")] = (
                browser.run(count)
            )
        assert pressed == {
            "all (4)": 4,
            "informative (kept) (2)": 2,
            "all-correct (1)": 1,
            "all-incorrect (1)": 1,
        }
        browser.run("document.querySelector('[data-group=all]').click()")
        for text, found in (("nowhere", 0), ("sibling", 1), ("", 4)):  # in all steps
            browser.run(
                "(() => { const s = document.querySelector('[type=search]');"
                f"s.value = '{text}'; s.dispatchEvent(new Event('input')); }})()"
            )
            assert browser.run(count) == found
        units = browser.run(
            "[...document.querySelector('.response').textContent.split('')]"
            ".map((c) => c.charCodeAt(0))"
        )
        assert units == [ord(char) for char in HOSTILE]
        kinds = "[...document.querySelectorAll('.response i')].slice(0, 4).map((i) => i.className)"
        shown = browser.run(kinds)
        assert all(re.fullmatch("p[0-5]( silent)?", kind) for kind in shown)

        # Tokens are coloured by probability, with a legend, and a token says it.
        back = (
            "[...document.querySelectorAll('.response i')].slice(0, 4)"
            ".map((i) => getComputedStyle(i).backgroundColor)"
        )
        none = "rgba(0, 0, 0, 0)"
        colors, scales = (
            browser.run(back),
            browser.run("document.querySelectorAll('#scale i').length"),
        )
        assert [color == none for color in colors] == [
            kind.startswith("p0") for kind in shown
        ] and scales == 6
        told = browser.run(
            "(() => { document.querySelectorAll('.response i')[0]"
            ".dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));"
            "return document.getElementById('tip').textContent; })()"
        )
        assert re.fullmatch(r"log-prob −[0-9.]+, probability [0-9.]+", told)
        browser.run("document.querySelector('[aria-label=\"Step before\"]').click()")
        assert (
            browser.run(count) == 1 and browser.run("document.querySelector('#step').value") == "0"
        )
        assert (
            browser.run("document.querySelector('.response').textContent") == "four"
        )  # of an older version: without tokens
        assert browser.run("document.documentElement.scrollWidth") == width

        assert not browser.run(
            "/undefined|null|NaN|Infinity|\\[object/.test(document.body.innerText)"
        )
        assert browser.run("document.images.length + document.scripts.length") == 2
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith("file:")] == []
