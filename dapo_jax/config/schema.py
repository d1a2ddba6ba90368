"""The options of a run: frozen dataclasses, each field with default, meaning and bounds.

Defaults are the paper's recipe (arXiv 2503.14476).
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

DAPO_TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    '{prompt}\n\nRemember to put your answer on its own line after "Answer:".'
)
STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # how pydantic reads a tree


def field(default: Any, description: str, **bounds: Any) -> Any:
    """A field with its default and meaning; `bounds` are pydantic's, e.g. ge=1 or lt=1."""
    kind = "default_factory" if callable(default) else "default"
    metadata = {"description": description, **bounds}
    return dataclasses.field(**{kind: default}, metadata=metadata)  # type: ignore[call-overload]


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling of rotary embeddings."""

    factor: float = field(8.0, "by which the context was stretched", ge=1)
    low_freq_factor: float = field(1.0, "longer than original_max_position / this: stretched", gt=0)
    high_freq_factor: float = field(4.0, "shorter than original_max_position / this: kept", gt=0)
    original_max_position: int = field(8192, "context length before stretching, tokens", ge=1)


Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
TARGETS: tuple[Target, ...] = typing.get_args(Target)  # projections that may have an adapter


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: W is frozen, A and B are trained in W + (alpha / rank) A B."""

    rank: int = field(16, "r, inner width of A B; 0 trains nothing", ge=0)
    alpha: float = field(32.0, "A B counts alpha / rank times", gt=0)
    targets: tuple[Target, ...] = field(TARGETS, "projections with adapters", min_length=1)


@dataclass(frozen=True)
class Windows:
    """Sliding-window attention, in all layers but each `every`-th (sliding_window_pattern)."""

    size: int = field(512, "W, tokens that a token attends to: itself and those before it", ge=1)
    every: int = field(6, "layers every, 2 every, ... attend to everything", ge=1)
    rope_theta: float = field(1e4, "base of the rotary frequencies with a window", gt=0)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: in every layer a router sends each token to a few feed-forwards."""

    count: int = field(128, "E, experts of a layer", ge=1, le=256)
    per_token: int = field(8, "experts of a token", ge=1)
    normalize: bool = field(True, "a token's weights sum to 1 (norm_topk_prob)")


Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class Architecture:
    __pydantic_config__ = STRICT
    family: Family = field("qwen3", "qwen2: q/k/v biases; qwen3: q/k norms; see docs/models.md")
    vocab_size: int = field(151936, "V", ge=1)
    model_dim: int = field(1024, "D, width of the residual stream", ge=1)
    layers: int = field(28, "L", ge=1)
    heads: int = field(16, "H, query heads", ge=1)
    kv_heads: int = field(8, "K, key/value heads; divides heads", ge=1)
    head_dim: int = field(128, "width of one head; even", ge=1)
    ffn_dim: int = field(3072, "F, hidden width of the gated feed-forward, or of an expert", ge=1)
    rope_theta: float = field(1e6, "base of the rotary frequencies", gt=0)
    rope_scaling: RopeScaling | None = field(None, "Llama 3.x only")
    rope_factor: float = field(1.0, "Gemma 3: divides positions in layers without a window", ge=1)
    windows: Windows | None = field(None, "Gemma 3 only, and required there")
    query_scalar: int | None = field(None, "Gemma 3: scores / its root; null: head_dim", ge=1)
    norm_eps: float = field(1e-6, "epsilon of the RMS norms", gt=0)
    tie_embeddings: bool = field(True, "the output head is the embedding transposed")
    max_position: int = field(40960, "context limit, prompt and response, tokens", ge=1)
    experts: Experts | None = field(None, "qwen3_moe only, and required there")


@dataclass(frozen=True)
class ModelConfig(Architecture):
    """A decoder and how it computes."""

    compute_dtype: Dtype = field("float32", "of matmuls; master weights are float32")
    remat: Remat = field("none", "backward pass keeps: all, matmul results, block inputs")
    attention_block: int = field(512, "positions in a block of training attention", ge=1)
    lora: LoraConfig | None = field(None, "adapters; null in all but training")


@dataclass(frozen=True)
class ModelSection:
    """Where the policy comes from: a Hugging Face model, or random weights of an architecture."""

    folder: str | None = field(None, "folder, gs://bucket/folder, hub ID or ID@REVISION")
    architecture: Architecture | None = field(None, "instead: random weights, byte tokenizer")
    compute_dtype: Dtype = field("bfloat16", "of matmuls; master weights are float32")
    remat: Remat = field("full", "backward pass keeps: all, matmul results, block inputs")
    attention_block: int = field(512, "positions in a block of training attention", ge=1)
    lora: LoraConfig | None = field(None, "trains adapters only; null trains all weights")


@dataclass(frozen=True)
class ArithmeticConfig:
    """The embedded generator of chained arithmetic, one line per step: solutions vary in length."""

    train_problems: int = field(20000, "distinct training problems", ge=1)
    heldout_problems: int = field(256, "distinct problems for evaluation, none in training", ge=1)
    min_steps: int = field(1, "fewest operations in a problem", ge=1)
    max_steps: int = field(4, "most operations in a problem", ge=1)
    max_operand: int = field(20, "operands are drawn from 1 to this", ge=1)
    mistake_rate: float = field(0.0, "chance of a wrong step in a training solution", ge=0, le=1)
    check_rate: float = field(0.0, "chance that a step is followed by its check", ge=0, le=1)
    seed: int = field(0, "which problems are generated", ge=0)


@dataclass(frozen=True)
class ColumnsConfig:
    """Which columns hold what. `a.b` is field b of column a. null: what has a usual name."""

    __pydantic_config__ = STRICT
    prompt: str | None = field(None, 'text, chat turns, or "{passage} {question}"', pattern=r"\S")
    answer: str | None = field(None, "text or a number", pattern=r"\S")
    solution: str | None = field(None, "text", pattern=r"\S")
    id: str | None = field(None, "text or a number", pattern=r"\S")
    answer_after: str | None = field(
        None, '"####": solution before, answer after it', pattern=r"\S"
    )


@dataclass(frozen=True)
class EvalSet:
    """A data set to evaluate on. A text is short for its path."""

    path: str = field(MISSING, "file, folder or pattern of rows (docs/data.md), or `arithmetic`")
    columns: ColumnsConfig | None = field(None, "if the columns have other names than usual")


@dataclass(frozen=True)
class TrainSet(EvalSet):
    """A data set to train on. A text is short for its path."""

    weight: float = field(1.0, "share of the draws, relative to the other data sets", gt=0)


@dataclass(frozen=True)
class DataSection:
    train: tuple[TrainSet, ...] = field((TrainSet("arithmetic"),), "data sets", min_length=1)
    template: str = field(DAPO_TEMPLATE, "wraps a plain-text problem, which replaces {prompt}")
    chat: bool = field(True, "render through the tokenizer's chat template")
    max_prompt_len: int = field(2048, "tokens; longer prompts are skipped and counted", ge=1)
    arithmetic: ArithmeticConfig = field(ArithmeticConfig(), "the data set `arithmetic`")


@dataclass(frozen=True)
class EvalSection:
    sets: Mapping[str, EvalSet] = field(dict, "data sets by name")
    every: int = field(10, "rollout steps between evaluations; 0: never", ge=0)
    samples_per_problem: int = field(32, "k of avg@k, pass@k, cons@k", ge=1)
    temperature: float = field(1.0, "sampling temperature; 0 is greedy", ge=0)
    top_p: float = field(0.7, "nucleus mass", gt=0, le=1)
    max_problems: int | None = field(None, "use only so many problems of each set, the first", ge=1)


@dataclass(frozen=True)
class RolloutSection:
    max_response_len: int = field(20480, "L_max, generation limit, tokens", ge=1)
    temperature: float = field(1.0, "sampling temperature, also of the loss's log-probs", gt=0)
    top_p: float = field(1.0, "nucleus mass", gt=0, le=1)
    top_k: int = field(0, "sample among the k most probable tokens; 0 is all", ge=0)
    stop_tokens: tuple[str, ...] = field((), "further end tokens, as text")
    decode_slots: int = field(512, "B, sequences decoded at a time, over all devices", ge=1)
    kv_cache: Literal["compute", "int8"] = field("compute", "keys and values; int8: with a scale")
    weights: Literal["compute", "int8"] = field("compute", "kernels of layers, in rollouts")
    cache_tokens: int | None = field(None, "KV cache, over all devices; null: B x S", ge=1)


Verifier = Literal["strict", "lenient", "custom"]


@dataclass(frozen=True)
class RewardSection:
    verifier: Verifier = field("strict", "last `Answer:` line; math-verify; your function")
    function: str | None = field(None, "custom: package.module:name or file.py:name")
    allowed_modules: tuple[str, ...] = field((), "modules and files that `function` may be in")
    environment: tuple[str, ...] = field((), "variables that workers get, e.g. API keys")
    workers: int = field(4, "processes that judge answers (lenient and custom)", ge=1)
    timeout_s: float = field(10.0, "seconds for one answer; then the worker is replaced", gt=0)
    memory_mb: int = field(2048, "address space a worker may add to what it starts with, MB", ge=1)
    max_error_fraction: float = field(0.1, "stop if more have no verdict", ge=0, le=1)
    overlong_penalty: bool = field(True, "soft overlong penalty, added to the score")
    overlong_buffer_len: int = field(4096, "L_cache: penalty 0 to -1 over these tokens", ge=0)


Normalizer = Literal["token-mean", "group-token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


@dataclass(frozen=True)
class DapoSection:
    """The algorithm. Each part can be switched off; with all off it is naive GRPO without KL."""

    prompts_per_step: int = field(512, "N, groups trained on in a rollout step", ge=1)
    responses_per_prompt: int = field(16, "G, responses in a group", ge=2)
    responses_per_update: int = field(512, "mini-batch; whole groups", ge=1)
    clip_eps_low: float = field(0.2, "ratio is clipped below 1 - this", ge=0, lt=1)
    clip_eps_high: float = field(0.28, "ratio is clipped above 1 + this (clip-higher)", ge=0)
    dual_clip: float | None = field(None, "caps the loss of A < 0 at this times |A|", gt=1)
    objective: Literal["dapo", "cispo"] = field("dapo", "cispo: the clipped ratio is a weight")
    loss_normalizer: Normalizer = field(
        "token-mean", "group-token-mean: Eq. 8; seq-mean-token-mean: naive GRPO"
    )
    loss_length: int | None = field(None, "seq-mean-token-sum: divides by it too (Dr. GRPO)", ge=1)
    advantage_scale: Literal["group", "batch", "none"] = field(
        "group", "std that divides rewards: of the group, of all rewards of the step, or none"
    )
    advantage_ddof: int = field(1, "std divides by G - this", ge=0)
    advantage_eps: float = field(1e-6, "added to the std", ge=0)
    dynamic_sampling: bool = field(True, "train only on groups with accuracy neither 0 nor 1")
    prompts_per_draw: int = field(1536, "generation batch: prompts expected to fill a step", ge=1)
    max_generation_batches: int = field(10, "limit of generation batches in a rollout step", ge=1)
    on_cap: Literal["error", "train"] = field("error", "too few groups then: stop, or train")
    carry_surplus: bool = field(True, "use surplus groups next step, with their log-probs")
    partial_rollouts: bool = field(False, "continue unfinished responses in the next step")
    max_policy_age: int | None = field(None, "partial rollouts: steps a token may wait", ge=0)
    overlong_filtering: bool = field(False, "give truncated responses weight 0 in the loss")
    old_logprobs: Literal["recompute", "sampler"] = field(
        "recompute", "pi_old of trainer, or sampler"
    )
    replay_routing: bool = field(
        False, "train with the sampler's experts; 1 byte each, L k a token"
    )
    importance_cap: float | None = field(None, "truncated importance sampling: cap of its weight")
    token_mask: tuple[float, float] | None = field(
        None, "[a, b]: tokens with pi_old / pi_sampler outside get weight 0 (IcePop)"
    )
    sequence_mask: tuple[float, float] | None = field(
        None, "[a, b]: the same of responses, by the geometric mean over their tokens"
    )
    sequence_veto: float | None = field(
        None, "responses with a token of pi_old / pi_sampler below this get weight 0", gt=0, lt=1
    )


@dataclass(frozen=True)
class OptimSection:
    """AdamW with linear warm-up counted in rollout steps, then constant."""

    learning_rate: float = field(1e-6, "after warm-up", ge=0)
    warmup_steps: int = field(20, "rollout steps; rate is min(1, step / this) of the above", ge=0)
    weight_decay: float = field(0.1, "decoupled", ge=0)
    grad_clip: float = field(1.0, "global norm", gt=0)
    b1: float = field(0.9, "decay of the first moment", ge=0, lt=1)
    b2: float = field(0.999, "decay of the second moment", ge=0, lt=1)
    eps: float = field(1e-8, "added to the root of the second moment", gt=0)
    max_nonfinite_updates: int = field(3, "stop after so many skipped in a row", ge=1)
    rollback_steps: int | None = field(None, "steps to roll back instead of stopping", ge=1)


@dataclass(frozen=True)
class SupervisedSection:
    """Cross-entropy warm-up on worked solutions, before RL or by its own verb."""

    updates: int = field(0, "updates of the warm-up; 0: none", ge=0)
    responses_per_update: int = field(128, "solutions in an update", ge=1)
    learning_rate: float = field(1e-3, "after warm-up, then constant", ge=0)
    warmup_updates: int = field(20, "updates of linear warm-up", ge=0)
    save_every: int = field(200, "updates between checkpoints", ge=1)


@dataclass(frozen=True)
class MeshSection:
    """Devices along each axis; one of them may be -1, which takes what is left."""

    data: int = field(1, "replicas", ge=-1)
    fsdp: int = field(-1, "shards of parameters, optimizer state and rows", ge=-1)
    tensor: int = field(1, "shards of heads, feed-forward and vocabulary", ge=-1)
    topology: str | None = field(None, "chips that dapo_jax.plan compiles for, e.g. v5p:4x4x8")


@dataclass(frozen=True)
class TrainSection:
    """Length of the run, shape of the training rows, what is kept."""

    steps: int = field(320, "rollout steps", ge=1)
    row_len: int | None = field(None, "T, tokens of a packed row; null: longest", ge=1)
    rows_per_microbatch: int = field(64, "rows in a forward and backward pass, all devices", ge=1)
    save_every: int = field(10, "rollout steps between checkpoints; also after the last", ge=1)
    save_every_s: float | None = field(None, "also after so many seconds, inside a step too", ge=1)
    keep_checkpoints: int = field(3, "how many of the newest to keep", ge=1)
    keep_best: bool = field(False, "save at every evaluation, keep the one most accurate")
    samples_per_step: int = field(8, "responses written to samples/ each step", ge=0)
    tracker: Literal["wandb", "mlflow"] | None = field(None, "gets the metrics too")
    stall_timeout_s: float | None = field(1800.0, "watchdog: seconds without progress", ge=1)
    profile_start: int | None = field(None, "first rollout step to trace into profile/", ge=1)
    profile_steps: int = field(1, "rollout steps to trace", ge=1)


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = STRICT
    preset: Literal["paper", "verl"] | None = field(None, "values where the recipes differ")
    task: str | None = field(None, "Python file with TEMPLATE and `reward` (docs/tasks.md)")
    seed: int = field(0, "of initial weights, data order and sampling", ge=0)
    model: ModelSection = field(ModelSection(), "the policy")
    data: DataSection = field(DataSection(), "training problems")
    eval: EvalSection = field(EvalSection(), "held-out problems")
    rollout: RolloutSection = field(RolloutSection(), "sampling")
    reward: RewardSection = field(RewardSection(), "verification and overlong penalty")
    dapo: DapoSection = field(DapoSection(), "the algorithm")
    optim: OptimSection = field(OptimSection(), "the optimizer")
    supervised: SupervisedSection = field(SupervisedSection(), "warm-up")
    mesh: MeshSection = field(MeshSection(), "devices")
    train: TrainSection = field(TrainSection(), "the run")


# What a preset sets beneath the file's own keys.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"dapo": {"loss_normalizer": "group-token-mean"}},
    "verl": {"dapo": {"dual_clip": 10.0}, "optim": {"warmup_steps": 10}},
}


def to_dict(section: Any) -> dict[str, Any]:
    """A section as plain nested dicts and lists, every field resolved."""
    return json.loads(json.dumps(dataclasses.asdict(section)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}, "c": [{"d": 2}]}` as `{"a.b": 1, "c.0.d": 2}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
