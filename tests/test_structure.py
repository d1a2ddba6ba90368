"""The house rules: imports point one way, host code has no jax, pure code has no I/O, every config
field is read.
"""

import ast
import dataclasses
import functools
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

PACKAGE = Path(dapo_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ("config", "training", "data", "rollout", "reward", "dapo", "model", "runtime")
MAY_IMPORT = {
    "config": (),
    "runtime": (),
    "model": ("runtime",),
    "dapo": ("model", "runtime"),
    "rollout": ("model", "runtime"),
    "reward": ("runtime",),
    "data": ("runtime",),
    "training": ("data", "rollout", "reward", "dapo", "model", "runtime"),
}
HOST = (
    "data/",
    "reward/",
    "dapo/groups.py",
    "dapo/buffer.py",
    "dapo/packing.py",
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


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_point_one_way(file):
    is_verb = (
        name(file).startswith("benchmark/") or file.name == "__main__.py"
    )  # a verb of several files; of a room
    room = name(file).split("/")[0] if "/" in name(file) and not is_verb else None
    for module in imported(file):
        if not module.startswith("dapo_jax.") or room is None:
            continue
        other = module.split(".")[1]
        allowed = ("config", "types", room, *MAY_IMPORT[room])
        # `python -m` on a room's file goes through cli, like any verb
        assert other in allowed or other == "cli", f"{name(file)} imports {module}"


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


@pytest.mark.parametrize("section, field", FIELDS)
def test_every_config_field_is_read(section, field):
    assert (section, field) in fields_read()
