"""The examples in docstrings say what the functions return."""

import doctest
import importlib
from pathlib import Path

import pytest

EXAMPLES = {  # module: functions with examples; a function that loses its own is noticed
    "benchmark.schedule": {"parse_lengths"},
    "config.load": {"load_config"},
    "dapo.groups": {"group_advantages", "informative_groups"},
    "dapo.loss": {"cispo_token_loss", "dapo_token_loss"},
    "dapo.packing": {"normalizer_weights"},
    "dapo.update": {"learning_rate"},
    "training.dynamic_sampling": {"prompts_wanted"},
    "evaluate": {"consensus", "pass_at_k"},
    "model.logprobs": {"linear_logprobs"},
    "reward.overlong": {"overlong_penalty"},
    "reward.verify": {"check_verdict", "normalize_answer", "strict_verify"},
    "types": {"canonical_answer"},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # they name files of the repository
    module = importlib.import_module(f"dapo_jax.{name}")
    found = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert {test.name.rpartition(".")[2] for test in found} == EXAMPLES[name]
    said: list[str] = []
    for test in found:
        doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)


def test_every_example_is_run():
    package = Path(importlib.import_module("dapo_jax").__file__).parent
    having = {
        p.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        for p in package.rglob("*.py")
        if ">>> " in p.read_text()
    }
    assert having == set(EXAMPLES)
