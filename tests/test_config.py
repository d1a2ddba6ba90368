"""The config loader: strict, exact, and never more than one line of complaint."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from dapo_jax import config as config_module
from dapo_jax.config import (
    ColumnsConfig,
    Config,
    ConfigError,
    EvalSet,
    TrainSet,
    config_from_dict,
    dump_yaml,
    load_config,
    to_dict,
)
from dapo_jax.config.describe import describe

pytestmark = pytest.mark.host

MINIMAL = """
model: {architecture: {vocab_size: 258, model_dim: 64, layers: 2, heads: 4, kv_heads: 2, head_dim: 16, ffn_dim: 128}}
eval: {every: 0}
"""


@pytest.fixture
def load(tmp_path):
    def load(text="", overrides=(), base=MINIMAL):
        path = tmp_path / "c.yaml"
        path.write_bytes((base + text).encode() if isinstance(text, str) else text)
        return load_config(path, list(overrides))

    return load


def test_defaults_are_the_papers_recipe(load):
    c = load()
    assert (c.dapo.prompts_per_step, c.dapo.responses_per_prompt, c.dapo.responses_per_update) == (
        512,
        16,
        512,
    )
    assert (
        c.dapo.clip_eps_low,
        c.dapo.clip_eps_high,
        c.dapo.dual_clip,
        c.dapo.loss_normalizer,
    ) == (0.2, 0.28, None, "token-mean")
    assert (c.dapo.prompts_per_draw, c.dapo.max_generation_batches) == (3 * 512, 10)
    assert (c.rollout.max_response_len, c.reward.overlong_buffer_len, c.data.max_prompt_len) == (
        20480,
        4096,
        2048,
    )
    assert (
        c.rollout.temperature,
        c.rollout.top_p,
        c.eval.temperature,
        c.eval.top_p,
        c.eval.samples_per_problem,
    ) == (
        1.0,
        1.0,
        1.0,
        0.7,
        32,
    )
    assert (
        c.optim.learning_rate,
        c.optim.warmup_steps,
        c.optim.weight_decay,
        c.optim.grad_clip,
    ) == (1e-6, 20, 0.1, 1.0)
    assert (
        c.dapo.advantage_ddof,
        c.dapo.advantage_eps,
        c.train.steps,
        c.dapo.overlong_filtering,
    ) == (1, 1e-6, 320, False)


def test_presets_set_the_places_where_paper_and_recipe_differ(load):
    paper, verl = load("preset: paper\n"), load("preset: verl\n")
    assert (paper.dapo.loss_normalizer, paper.dapo.dual_clip, paper.optim.warmup_steps) == (
        "group-token-mean",
        None,
        20,
    )
    assert (verl.dapo.loss_normalizer, verl.dapo.dual_clip, verl.optim.warmup_steps) == (
        "token-mean",
        10.0,
        10,
    )
    for c in (paper, verl):
        assert (
            c.optim.weight_decay,
            c.optim.grad_clip,
            c.dapo.advantage_ddof,
            c.dapo.advantage_eps,
        ) == (0.1, 1.0, 1, 1e-6)
    own = load("preset: verl\ndapo: {dual_clip: 3}\n")
    assert (own.dapo.dual_clip, own.optim.warmup_steps) == (3.0, 10)  # the file's own keys win


@pytest.mark.parametrize(
    "text, value",
    [("1e-6", 1e-6), ("1E-6", 1e-6), (".5", 0.5), ("2", 2.0), ("0.", 0.0), ("1_000", None)],
)
def test_numbers(load, text, value):
    if value is None:
        with refusal(f"...optim.learning_rate: ...{text}", ConfigError):
            load(f"optim: {{learning_rate: {text}}}\n")
    else:
        assert load(f"optim: {{learning_rate: {text}}}\n").optim.learning_rate == value


def test_overrides_win_over_the_file_and_reach_any_depth(load):
    c = load(
        "seed: 1\n",
        [
            "seed=2",
            "model.architecture.layers=7",
            "eval.sets.a=x.jsonl",
            "reward.allowed_modules=[m]",
        ],
    )
    assert (c.seed, c.model.architecture.layers, dict(c.eval.sets), c.reward.allowed_modules) == (
        2,
        7,
        {"a": EvalSet("x.jsonl")},
        ("m",),
    )


SETS = """
eval: {every: 0, sets: {old: {path: old.jsonl, columns: {prompt: q}}}}
data: {train: [gsm8k.jsonl, {path: own.jsonl, weight: 3, columns: {prompt: q, answer: a}}]}
"""
GSM8K, OWN, OLD = (
    TrainSet("gsm8k.jsonl"),
    TrainSet("own.jsonl", ColumnsConfig("q", "a"), 3.0),
    EvalSet("old.jsonl", ColumnsConfig("q")),
)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("data.train=other.jsonl", [TrainSet("other.jsonl")]),
        (
            "data.train=[other.jsonl, {path: own.jsonl, weight: 2}]",
            [TrainSet("other.jsonl"), TrainSet("own.jsonl", weight=2.0)],
        ),
        ("data={train: [{path: other.jsonl}]}", [TrainSet("other.jsonl")]),
        ("data.train.0.weight=2", [TrainSet("gsm8k.jsonl", weight=2.0), OWN]),
        ("data.train.0.columns.prompt=p", [TrainSet("gsm8k.jsonl", ColumnsConfig("p")), OWN]),
        (
            "data.train.1.columns.answer=b",
            [GSM8K, TrainSet("own.jsonl", ColumnsConfig("q", "b"), 3.0)],
        ),
        ("data.train.1=../a.b/own.jsonl", [GSM8K, TrainSet("../a.b/own.jsonl")]),
        ("data.train.2=more.jsonl", [GSM8K, OWN, TrainSet("more.jsonl")]),
        ("eval.sets={aime: a.jsonl}", {"aime": EvalSet("a.jsonl")}),
        ("eval={sets: {aime: a.jsonl}}", {"aime": EvalSet("a.jsonl")}),
        ("eval.sets.aime=a.jsonl", {"old": OLD, "aime": EvalSet("a.jsonl")}),
        ("eval.sets.old=new.jsonl", {"old": EvalSet("new.jsonl")}),
        ("eval.sets.old={path: new.jsonl}", {"old": EvalSet("new.jsonl")}),
        ("eval.sets.old.columns.answer=b", {"old": EvalSet("old.jsonl", ColumnsConfig("q", "b"))}),
        ("eval.sets.old.path=new.jsonl", {"old": EvalSet("new.jsonl", ColumnsConfig("q"))}),
    ],
)
def test_an_override_replaces_data_sets_or_sets_a_part_of_one(load, override, expected):
    c = load(SETS, [override], MINIMAL.replace("eval: {every: 0}", ""))
    assert (dict(c.eval.sets) if isinstance(expected, dict) else list(c.data.train)) == expected
    assert c.eval.every == 0 and c.data.arithmetic == Config().data.arithmetic


def test_parts_of_a_single_data_set_can_be_set(load):
    c = load(
        "data: {train: a.jsonl}\n",
        ["data.train.0.columns.prompt=q", "data.train.1=b.jsonl", "data.train.1.weight=2"],
    )
    assert c.data.train == (
        TrainSet("a.jsonl", ColumnsConfig("q")),
        TrainSet("b.jsonl", weight=2.0),
    )


def test_an_override_is_merged_into_a_section(load):
    c = load(
        "dapo: {dual_clip: 3}\n",
        ["dapo={clip_eps_high: 0.3}", "model.lora={rank: 4}", "model.lora={alpha: 8}"],
    )
    assert (c.dapo.dual_clip, c.dapo.clip_eps_high, c.model.lora.rank, c.model.lora.alpha) == (
        3,
        0.3,
        4,
        8,
    )


# What a message names: a key, often with the wrong value or the limit.
BAD = {
    "unknown key, nearest match": (
        "dapo: {clip_eps_hi: 1}\n",
        "dapo.clip_eps_hi: ...'clip_eps_high'",
    ),
    "unknown section": ("dappo: {}\n", "dappo: ...'dapo'"),
    "far from any key": ("zzz: 1\n", "zzz: ...preset"),
    "duplicate key": ("seed: 1\nseed: 2\n", "c.yaml:5: ...'seed'"),
    "duplicate nested": ("dapo: {dual_clip: 2, dual_clip: 3}\n", "c.yaml:4: ...'dual_clip'"),
    "octal": ("seed: 010\n", "seed: ...'010'"),
    "base 60": ("seed: 1:30\n", "seed: ...'1:30'"),
    "yes is text": ("dapo: {dynamic_sampling: yes}\n", "dapo.dynamic_sampling: ...'yes'"),
    "bool for int": ("seed: true\n", "seed: ...integer...True"),
    "float for int": ("seed: 1.0\n", "seed: ...integer...1.0"),
    "nan": ("optim: {learning_rate: .nan}\n", "optim.learning_rate: ...nan"),
    "inf": ("optim: {learning_rate: .inf}\n", "optim.learning_rate: ...inf"),
    "huge int": ("seed: 99999999999999999999\n", "seed: ...99999999999999999999"),
    "int that overflows float": (
        "optim: {learning_rate: 1" + "0" * 400 + "}\n",
        "optim.learning_rate: ",
    ),
    "python tag": ("seed: !!python/object/apply:os.system [ls]\n", "c.yaml:4: ...python/object"),
    "alias bomb": ("a: &a [1]\nb: [*a, *a]\n", "c.yaml:5: ...aliases"),
    "merge key": ("a: &a {}\nb: {<<: *a}\n", "c.yaml:5: ...aliases"),
    "deep nesting": ("seed: " + "[" * 100 + "]" * 100 + "\n", "c.yaml:4: ...nested"),
    "very deep nesting": ("seed: " + "[" * 30000, "c.yaml"),
    "tabs": ("seed:\n\t1\n", "c.yaml:"),
    "not yaml": ("}{\n", "c.yaml"),
    "list for mapping": ("dapo: [1]\n", "dapo: ...[1]"),
    "null section": ("dapo:\n", "dapo: ...null"),
    "NUL": ('data: {train: "a\\0b"}\n', "data.train: ...NUL"),
    "number for key": ("1: 2\n", "c.yaml:4: key 1 "),
    "bool for key": ("True: 2\n", "c.yaml:4: key True "),
    "list for key": ("? [seed, 1]\n: 2\n", "c.yaml:4: ...sequence"),
    "wrong literal": (
        "reward: {verifier: strictt}\n",
        "reward.verifier: ...'strict', 'lenient' or 'custom'",
    ),
    "G = 1": ("dapo: {responses_per_prompt: 1}\n", "dapo.responses_per_prompt: ...2, got 1"),
    "update splits groups": (
        "dapo: {responses_per_update: 100}\n",
        "dapo.responses_per_update: 100 ...responses_per_prompt 16",
    ),
    "update does not divide": (
        "dapo: {responses_per_update: 336}\n",
        "dapo.responses_per_update: 336 ...8192",
    ),
    "zero": ("rollout: {decode_slots: 0}\n", "rollout.decode_slots: ...1, got 0"),
    "negative": ("optim: {weight_decay: -1}\n", "optim.weight_decay: ...0, got -1"),
    "save interval 0": ("train: {save_every: 0}\n", "train.save_every: ...1, got 0"),
    "eps_low": ("dapo: {clip_eps_low: 1.2}\n", "dapo.clip_eps_low: ...0 and ...1, got 1.2"),
    "eps_high": ("dapo: {clip_eps_high: -0.1}\n", "dapo.clip_eps_high: ...0, got -0.1"),
    "importance cap": ("dapo: {importance_cap: 1.2}\n", "dapo.importance_cap: ...1.28"),
    "a mask that removes every exact token": (
        "dapo: {token_mask: [1.1, 2]}\n",
        "dapo.token_mask: ...0 < a < 1 < b...[1.1, 2.0]",
    ),
    "a mask with a bound at 0": (
        "dapo: {sequence_mask: [0, 2]}\n",
        "dapo.sequence_mask: ...0 < a < 1 < b...[0.0, 2.0]",
    ),
    "a mask of one bound": ("dapo: {token_mask: [0.5]}\n", "dapo.token_mask"),
    "veto": ("dapo: {sequence_veto: 1}\n", "dapo.sequence_veto: ...0 and ...1, got 1"),
    "a cap above the mask": (
        "dapo: {importance_cap: 3, token_mask: [0.5, 2]}\n",
        "dapo.importance_cap: ...token_mask...2",
    ),
    "a mask of responses by the sampler's own log-probs": (
        "dapo: {old_logprobs: sampler, sequence_mask: [0.9, 1.1]}\n",
        "dapo.sequence_mask: ...dapo.old_logprobs: recompute",
    ),
    "a veto by the sampler's own log-probs": (
        "dapo: {old_logprobs: sampler, sequence_veto: 1.0e-4}\n",
        "dapo.sequence_veto: ...dapo.old_logprobs: recompute",
    ),
    "cispo with dual clip": (
        "dapo: {objective: cispo, dual_clip: 10}\n",
        "dapo.dual_clip: ...dapo.objective: dapo",
    ),
    "cispo with a cap of the same ratio": (
        "dapo: {objective: cispo, importance_cap: 2, old_logprobs: sampler}\n",
        "dapo.importance_cap: ...cispo",
    ),
    "a constant length of a mean over tokens": (
        "dapo: {loss_length: 100}\n",
        "dapo.loss_length: ...dapo.loss_normalizer: seq-mean-token-sum",
    ),
    "dual clip": ("dapo: {dual_clip: 1}\n", "dapo.dual_clip: ...1, got 1"),
    "ddof": ("dapo: {advantage_ddof: 16}\n", "dapo.advantage_ddof: ...responses_per_prompt 16"),
    "top_p": ("rollout: {top_p: 0}\n", "rollout.top_p: ...0 and ...1, got 0"),
    "a removed date": (
        "data: {chat_date: '2024-07-26'}\n",
        "data.chat_date: was removed: ...2024-07-26",
    ),
    "a removed permission": (
        "reward: {allow_change: true}\n",
        "reward.allow_change: was removed; ...--allow-change reward.function",
    ),
    "temperature": ("rollout: {temperature: 0}\n", "rollout.temperature: ...0, got 0"),
    "buffer": (
        "reward: {overlong_buffer_len: 30000}\n",
        "reward.overlong_buffer_len: ...rollout.max_response_len 20480",
    ),
    "context": (
        "rollout: {max_response_len: 40000}\n",
        "rollout.max_response_len: ...2048 ...40000 ...40960",
    ),
    "row": ("train: {row_len: 100}\n", "train.row_len: 100 ...22528"),
    "mesh": ("mesh: {data: -1}\n", "mesh: ...-1"),
    "template": ("data: {template: hello}\n", "data.template: ...{prompt}"),
    "function without custom": (
        "reward: {function: 'a:b'}\n",
        "reward.function: ...verifier: custom",
    ),
    "function not allowed": (
        "reward: {verifier: custom, function: 'os:system'}\n",
        "reward.function: ...'os' ...reward.allowed_modules",
    ),
    "folder and architecture": ("", "model.folder: ", ["model.folder=x"]),
    "no such override": ("", "optim.lr: ", ["optim.lr=1"]),
    "override without =": ("", "--set seed: ...section.key=value", ["seed"]),
    "an index beyond the list": (
        "",
        "--set data.train.1.weight: ...0 to 0, got 1",
        ["data.train=[]", "data.train.1.weight=2"],
    ),
    "a name in a list": (
        "",
        "--set data.train.own.jsonl: ...0 to 2, got own",
        ["data.train=[a, b]", "data.train.own.jsonl=2"],
    ),
    "deep override": ("", "--set a.a...section.key=value", ["a" + ".a" * 20000 + "=1"]),
    "two documents": ("\n---\na: 1\n", "c.yaml:5: ...document"),
    "override of a scalar's inside": ("", "seed: ...integer", ["seed.a=1"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_get_one_clear_line(load, case):
    text, expected, *overrides = BAD[case]
    with refusal(f"...{expected}", ConfigError):
        load(text, *overrides)


@pytest.mark.parametrize(
    "content", [b"", b"# nothing\n", b"- 1\n", b"text", b"\xff\xfe\x00", b"a" * 2_000_000]
)
def test_files_that_hold_no_mapping(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with refusal(f"{path}: ", ConfigError):
        load_config(path)


@pytest.mark.parametrize("path", ["missing.yaml", ".", "a\0b"])
def test_files_that_cannot_be_read(path):
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(path)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.sampled_from(["dapo", "model", "seed", "eval", "sets", "a"]) | st.text(max_size=3)
TREES = st.recursive(
    SCALARS, lambda leaf: st.lists(leaf, max_size=3) | st.dictionaries(KEYS, leaf, max_size=3)
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.binary(), TREES.map(yaml.dump)))
def test_no_file_raises_anything_but_its_own_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    try:
        assert isinstance(load_config(path), Config)
    except ConfigError as e:
        assert "\n" not in str(e)


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "false", "False", "FALSE"])
def test_booleans_are_those_of_yaml_1_2(load, word):
    """The core schema, https://yaml.org/spec/1.2.2/#1032-tag-resolution"""
    value = load(f"dapo: {{dynamic_sampling: {word}}}\n").dapo.dynamic_sampling
    assert value is (word.lower() == "true")


@pytest.mark.parametrize("word", ["null", "Null", "NULL", "~", ""])
def test_nulls_are_those_of_yaml_1_2(load, word):
    assert load(f"preset: paper\ndapo: {{dual_clip: {word}}}\n").dapo.dual_clip is None
    assert load(overrides=["preset=verl", f"dapo.dual_clip={word}"]).dapo.dual_clip is None


@pytest.mark.parametrize("word", ["TrUE", "nUll", "yes", "none", "True", "NULL", "12"])
def test_text_that_could_be_another_scalar_is_dumped_as_text(load, word, tmp_path):
    c = load(overrides=[f"eval.sets={{a: '{word}'}}"])
    (tmp_path / "d.yaml").write_text(dump_yaml(c))
    assert load_config(tmp_path / "d.yaml").eval.sets["a"].path == word


def test_a_dumped_config_loads_equal(load, tmp_path):
    c = load(
        "preset: verl\ndata: {template: 'a: {prompt}\n\n010 yes 1e5 #'}\n",
        ["eval.sets.a=b", "optim.learning_rate=1e-7"],
    )
    (tmp_path / "d.yaml").write_text(dump_yaml(c))
    assert load_config(tmp_path / "d.yaml") == c


@pytest.mark.parametrize(
    "key, value",
    [("compute_dtype", "float32"), ("remat", "none"), ("attention_block", "512"), ("lora", "null")],
)
def test_how_to_compute_is_no_part_of_an_architecture_not_even_as_it_would_be_anyway(
    load, key, value
):
    with refusal(f"...model.architecture.{key}: ...model.{key} ", ConfigError):
        load(overrides=[f"model.architecture.{key}={value}"])
    assert key not in to_dict(load(overrides=[f"model.{key}={value}"]))["model"]["architecture"]


def test_a_cap_below_a_steps_groups_is_refused_where_no_step_could_then_be_made(load):
    cap = ["dapo.prompts_per_step=32", "dapo.prompts_per_draw=3", "dapo.max_generation_batches=10"]
    for carried in ("false", "true"):  # surplus and open groups were drawn by some step, too
        with refusal(
            "...dapo.max_generation_batches: 10 x ...3 = 30 ...prompts_per_step 32", ConfigError
        ):
            load(
                overrides=[
                    *cap,
                    f"dapo.carry_surplus={carried}",
                    f"dapo.partial_rollouts={carried}",
                ]
            )
    for legitimate in (
        "dapo.on_cap=train",
        "dapo.dynamic_sampling=false",
        "dapo.max_generation_batches=11",
    ):
        load(overrides=[*cap, legitimate])


def test_every_field_is_described():
    text = "\n".join(describe())
    fields = [
        f.name
        for cls in vars(config_module).values()
        if dataclasses.is_dataclass(cls)
        for f in dataclasses.fields(cls)
    ]
    assert len(fields) > 80
    for field in fields:
        line = next(line for line in text.splitlines() if line.lstrip(" #").startswith(f"{field}:"))
        assert len(line.partition("# ")[2]) > 0 and line.split("# ")[-1].strip()


def test_config_from_dict_names_its_source():
    with refusal("here: seed", ConfigError):
        config_from_dict({"seed": "x"}, "here")
