"""The pages that name tests name tests that are there."""

import ast
import fnmatch
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


def default_cases(file: Path) -> list[tuple[str, str]]:
    """Test and case of each `@pytest.mark.default`."""
    return [
        (node.name, argument.value)
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
        for mark in node.decorator_list
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.default"
        for argument in mark.args
    ]


def test_cases_that_are_named_as_default_exist(request):
    """Of the files that are run."""
    if request.config.option.keyword:
        pytest.skip("with -k some are left out")
    collected = {}
    for item in request.session.items:
        collected.setdefault(item.path, set()).add(item.name)
    for file in collected:
        for test, case in default_cases(file):
            assert fnmatch.filter(collected[file], f"{test}[[]{case}]"), (file.name, test, case)
