"""The pages: links lead somewhere, quoted messages and code are the program's."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "tests/README.md",
    ROOT / "tpu_scripts/README.md",
]
SOURCES = sorted((ROOT / "dapo_jax").rglob("*.py"))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_the_index_has_every_page():
    index = (ROOT / "docs/README.md").read_text()
    missing = [
        page.name
        for page in (ROOT / "docs").glob("*.md")
        if page.name != "README.md" and f"({page.name})" not in index
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_configs_and_scripts_that_are_named_exist(page):
    for path in re.findall(
        r"(?<![\w/.$])((?:configs|tpu_scripts|dapo_jax)/[\w./-]+\.(?:yaml|py|sh|md|env))",
        page.read_text(),
    ):
        assert (ROOT / path).exists(), path


# ----------------------------------------------------------------------------------------- messages


def texts_of(file: Path) -> list[str]:
    """Every text in a source, `\\0` where an f-string has a hole."""
    texts = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            texts.append(
                "".join(
                    part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
                )
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


@functools.cache
def texts() -> list[str]:
    return [text for file in SOURCES for text in texts_of(file)]


MESSAGES = re.findall(
    r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE
)


def test_the_page_has_messages():
    assert len(MESSAGES) > 40


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_that_the_program_has(message):
    form = ".*".join(map(re.escape, message.removesuffix("...").split("...")))
    assert any(re.search(form, text, re.DOTALL) for text in texts())


# --------------------------------------------------------------------------------------------- code

CODE = re.findall(
    r"```python\n# (\S+): (.+?)\n(.*?)```", (ROOT / "docs/algorithm.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize("file, functions, code", CODE, ids=lambda part: part.split("\n")[0][:40])
def test_code_next_to_the_equations_is_the_programs(file, functions, code):
    tree = ast.parse((ROOT / file).read_text())
    bodies = [
        ast.get_source_segment((ROOT / file).read_text(), node)
        for node in tree.body
        if getattr(node, "name", "") in functions.split(", ")
    ]
    assert len(bodies) == len(functions.split(", "))
    lines = {line.strip() for body in bodies for line in body.splitlines()}
    for line in code.splitlines():
        assert line.strip() in lines, line


def test_every_section_of_the_algorithm_has_its_code():
    assert len(CODE) == 9
