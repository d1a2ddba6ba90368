"""LoRA: the base model at first, gradients against whole matrices, frozen weights that stay, one
model in every form it takes.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from refusals import line_of, names, refusal
from runs import steady, verb

from dapo_jax import evaluate, export, supervised, train
from dapo_jax.config import (
    ConfigError,
    DapoSection,
    LoraConfig,
    MeshSection,
    ModelConfig,
    OptimSection,
    config_from_dict,
    load_config,
)
from dapo_jax.dapo.loss import loss_fn
from dapo_jax.dapo.packing import build_batch
from dapo_jax.dapo.update import accumulate, init_state, make_optimizer, update_step
from dapo_jax.data.prompts import byte_tokenizer
from dapo_jax.model import flops
from dapo_jax.model.decoder import abstract_params, apply, init
from dapo_jax.model.lora import join, merge, split
from dapo_jax.model.weights import load_pretrained, save_pretrained
from dapo_jax.restore import restore_params
from dapo_jax.runtime.files import run_folder
from dapo_jax.runtime.mesh import make_mesh, params_sharding, put, put_rows
from dapo_jax.training.programs import train_programs
from dapo_jax.training.setup import Policy, load_params, load_policy

LORA = LoraConfig(rank=3, alpha=6.0)
BASE = tiny.model("qwen2", tie_embeddings=False)
MODEL = dataclasses.replace(BASE, lora=LORA)
ITEMS = tiny.make_items(BASE, 12)
ONE = make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])
OPTIMIZER = make_optimizer(OptimSection())
PROJECTIONS = [
    ("attn", "q"),
    ("attn", "k"),
    ("attn", "v"),
    ("attn", "o"),
    ("mlp", "gate"),
    ("mlp", "up"),
    ("mlp", "down"),
]
QUICKLY = {"xla_backend_optimization_level": 0}  # compiles in half the time
logits = jax.jit(apply, static_argnums=1)


def trained_params(model, scale=0.1):
    """The base weights of `tiny.params`, and adapters whose B is no longer zero."""
    rng, base = np.random.default_rng(1), dataclasses.replace(model, lora=None)
    adapters = split(abstract_params(model), model.lora)[0]
    return join(
        jax.tree.map(
            lambda a: jnp.asarray(scale * rng.normal(size=a.shape), jnp.float32), adapters
        ),
        tiny.params(base),
    )


def by_hand(params, lora):
    """The base model's tree with W + (α / r) A B, each layer's product of whole matrices in float64
    numpy.
    """
    frozen = jax.tree.map(np.asarray, split(params, lora)[1])
    for part, name in PROJECTIONS:
        projection = params["layers"][part][name]
        if "adapter" not in projection:
            continue
        a, b = (np.asarray(projection["adapter"][key], np.float64) for key in "ab")
        kernel = frozen["layers"][part][name]["kernel"]
        product = np.stack(
            [x.reshape(-1, lora.rank) @ y.reshape(lora.rank, -1) for x, y in zip(a, b, strict=True)]
        )
        frozen["layers"][part][name]["kernel"] = (
            kernel + lora.alpha / lora.rank * product.reshape(kernel.shape)
        ).astype(np.float32)
    return frozen


def equal(a, b) -> bool:
    """Bit for bit, dtypes included."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.all(same)


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, dtype", [("llama", "float32"), ("qwen2", "bfloat16"), ("qwen3", "float32")]
)
def test_new_adapters_leave_the_base_model_bit_for_bit(family, dtype):
    """Also its random weights: those of the same seed without adapters."""
    base = tiny.model(family, model_dim=64, head_dim=16, ffn_dim=96, compute_dtype=dtype)
    model, key = dataclasses.replace(base, lora=LORA), jax.random.key(5)
    params, tokens = init(model, key), np.random.default_rng(0).integers(0, 40, (3, 9))
    adapters, frozen = split(params, LORA)
    assert {a.dtype for a in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert equal(frozen, jax.tree.map(lambda a, f: a.astype(f.dtype), init(base, key), frozen))
    assert (
        frozen["layers"]["attn"]["q"]["kernel"].dtype == dtype
        and frozen["final_norm"]["scale"].dtype == "float32"
    )
    assert np.asarray(adapters["layers"]["attn"]["q"]["adapter"]["a"]).std() == pytest.approx(
        (3 * 64) ** -0.5, rel=0.2
    )
    assert equal(logits(params, model, tokens), logits(init(base, key), base, tokens))


@pytest.mark.parametrize("targets", [LORA.targets, ("q", "v"), ("down",)], ids="-".join)
def test_logits_are_those_of_the_merged_matrices(targets):
    lora = dataclasses.replace(LORA, targets=targets)
    model = dataclasses.replace(BASE, lora=lora)
    params, tokens = trained_params(model), np.random.default_rng(0).integers(0, 40, (3, 9))
    assert {
        name
        for _, name in PROJECTIONS
        if any(name in part for part in split(params, lora)[0]["layers"].values())
    } == set(targets)
    whole = by_hand(params, lora)
    found = logits(params, model, tokens)
    assert tiny.gap(found, logits(whole, BASE, tokens)) < 1e-6
    assert (
        tiny.gap(found, logits(split(params, lora)[1], BASE, tokens)) > 0.05
    )  # the adapters do say something
    assert tiny.gap(merge(params, lora), whole) < 1e-7


def test_what_is_split_is_joined_again():
    params = trained_params(MODEL)
    adapters, frozen = split(params, LORA)
    assert equal(join(adapters, frozen), params) and jax.tree.structure(
        frozen
    ) == jax.tree.structure(tiny.params(BASE))
    assert len(jax.tree.leaves(adapters)) == 2 * 7
    assert split(params, None) == (params, {}) and join(params, {}) == params


# --------------------------------------------------------------------------------------------------------------------
# Gradients and updates
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def slopes_by_hand():
    """Loss and gradient in A and B by the chain rule from ∂loss/∂W' of whole matrices: s ∂W' Bᵀ and
    s Aᵀ ∂W'.
    """
    params = trained_params(MODEL)
    plain = functools.partial(tiny.plain_loss, config=BASE, items=ITEMS)
    loss, slopes = jax.jit(jax.value_and_grad(plain))(by_hand(params, LORA))
    s, r, found = LORA.alpha / LORA.rank, LORA.rank, {}
    for part, name in PROJECTIONS:
        a, b = (
            np.asarray(params["layers"][part][name]["adapter"][key], np.float64) for key in "ab"
        )
        slope = np.asarray(slopes["layers"][part][name]["kernel"], np.float64)
        of_layer = [
            (d.reshape(x.size // r, -1), x.reshape(-1, r), y.reshape(r, -1))
            for d, x, y in zip(slope, a, b, strict=True)
        ]
        adapter = {
            "a": np.stack([s * d @ y.T for d, _, y in of_layer]).reshape(a.shape),
            "b": np.stack([s * x.T @ d for d, x, _ in of_layer]).reshape(b.shape),
        }
        found.setdefault(part, {})[name] = {"adapter": adapter}
    return loss, {"layers": found}


@pytest.mark.default("(2, 2, 2)")
@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_loss_and_gradient_are_those_by_hand_on_any_layout_of_devices(layout):
    """Measured: loss 3e-7, gradient 7e-7 relative."""
    mesh = make_mesh(MeshSection(*layout), jax.devices()[: int(np.prod(layout))])
    batch, _ = build_batch(ITEMS, row_len=13, rows_per_microbatch=8, microbatches=2)
    loss_of = functools.partial(loss_fn, model=MODEL, algo=DapoSection(), chunk_size=8, mesh=mesh)
    params = trained_params(MODEL)
    sharding = params_sharding(params, mesh)
    params = jax.tree.map(lambda p, s: put(np.asarray(p), s), params, sharding)

    def slopes(params, batch):
        adapters, frozen = split(params, LORA)
        return accumulate(adapters, batch, lambda p, b: loss_of(join(p, frozen), b))

    run = jax.jit(slopes, out_shardings=(None, None, split(sharding, LORA)[0]))
    rows = put_rows(batch, mesh, axis=1)
    loss, _, grads = run.lower(params, rows).compile(QUICKLY)(params, rows)
    expected, by_chain_rule = slopes_by_hand()
    assert tiny.gap(loss, expected) < 1e-6 and tiny.gap(jax.device_get(grads), by_chain_rule) < 2e-6


def batch_of(items):
    return build_batch(items, row_len=13, rows_per_microbatch=4, microbatches=4)[0]


@functools.cache
def update_of(model):
    """The compiled update of (state, batch, rate)."""
    loss = functools.partial(loss_fn, model=model, algo=DapoSection(), chunk_size=16)
    run = jax.jit(
        functools.partial(update_step, loss_fn=loss, optimizer=OPTIMIZER, lora=model.lora)
    )
    state = jax.eval_shape(
        lambda: init_state(init(model, jax.random.key(0)), OPTIMIZER, model.lora)
    )
    return run.lower(state, batch_of(ITEMS), np.float32(0)).compile(QUICKLY)


def test_an_update_trains_adapters_alone():
    """The optimizer holds moments of nothing else, weight decay touches nothing else, and the first
    Adam step is ± the rate.
    """
    params = trained_params(MODEL)
    state = init_state(params, OPTIMIZER, LORA)
    adapters = split(params, LORA)[0]
    assert (
        sum(a.size for a in jax.tree.leaves(state.opt_state))
        == 2 * sum(a.size for a in jax.tree.leaves(adapters)) + 1
    )
    after, metrics = update_of(MODEL)(state, batch_of(ITEMS), np.float32(0.01))
    assert metrics["skipped"] == 0 and equal(split(after.params, LORA)[1], split(params, LORA)[1])
    _, slopes = slopes_by_hand()

    def expected(
        p, g
    ):  # decay 0.1; epsilon is far below the clipped gradient wherever this is compared
        return np.where(np.abs(g) > 1e-4, p - 0.01 * (np.sign(g) + 0.1 * np.asarray(p)), np.nan)

    for new, p, g in zip(
        *map(jax.tree.leaves, (split(after.params, LORA)[0], adapters, slopes)), strict=True
    ):
        wanted = expected(p, g)
        compared = np.isfinite(wanted)
        assert compared.mean() > 0.5
        np.testing.assert_allclose(np.asarray(new)[compared], wanted[compared], rtol=0, atol=2e-5)


def test_an_update_that_is_not_finite_changes_nothing():
    state = init_state(trained_params(MODEL), OPTIMIZER, LORA)
    bad = [item._replace(advantage=float("nan")) for item in ITEMS]
    after, metrics = update_of(MODEL)(state, batch_of(bad), np.float32(0.01))
    assert metrics["skipped"] == 1 and equal(after, state)


def test_a_run_of_rank_0_is_the_base_model():
    model = dataclasses.replace(BASE, lora=LoraConfig(rank=0))
    params = tiny.params(BASE)
    assert jax.tree.structure(abstract_params(model)) == jax.tree.structure(params)
    tokens = np.random.default_rng(0).integers(0, 40, (3, 9))
    state = init_state(params, OPTIMIZER, model.lora)
    after, metrics = update_of(model)(state, batch_of(ITEMS), np.float32(0.01))
    assert metrics["grad_norm"] == 0 and metrics["skipped"] == 0 and after.updates == 1
    assert equal(after.params, params) and equal(merge(params, model.lora), params)
    assert equal(logits(params, model, tokens), logits(params, BASE, tokens))
    whole, metrics_of_all = update_of(BASE)(
        init_state(params, OPTIMIZER), batch_of(ITEMS), np.float32(0)
    )
    assert (
        metrics["loss"] == pytest.approx(float(metrics_of_all["loss"]), rel=1e-6)
        and metrics_of_all["grad_norm"] > 0
    )


@pytest.mark.slow
def test_frozen_weights_cost_neither_moments_nor_gradients():
    """Bytes by hand; FLOPs by the compiler, which counts a loop's body once: a third of a whole
    update's matmuls are gone.
    """
    wide = {"model_dim": 64, "head_dim": 16, "ffn_dim": 128, "vocab_size": 64}
    base = tiny.model("qwen3", compute_dtype="bfloat16", **wide)
    configs = [
        config_from_dict({"model": {"architecture": {}, "lora": lora}, "eval": {"every": 0}})
        for lora in (None, {"rank": 2})
    ]
    state = programs_of(configs[1], base, ONE).state
    adapters = 2 * 2 * (64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 128))  # rank 2, 2 layers
    model = dataclasses.replace(base, lora=configs[1].model.lora)
    assert flops.adapter_weights(model) == adapters
    norms = 64 + 2 * (2 * 64 + 2 * 16)
    sizes = [
        sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(part))
        for part in (state.params, state.opt_state)
    ]
    assert sizes == [2 * flops.weights(base) + 4 * norms + 4 * adapters, 8 * adapters + 4]

    plain = dataclasses.replace(base, compute_dtype="float32")
    of_adapters, of_all = (
        update_of(m).cost_analysis()["flops"]
        for m in (dataclasses.replace(plain, lora=model.lora), plain)
    )
    assert of_adapters < 0.75 * of_all


def test_flops_by_hand():
    """Frozen weights take a forward pass and a gradient in their inputs, adapters and attention one
    more.
    """
    model = dataclasses.replace(BASE, lora=LoraConfig(rank=2, targets=("q", "down")))
    adapters = 2 * 2 * ((16 + 32) + (24 + 16))
    assert flops.adapter_weights(model) == adapters and flops.adapter_weights(BASE) == 0
    frozen = 2 * (7 * flops.layer_weights(BASE) + 2 * flops.head_weights(BASE))
    others = 2 * 7 * adapters + 4 * 2 * 4 * 8 * 5
    assert flops.forward_flops(model, 7, 5, 2) == frozen + others
    assert flops.train_flops(model, 7, 5, 2) == 2 * frozen + 3 * others


# --------------------------------------------------------------------------------------------------------------------
# Weights in and out
# --------------------------------------------------------------------------------------------------------------------


def programs_of(config, base, mesh):
    model = dataclasses.replace(base, lora=config.model.lora)
    return train_programs(model, mesh, config.dapo, config.optim, config.rollout.temperature)


def test_rollouts_get_merged_weights():
    """Cast from float32: not rounded before the product is added."""
    mesh, model = (
        make_mesh(MeshSection(2, 2, 2)),
        dataclasses.replace(MODEL, compute_dtype="bfloat16"),
    )
    config = config_from_dict(
        {"model": {"architecture": {}, "lora": {"rank": 3, "alpha": 6}}, "eval": {"every": 0}}
    )
    programs = programs_of(config, dataclasses.replace(BASE, compute_dtype="bfloat16"), mesh)
    params = trained_params(model, scale=0.02)
    params = jax.tree.map(
        lambda p, a: put(np.asarray(p).astype(a.dtype), a.sharding), params, programs.state.params
    )
    published = jax.device_get(programs.publish(params))
    expected = jax.tree.map(
        lambda a, leaf: a.astype(leaf.dtype), by_hand(jax.device_get(params), LORA), published
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(published)} == {
        jnp.dtype("float32"),
        jnp.dtype("bfloat16"),
    }  # norms, all others
    assert jax.tree.structure(published) == jax.tree.structure(expected)
    assert (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: np.mean(a != b), published, expected))) < 0.01
    )  # ties of rounding
    assert tiny.gap(published, expected) < 1e-3


def test_a_folder_is_loaded_frozen(tmp_path):
    save_pretrained(tmp_path / "m", BASE, tiny.params(BASE))
    config = config_from_dict(
        {"model": {"folder": str(tmp_path / "m"), "lora": {"rank": 3}}, "eval": {"every": 0}}
    )
    policy = Policy(
        dataclasses.replace(BASE, compute_dtype="bfloat16"),
        None,
        (0,),
        config.model.folder,
        config.model.folder,
    )
    params = load_params(config, policy, ONE, lora=config.model.lora)
    adapters, frozen = split(params, LORA)
    stored = abstract_params(dataclasses.replace(policy.model, lora=config.model.lora))
    assert equal(
        frozen,
        jax.tree.map(lambda a, s: a.astype(s.dtype), tiny.params(BASE), split(stored, LORA)[1]),
    )
    assert frozen["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert all(
        (np.asarray(a) == 0).all() == (path[-1].key == "b")
        for path, a in jax.tree_util.tree_leaves_with_path(adapters)
    )


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"rank": -1}, "model.lora.rank: ...0, got -1"),
        ({"alpha": 0}, "model.lora.alpha: ...0, got 0"),
        (
            {"targets": ["q", "w"]},
            "model.lora.targets.1: ...'q', 'k', 'v', 'o', 'gate', 'up' or 'down', got 'w'",
        ),
        ({"targets": []}, "model.lora.targets: "),
        ({"targets": ["q", "q"]}, "model.lora.targets: ...once"),
        ({"ranks": 3}, "model.lora.ranks: ...'rank'"),
    ],
)
def test_bad_adapters_are_refused(change, complaint):
    with refusal(f"...{complaint}", ConfigError):
        config_from_dict({"model": {"architecture": {}, "lora": change}, "eval": {"every": 0}})


def test_adapters_are_no_part_of_an_architecture():
    with refusal("...model.architecture.lora: ...model.lora ", ConfigError):
        config_from_dict({"model": {"architecture": {"lora": {}}}, "eval": {"every": 0}})


# Sizes are those of all runs, which share the programs of sampling.
CHANGES = {
    "  architecture": "  folder: FOLDER\n  lora: {rank: 2, alpha: 8}",
    "reward": "reward: {overlong_buffer_len: 10}",
    "dapo": "dapo: {prompts_per_step: 6, responses_per_prompt: 4, responses_per_update: 12, prompts_per_draw: 6, dynamic_sampling: false}",
    "optim": "optim: {learning_rate: 1e-2, warmup_steps: 0}",
    "train": "train: {steps: 2, rows_per_microbatch: 8, save_every: 1}",
}
CONFIG = "".join(
    CHANGES.get(line.partition(":")[0], line) + "\n" for line in runs.CONFIG.splitlines()
).replace("every: 2", "every: 0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A config and a run of 2 steps."""
    folder = tmp_path_factory.mktemp("lora")
    config = folder / "lora.yaml"
    model = ModelConfig(
        vocab_size=258,
        model_dim=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        ffn_dim=32,
        max_position=64,
    )
    save_pretrained(
        folder / "start",
        model,
        jax.jit(init, static_argnums=0)(model, jax.random.key(0)),
        tokenizer=byte_tokenizer(),
    )
    config.write_text(CONFIG.replace("FOLDER", str(folder / "start")))
    whole = folder / "whole"
    assert verb(train, "--config", config, "--run-dir", whole) == 0
    return config, whole


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(finished, tmp_path):
    config, whole = finished
    resumed = tmp_path / "resumed"
    for steps in ("train.steps=1", "train.steps=2"):
        assert verb(train, "--config", config, "--run-dir", resumed, "--set", steps) == 0

    def leaves(run):
        return json.loads((run / "checkpoints" / "2" / "host" / "metadata").read_text())["leaves"]

    assert steady(whole) == steady(resumed) and leaves(whole) == leaves(resumed)
    assert {name.split("/")[-1] for name in leaves(whole)["optimizer"]} == {
        "a",
        "b",
        "count",
        "updates",
    }


def test_other_adapters_are_another_run(finished, capsys):
    config, whole = finished
    for change in (
        "model.lora=null",
        "model.lora.rank=4",
        "model.lora.alpha=4",
        "model.lora.targets=[q]",
    ):
        assert verb(train, "--config", config, "--run-dir", whole, "--set", change) == 2
        assert names(line_of(capsys)[0], "model.lora")


def test_a_run_is_not_asked_for_fewer_steps_than_it_has_done(finished, capsys):
    config, whole = finished
    assert verb(train, "--config", config, "--run-dir", whole, "--set", "train.steps=1") == 2
    assert names(line_of(capsys)[0], f"train.steps: ...1, ...{whole} ...2 steps...--run-dir")
    assert load_config(whole / "config.yaml").train.steps == 2


@pytest.mark.parametrize("module, place", [(train, "--run-dir"), (supervised, "--out")])
def test_adapters_on_random_weights_are_refused(tmp_path, capsys, module, place):
    (tmp_path / "c.yaml").write_text(CONFIG)
    architecture = "model.architecture={vocab_size: 258, max_position: 64}"
    overrides = ("--set", "model.folder=null", "--set", architecture)
    assert verb(module, "--config", tmp_path / "c.yaml", place, tmp_path / "out", *overrides) == 2
    assert names(line_of(capsys)[0], "model.lora: ...model.architecture ...model.folder")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    assert verb(export, "--run-dir", finished[1], "--out", folder) == 0
    return folder


def test_the_exported_folder_is_the_adapted_model(finished, exported):
    config, whole = finished
    architecture, params = load_pretrained(exported)
    policy, tokens = (
        load_policy(load_config(config)),
        np.random.default_rng(0).integers(0, 258, (3, 9)),
    )
    assert architecture == dataclasses.replace(
        policy.model, compute_dtype=architecture.compute_dtype, remat=architecture.remat
    )
    model = dataclasses.replace(policy.model, lora=load_config(config).model.lora)
    start = jax.jit(init, static_argnums=0)(model, jax.random.key(0))
    trained = saved_params(whole, model)
    assert equal(split(trained, model.lora)[1], split(start, model.lora)[1]), (
        "frozen weights are those of the start"
    )
    found = logits(params, policy.model, tokens)
    assert (
        tiny.gap(found, logits(trained, model, tokens))
        < 1e-6
        < 1e-3
        < tiny.gap(found, logits(start, model, tokens))
    )
    step, restored = restore_params(run_folder(str(whole)), policy, ONE)
    assert step == 2 and tiny.gap(restored, params) < 1e-7


def saved_params(run, model):
    """The adapters and frozen weights of a run's last checkpoint."""
    from dapo_jax.runtime.checkpoint import restore_params as restore

    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), abstract_params(model))
    return restore(run / "checkpoints", target)[1]


def test_run_and_exported_folder_evaluate_alike(finished, exported, tmp_path):
    """With another alpha in the config, too: a run's adapters are those of its own config."""
    config, whole = finished
    common = ["--config", config, "--set", "model.lora.alpha=1"]
    assert verb(evaluate, *common, "--run-dir", whole, "--samples", tmp_path / "run.jsonl") == 0
    assert verb(evaluate, *common, "--model", exported, "--samples", tmp_path / "folder.jsonl") == 0
    assert (tmp_path / "run.jsonl").read_text() == (tmp_path / "folder.jsonl").read_text()


def test_supervised_warm_up_writes_a_merged_folder(finished, tmp_path):
    assert verb(supervised, "--config", finished[0], "--out", tmp_path / "warm") == 0
    architecture, params = load_pretrained(tmp_path / "warm")
    start = jax.jit(init, static_argnums=0)(
        dataclasses.replace(architecture, compute_dtype="float32"), jax.random.key(0)
    )
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), params, start)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): m
        for path, m in jax.tree_util.tree_leaves_with_path(moved)
    }
    assert {name for name, m in flat.items() if m} == {
        f"layers/{part}/{name}/kernel" for part, name in PROJECTIONS
    }
