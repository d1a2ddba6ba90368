"""Writes math_verify.json: the table of math-verify's own tests, as [gold, prediction, whether they
are equal].

    pip download --no-deps --no-binary :all: math-verify==0.9.0 && tar xzf math_verify-0.9.0.tar.gz
    python tests/goldens/make_math_verify_goldens.py math_verify-0.9.0

Reads the parametrization of the tests and runs none. math-verify is under the Apache License 2.0.
"""

import importlib
import json
import sys
from pathlib import Path

MODULES = (
    "test_all",
    "test_boxed",
    "test_numina_cases",
    "test_open_thoughts",
    "test_strict",
    "test_yujianll",
)
VALUES = {"gold", "pred"}


def rows(module):
    """The arguments of the module's tests that compare a gold with a prediction, and the verdict
    that each expects.
    """
    for name, test in vars(module).items():
        for mark in getattr(test, "pytestmark", []) if name.startswith("test_") else []:
            names = [part.strip() for part in mark.args[0].split(",")]
            if VALUES <= set(names):
                for values in mark.args[1]:
                    given = dict(zip(names, values, strict=True))
                    yield [
                        given["gold"],
                        given["pred"],
                        bool(given.get("expected", given.get("result"))),
                    ]


def main(folder):
    sys.path.insert(0, folder)
    found = [row for name in MODULES for row in rows(importlib.import_module(f"tests.{name}"))]
    distinct = list({json.dumps(row): row for row in found}.values())
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in distinct)
    Path(__file__).with_name("math_verify.json").write_text(f"[\n{lines}\n]\n")
    print(f"{len(distinct)} rows")


if __name__ == "__main__":
    main(sys.argv[1])
