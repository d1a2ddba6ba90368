"""The house rules: imports point one way, host code has no jax, pure code has no I/O, every config
field is read.
"""

import ast
import dataclasses
import functools
import graphlib
import typing
from pathlib import Path

import mypy.build
import mypy.types
import pytest
from mypy.find_sources import create_source_list
from mypy.options import Options
from mypy.traverser import NameAndMemberCollector

import dapo_jax
from dapo_jax.config import Config

pytestmark = pytest.mark.host

PACKAGE = Path(dapo_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ("training", "data", "rollout", "reward", "dapo", "model", "runtime", "config")
# What each room may import. Verbs (top-level files and benchmark/) may import every room and other
# verbs; no room imports a verb.
MAY_IMPORT = {
    "training": ("data", "rollout", "reward", "dapo", "model", "runtime"),
    "data": ("runtime",),
    "reward": ("runtime",),
    "rollout": ("model", "runtime"),
    "dapo": ("model", "runtime"),
    "model": ("runtime",),
    "runtime": (),
    "config": (),
}
SHARED = ("config", "types")
HOST = (
    "data/",
    "reward/",
    "dapo/groups.py",
    "dapo/buffer.py",
    "dapo/packing.py",
    "rollout/pages.py",
    "config/",
    "types.py",
    "cli.py",
)
PURE = (
    "dapo/loss.py",
    "dapo/update.py",
    "rollout/token_sampling.py",
    "rollout/sampler.py",
    "model/decoder.py",
    "model/attention.py",
    "model/logprobs.py",
    "model/families.py",
    "model/embedding.py",
    "model/experts.py",
    "model/flops.py",
    "model/lora.py",
)
IO_MODULES = {
    "os",
    "io",
    "pathlib",
    "time",
    "datetime",
    "random",
    "sys",
    "shutil",
    "tempfile",
    "subprocess",
    "socket",
    "logging",
}


def name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_verb(file: Path) -> bool:
    """Entry points, `python -m` on a room included."""
    return name(file).split("/")[0] not in ROOMS or file.name == "__main__.py"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_point_one_way(file):
    room = name(file).split("/")[0]
    allowed = {*SHARED, room, *MAY_IMPORT.get(room, ())}
    for module in imported(file):
        if module.startswith("dapo_jax.") and name(file) in ("types.py", "__init__.py"):
            raise AssertionError(f"{name(file)} imports {module}: it stands below every room")
        if module.startswith("dapo_jax.") and not is_verb(file):
            assert module.split(".")[1] in allowed, f"{name(file)} imports {module}"


def test_no_module_imports_itself_through_others():
    """Circles, imports inside functions included."""
    modules = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts): f for f in FILES}
    modules = {m.removesuffix(".__init__"): f for m, f in modules.items()}
    edges = {
        m: {max((o for o in modules if i == o or i.startswith(f"{o}.")), key=len) for i in found}
        for m, f in modules.items()
        if (found := {i for i in imported(f) if i.startswith("dapo_jax.")}) or True
    }
    order = graphlib.TopologicalSorter({m: found - {m} for m, found in edges.items()})
    order.prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("file", [f for f in FILES if name(f).startswith(HOST)], ids=name)
def test_host_code_imports_no_jax(file):
    assert not [
        m for m in imported(file) if m.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax")
    ]


@pytest.mark.parametrize("file", [f for f in FILES if name(f) in PURE], ids=name)
def test_pure_code_does_no_io(file):
    assert not {m.split(".")[0] for m in imported(file)} & IO_MODULES
    calls = {
        n.func.id
        for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert not calls & {"open", "print", "input"}


def test_the_lists_above_name_files_that_exist():
    names = [name(f) for f in FILES]
    assert set(PURE) <= set(names)
    assert all(any(n.startswith(h) for n in names) for h in HOST)
    assert not [n for n in names if "utils" in n]


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("*.py")), ids=lambda f: f.stem)
def test_what_tests_share_is_in_helper_modules(file):
    """Fixtures in conftest: a test module imports no other, so each runs, moves and changes alone."""
    assert not [m for m in imported(file) if m.startswith(("test_", "tests.", "conftest"))]


def config_classes(cls: type = Config) -> set[type]:
    classes = {cls}
    for hint in typing.get_type_hints(cls).values():
        for kind in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(kind):
                classes |= config_classes(typing.cast(type, kind))
    return classes


FIELDS = sorted(
    {(cls.__name__, field.name) for cls in config_classes() for field in dataclasses.fields(cls)}
    - {
        ("Config", "preset"),
        ("Config", "task"),
    }  # used up while loading; see test_config and test_tasks
    - {("Architecture", "max_position")}  # a limit, which config/checks.py applies
)


def sections(kind: mypy.types.Type | None) -> set[str]:
    """The config sections that a value of this type may be, with those they inherit from."""
    kind = mypy.types.get_proper_type(kind)
    if isinstance(kind, mypy.types.UnionType):
        return set().union(*map(sections, kind.items))
    return {info.name for info in kind.type.mro} if isinstance(kind, mypy.types.Instance) else set()


@functools.cache
def fields_read() -> set[tuple[str, str]]:
    """(section, field) of every `x.field` outside config/, where mypy finds x to be that section."""
    options = Options()
    options.preserve_asts = options.export_types = options.check_untyped_defs = (
        options.ignore_errors
    ) = True
    options.incremental, options.follow_imports, options.ignore_missing_imports = (
        False,
        "skip",
        True,
    )
    options.per_module_options = {
        "numpy.*": {"follow_imports": "skip", "follow_imports_for_stubs": True}
    }  # seconds
    built = mypy.build.build(create_source_list([str(PACKAGE)], options), options)
    reads = NameAndMemberCollector()
    for module, tree in built.files.items():
        if module.startswith("dapo_jax.") and not module.startswith("dapo_jax.config."):
            tree.accept(reads)
    return {
        (section, e.name)
        for e in reads.member_exprs
        for section in sections(built.types.get(e.expr))
    }


@pytest.mark.slow
@pytest.mark.parametrize("section, field", FIELDS)
def test_every_config_field_is_read(section, field):
    assert (section, field) in fields_read()


# ------------------------------------------------------------------------------------- measures

WIDTH, PACKAGE_LINES, HOUR_LINES = 100, 19_240, 5_899  # the sizes may only shrink
FUNCTION_LINES, PARAMETERS = 80, 7
# The path of one step: what is read in an hour.
HOUR = ("types.py", "config/schema.py", "train.py", "training/", "rollout/", "dapo/")
HOUR += ("model/decoder.py", "model/attention.py", "model/logprobs.py", "runtime/mesh.py")
# Verbs too; all others take the section they need.
WHOLE_CONFIG = ("config/", "training/setup.py", "runtime/same_run.py")


def functions(file: Path) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]


def lines(*files: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


def test_lines_are_short():
    wide = [
        f"{name(file)}:{number}"
        for file in FILES
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert not wide


@pytest.mark.parametrize("file", FILES, ids=name)
def test_functions_are_short_and_take_few_parameters(file):
    for function in functions(file):
        size = function.end_lineno - function.lineno + 1
        most = 120 if (name(file), function.name) == ("train.py", "train") else FUNCTION_LINES
        assert size <= most, f"{name(file)}: {function.name} has {size} lines"
        a = function.args
        named = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        count = len([x for x in named if x not in ("self", "cls")])
        public = (name(file), function.name) == ("model/logprobs.py", "linear_loss")
        assert count <= PARAMETERS or public, (
            f"{name(file)}: {function.name} has {count} parameters"
        )


def test_only_verbs_and_setup_see_the_whole_config():
    for file in FILES:
        if not (is_verb(file) or name(file).startswith(WHOLE_CONFIG)):
            assert "dapo_jax.config.Config" not in imported(file), name(file)


def test_the_house_is_small(record_property):
    page = [*PACKAGE.rglob("*.html")]
    hour = [f for f in FILES if name(f).startswith(HOUR)]
    record_property("lines", (total := lines(*FILES, *page), path := lines(*hour)))
    assert (total <= PACKAGE_LINES, path <= HOUR_LINES) == (True, True), (total, path)
