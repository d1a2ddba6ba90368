"""The pages that name tests name tests that are there."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

TESTS = Path(__file__).parent
PAGES = [
    TESTS / "README.md",
    *sorted(TESTS.parent.glob("*.md")),
    *sorted((TESTS.parent / "docs").glob("*.md")),
]
NAMED = sorted(
    {
        found
        for page in PAGES
        for found in re.findall(
            r"`(test_\w+\.py)(?: -k (?:\"([^\"]+)\"|(\w+)))?`", page.read_text()
        )
    }
)


def names(file: Path) -> list[str]:
    return [
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_the_pages_name_tests():
    assert len(NAMED) > 30


@pytest.mark.parametrize("file, words, word", NAMED, ids=lambda part: part)
def test_a_named_test_exists(file, words, word):
    assert (TESTS / file).is_file()
    for part in (words or word).split(" or "):
        assert [name for name in names(TESTS / file) if part in name], (
            f"no test of {file} has {part!r} in its name"
        )
