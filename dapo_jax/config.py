"""Run configuration: frozen dataclasses, small YAML files, dotted overrides; strict, and checked before any device is touched.

    python -m dapo_jax.config            prints every field with its default and meaning

Functions get the section they need, never the whole `Config`. Defaults are the paper's recipe (arXiv 2503.14476).
"""

import ast
import dataclasses
import datetime
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from dapo_jax.types import InputError

DAPO_TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{prompt}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


class ConfigError(InputError):
    """A configuration that cannot be used: names the file, the key, what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling of rotary embeddings."""

    factor: float = 8.0  # how much the context was stretched
    low_freq_factor: float = 1.0  # wavelengths above original_max_position / this are stretched
    high_freq_factor: float = 4.0  # wavelengths below original_max_position / this are left alone
    original_max_position: int = 8192  # context length before stretching, tokens


TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # projections that may have an adapter


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: the model's own weights are frozen, and W + (alpha / rank) A B is trained in A and B."""

    rank: int = 16  # r, inner width of A B; 0 trains nothing
    alpha: float = 32.0  # A B counts alpha / rank times
    targets: tuple[str, ...] = TARGETS  # projections that are adapted, all by default


@dataclasses.dataclass(frozen=True)
class Windows:
    """Sliding-window attention, in all layers but every so-many-th. (HF: sliding_window, sliding_window_pattern, rope_local_base_freq.)"""

    size: int = 512  # W, tokens that a token sees there: itself and those just before it
    every: int = 6  # layers every, 2 every, ... see everything
    rope_theta: float = 1e4  # base of the rotary frequencies there


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a decoder is."""

    family: Literal["llama", "qwen2", "qwen3", "gemma3_text"] = (
        "qwen3"  # qwen2 has q/k/v biases, qwen3 q/k norms, gemma3_text these and windows
    )
    vocab_size: int = 151936  # V
    model_dim: int = 1024  # D, width of the residual stream
    layers: int = 28  # L
    heads: int = 16  # H, query heads
    kv_heads: int = 8  # K, key/value heads; divides heads
    head_dim: int = 128  # width of one head
    ffn_dim: int = 3072  # F, hidden width of the gated feed-forward
    rope_theta: float = 1e6  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # Llama 3.x only
    rope_factor: float = 1.0  # Gemma 3 only: positions are divided by it, but for layers with a window
    windows: Windows | None = None  # Gemma 3 only, and always there
    query_scalar: int | None = None  # Gemma 3 only: scores are divided by its square root; null is head_dim
    norm_eps: float = 1e-6  # epsilon of the RMS norms
    tie_embeddings: bool = True  # the output head is the embedding transposed
    max_position: int = 40960  # context limit, prompt and response together, tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig(Architecture):
    """A decoder, and how it computes, which `ModelSection` says of any model."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls; master weights are float32
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass keeps: all, matmul results, block inputs
    attention_block: int = 512  # positions that training attention works on at a time: splash on TPU, long rows elsewhere
    lora: LoraConfig | None = None  # adapters beside the projections; null in all but training


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Where the policy comes from: a Hugging Face model, or random weights of a given architecture."""

    folder: str | None = None  # Hugging Face model: a folder, gs://bucket/folder, or an id of the hub, ID or ID@REVISION
    architecture: Architecture | None = None  # instead of a folder: random start with a byte-level tokenizer
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of matmuls; master weights are float32
    remat: Literal["none", "dots", "full"] = "full"  # what the backward pass keeps: all, matmul results, block inputs
    attention_block: int = 512  # positions that training attention works on at a time: splash on TPU, long rows elsewhere
    lora: LoraConfig | None = None  # trains adapters in place of the weights; null trains all weights


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """The embedded generator of chained arithmetic: solutions need one line a step, so their length varies."""

    train_problems: int = 20000  # distinct training problems
    heldout_problems: int = 256  # distinct problems for evaluation, none of them in training
    min_steps: int = 1  # fewest operations in a problem
    max_steps: int = 4  # most operations in a problem
    max_operand: int = 20  # operands are drawn from 1 to this
    mistake_rate: float = 0.0  # chance that a step of a training solution is miscalculated, as imperfect teachers do
    check_rate: float = 0.0  # chance that a step of a training solution is followed by a line that undoes it
    seed: int = 0  # which problems are made


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Which columns of a data set hold what. `a.b` is field b of column a. null: what is there under a usual name."""

    prompt: str | None = None  # text or chat turns, or several columns: "{passage} {question}"; null is prompt, problem or question
    answer: str | None = None  # text or a number; null is answer, reward_model.ground_truth, expected_answer or ground_truth
    solution: str | None = None  # text; null is solution, where there is one
    id: str | None = None  # text or a number; null is id or extra_info.index, where there is one
    answer_after: str | None = None  # the answer is what follows the last of these in its column, e.g. "####"; what precedes solves it


@dataclasses.dataclass(frozen=True)
class DataSection:
    """Training problems and how they become prompts."""

    train: str | Mapping[str, float] = (
        "arithmetic"  # a file, folder or pattern of rows (docs/data.md), or `arithmetic` (embedded); or several with weights
    )
    columns: Mapping[str, ColumnsConfig] = dataclasses.field(default_factory=dict)  # by data set, where they have other names than usual
    template: str = DAPO_TEMPLATE  # wraps a plain-text problem; {prompt} is where it goes
    allow_change: bool = False  # let a run go on with another data set than it was started with, from its start
    chat: bool = True  # render through the tokenizer's chat template
    chat_date: str = "2024-07-26"  # the day, YYYY-MM-DD, that chat templates write which write today's: prompts stay the same
    max_prompt_len: int = 2048  # tokens; longer prompts are skipped and counted
    arithmetic: ArithmeticConfig = ArithmeticConfig()  # used where a data set is called `arithmetic`


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """Held-out problems and how they are sampled."""

    sets: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name: data set, as in data.train
    every: int = 10  # rollout steps between evaluations; also before training and after; 0 is never
    samples_per_problem: int = 32  # k of avg@k, pass@k, cons@k
    temperature: float = 1.0  # sampling temperature; 0 is greedy
    top_p: float = 0.7  # nucleus mass
    max_problems: int | None = None  # use only the first so many of each set


@dataclasses.dataclass(frozen=True)
class RolloutSection:
    """Sampling of training responses."""

    max_response_len: int = 20480  # L_max, generation limit, tokens
    temperature: float = 1.0  # sampling temperature, also of the log-probs in the loss
    top_p: float = 1.0  # nucleus mass
    top_k: int = 0  # sample among the k most probable tokens; 0 is all
    stop_tokens: tuple[str, ...] = ()  # tokens, by their text, that end a response beside the model's own; the console lists all
    decode_slots: int = 512  # B, sequences decoded at a time, over all devices
    kv_cache: Literal["compute", "int8"] = "compute"  # keys and values while sampling: as computed, or 8 bits with a scale a token and head


@dataclasses.dataclass(frozen=True)
class RewardSection:
    """Correctness and overlong punishment."""

    verifier: Literal["strict", "lenient", "custom"] = "strict"  # last `Answer:` line; math-verify; your function
    function: str | None = None  # custom verifier, `package.module:function` or `path/file.py:function`
    allowed_modules: tuple[str, ...] = ()  # modules and files that `function` may come from
    allow_change: bool = False  # let a run go on although the file of `function` has changed since
    workers: int = 4  # processes that judge answers (lenient and custom)
    timeout_s: float = 10.0  # seconds for one answer; a worker that exceeds it is killed and replaced
    memory_mb: int = 2048  # address space a worker may use beyond what it starts with, MB
    max_error_fraction: float = 0.1  # stop if more of a generation batch than this gets no verdict
    overlong_penalty: bool = True  # soft overlong punishment, added to the score
    overlong_buffer_len: int = 4096  # L_cache, last tokens before max_response_len in which the penalty grows to -1


@dataclasses.dataclass(frozen=True)
class DapoSection:
    """The algorithm. Each of its parts can be switched off; with all off this is naive GRPO without KL."""

    prompts_per_step: int = 512  # N, groups trained on in a rollout step
    responses_per_prompt: int = 16  # G
    responses_per_update: int = 512  # mini-batch; whole groups
    clip_eps_low: float = 0.2  # ratio is clipped below 1 - this
    clip_eps_high: float = 0.28  # ratio is clipped above 1 + this (clip-higher)
    dual_clip: float | None = None  # caps the loss of A < 0 at this times |A|; null is off
    loss_normalizer: Literal["token-mean", "group-token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = (
        "token-mean"  # over the mini-batch's tokens; per prompt group (Eq. 8); per response (naive GRPO)
    )
    advantage_ddof: int = 1  # std divides by G - this
    advantage_eps: float = 1e-6  # added to the std
    dynamic_sampling: bool = True  # train only on groups with accuracy neither 0 nor 1
    prompts_per_draw: int = 1536  # a generation batch: prompts that are expected to give a step's groups, before any are known
    max_generation_batches: int = 10  # a rollout step draws at most so many generation batches of prompts
    on_cap: Literal["error", "train"] = "error"  # if they yield too few groups: stop, or train with what there is
    carry_surplus: bool = True  # use surplus groups in the next step, with the log-probs of the policy that drew them
    partial_rollouts: bool = False  # end a step once its first groups suffice; the next one goes on with the unfinished responses
    rest_after: int | None = None  # a problem that is drawn all right so many times running is skipped for a while; null is never
    rest_epochs: int = 1  # for so many further passes over the data
    overlong_filtering: bool = False  # give truncated responses weight 0 in the loss
    old_logprobs: Literal["recompute", "sampler"] = "recompute"  # of pi_old: by the trainer, or as sampled
    importance_cap: float | None = None  # truncated importance sampling: cap on the weight that corrects for the sampler; null is off


@dataclasses.dataclass(frozen=True)
class OptimSection:
    """AdamW with linear warm-up counted in rollout steps, then constant."""

    learning_rate: float = 1e-6  # after warm-up
    warmup_steps: int = 20  # rollout steps; at step s the rate is min(1, s / this) of the above
    weight_decay: float = 0.1  # decoupled
    grad_clip: float = 1.0  # global norm
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    max_nonfinite_updates: int = 3  # stop after so many skipped updates in a row
    rollback_steps: int | None = None  # then, or on non-finite logits: roll back so many steps or more, past the draws since; null stops


@dataclasses.dataclass(frozen=True)
class SupervisedSection:
    """Cross-entropy warm-up on worked solutions, before reinforcement learning or by its own verb."""

    updates: int = 0  # how many; 0 is none
    responses_per_update: int = 128  # solutions in an update
    learning_rate: float = 1e-3  # after warm-up, then constant
    warmup_updates: int = 20  # updates of linear warm-up
    save_every: int = 200  # updates between checkpoints


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """Devices along each axis; one of them may be -1, which takes what is left."""

    data: int = 1  # replicas
    fsdp: int = -1  # shards of parameters, optimizer state and rows
    tensor: int = 1  # shards of heads, feed-forward and vocabulary
    topology: str | None = None  # chips that `dapo_jax.plan` compiles for, e.g. v5p:4x4x8; a run takes the devices it finds


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """Length of the run, shape of the training rows, what is kept."""

    steps: int = 320  # rollout steps
    row_len: int | None = None  # T, tokens of a packed row; null is prompt limit + response limit
    rows_per_microbatch: int = 64  # rows in one forward and backward pass, over all devices
    save_every: int = 10  # rollout steps between checkpoints; also after the last
    keep_checkpoints: int = 3  # newest so many are kept
    samples_per_step: int = 8  # responses written to samples/ each step
    tracker: Literal["wandb", "mlflow"] | None = None  # also send metrics to Weights & Biases or MLflow; null is TensorBoard alone
    stall_timeout_s: float | None = 1800.0  # seconds without a segment, update or save after which a process ends; null never
    profile_start: int | None = None  # first rollout step that is traced into profile/; null is none
    profile_steps: int = 1  # how many are traced


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    preset: Literal["paper", "verl"] | None = None  # sets the places where paper and released recipe differ
    task: str | None = None  # a Python file of yours: its TEMPLATE is data.template, its `reward` the custom verifier (docs/tasks.md)
    seed: int = 0  # of initial weights, data order and sampling
    model: ModelSection = ModelSection()  # the policy
    data: DataSection = DataSection()  # training problems
    eval: EvalSection = EvalSection()  # held-out problems
    rollout: RolloutSection = RolloutSection()  # sampling
    reward: RewardSection = RewardSection()  # verification and length punishment
    dapo: DapoSection = DapoSection()  # the algorithm
    optim: OptimSection = OptimSection()  # the optimizer
    supervised: SupervisedSection = SupervisedSection()  # warm-up
    mesh: MeshSection = MeshSection()  # devices
    train: TrainSection = TrainSection()  # the run


# Values that a preset sets beneath the file's own keys. Weight decay, gradient clip, ddof and epsilon are the same in both.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"dapo": {"loss_normalizer": "group-token-mean", "dual_clip": None}, "optim": {"warmup_steps": 20}},
    "verl": {"dapo": {"loss_normalizer": "token-mean", "dual_clip": 10.0}, "optim": {"warmup_steps": 10}},
}

# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------

_MAX_DEPTH = 16
_MAX_BYTES = 1 << 20
_MAX_NODES = 10_000  # keys and values: 1 MB of them take PyYAML half a minute
_CREDENTIALS = re.compile(r"(?<=\w\w):/{1,2}[^/?#\s]*@")  # https://user:password@host; paths have one slash of it left


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-6` is a number, `010`, `1:30`, `yes` and dates are text; aliases and duplicate keys are errors."""

    yaml_implicit_resolvers: dict[str, list] = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        self._nodes = getattr(self, "_nodes", 0) + 1
        if self._nodes > _MAX_NODES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {_MAX_NODES:,} keys and values", self.peek_event().start_mark)
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > _MAX_DEPTH:
            raise yaml.constructor.ConstructorError(None, None, "nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {repr(key)[:60]} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key[:60]!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_StrictLoader.yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _TAGS}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""])
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:(?:0|[1-9]\d*)?\.\d+|(?:0|[1-9]\d*)(?:\.|(?=[eE])))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader subclass
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{where}{line}: {printable(str(e.problem or e.context))[:200]}; correct the YAML") from None
    except (yaml.YAMLError, ValueError, LookupError, RecursionError, OverflowError) as e:  # of values that are not what their tag says
        reason = (str(e).splitlines() or ["unreadable"])[0]
        raise ConfigError(f"{where}: not valid YAML ({printable(reason)[:200]}); correct the file") from None


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in names:
        return names[kind]
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_type_name(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of text"
    return "a mapping"


def _convert(value: Any, kind: Any, key: str, where: str) -> Any:
    """Returns `value` as `kind`, or raises a ConfigError that names `key`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        rest = [k for k in args if k is not type(None)]
        if len(rest) > 1:  # text or a mapping
            rest = [k for k in rest if isinstance(value, typing.get_origin(k) or k)]
        if rest and value is not None:
            return _convert(value, rest[0], key, where)
    elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(typing.cast(type, kind), value, key, where)
    elif origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(v, str, key, where) for v in value)
    elif origin is not None:  # Mapping[str, something]
        if isinstance(value, Mapping):
            for k in value:
                _check_text(k, f"{key}.{_shown(k)}", where)
            return {k: _convert(v, args[1], f"{key}.{_shown(k)}", where) for k, v in value.items()}
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
            raise ConfigError(f"{where}: {key}: must be finite, got {str(value)[:20]}; give a number")
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            if abs(value) < 2**31:
                return value
            raise ConfigError(f"{where}: {key}: {str(value)[:20]} is too large; give a number below 2^31")
    elif isinstance(value, kind):
        if isinstance(value, str):
            _check_text(value, key, where)
        return value
    got = "null" if value is None else printable(repr(value))[:60]
    raise ConfigError(f"{where}: {key}: expected {_type_name(kind)}, got {got}; correct the value")


def _check_text(value: str, key: str, where: str) -> None:
    """Raises ConfigError for text that no file system and no tokenizer takes, and for secrets, which would be written to the run folder."""
    if "\0" in value:
        raise ConfigError(f"{where}: {key}: contains a NUL character; remove it")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"{where}: {key}: is not valid Unicode; correct the value")
    if _CREDENTIALS.search(value):
        raise ConfigError(f"{where}: {key}: holds the user name or password of a URL; remove it, config files keep no secrets")


def printable(text: str) -> str:
    """The text as messages show it: on one line, without terminal controls or credentials of URLs."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in _CREDENTIALS.sub("://...@", text))


def _shown(key: str) -> str:
    """A key as messages name it."""
    return key if re.fullmatch(r"[\w.-]{1,60}", key) else printable(repr(key))[:60]


def _build(cls: type, mapping: Mapping[str, Any], prefix: str, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for name, value in mapping.items():
        key = f"{prefix}.{_shown(name)}" if prefix else _shown(name)
        if cls is Architecture and name in ModelConfig.__dataclass_fields__.keys() - {*names}:
            raise ConfigError(f"{where}: {key}: set model.{name} instead")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "it has: " + ", ".join(names)
            raise ConfigError(f"{where}: {key}: unknown key; {hint}")
        values[name] = _convert(value, hints[name], key, where)
    return cls(**values)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _section(kind: Any) -> type | None:
    """The dataclass that a field of this kind may hold."""
    return next((k for k in _alternatives(kind) if dataclasses.is_dataclass(k) and isinstance(k, type)), None)


def _entries(kind: Any) -> Any:
    """What the mapping by name that a field of this kind may hold has for entries: data.train, data.columns, eval.sets."""
    return next((typing.get_args(k)[1] for k in _alternatives(kind) if typing.get_origin(k) is Mapping), None)


def merge(base: Mapping[str, Any], top: Mapping[str, Any], cls: type = Config) -> dict[str, Any]:
    """`base` with the keys of `top` in it, both of the section `cls`.

    Sections are merged key by key. All else takes the place of what was there, a mapping by name (data.train, eval.sets) whole.
    """
    hints, merged = typing.get_type_hints(cls), dict(base)
    for key, value in top.items():
        section = _section(hints.get(key))
        if section and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = merge(merged[key], value, section)
        merged[key] = value
    return merged


def _override(tree: dict[str, Any], assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals or not key or key.startswith(".") or key.endswith("."):
        raise ConfigError(f"--set {printable(assignment)[:60]}: expected section.key=value")
    return _put(tree, key, _parse_yaml(text, f"--set {_shown(key)}"), Config)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _put(tree: Mapping[str, Any], key: str, value: Any, cls: type) -> dict[str, Any]:
    """The tree of a section with a value at a dotted key. In a mapping by name the rest of the key is the name: data.train.own.jsonl."""
    name, dot, rest = key.partition(".")
    if not dot:
        return merge(tree, {name: value}, cls)
    kind = typing.get_type_hints(cls).get(name)
    below = _mapping(tree.get(name))
    if (entry := _entries(kind)) is not None:
        part, _, field = rest.rpartition(".")
        if part and field in getattr(entry, "__dataclass_fields__", ()) and not isinstance(value, Mapping):  # of one data set's columns
            rest, value = part, {**_mapping(below.get(part)), field: value}
        return {**tree, name: {**below, rest: value}}
    section = _section(kind)
    return {**tree, name: _put(below, rest, value, section) if section else {rest: value}}


def config_from_dict(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Builds and checks a Config. `where` names the source in errors."""
    preset = tree.get("preset")
    if isinstance(preset, str) and preset in PRESETS:
        tree = merge(PRESETS[preset], tree)
    task = tree.get("task")
    if isinstance(task, str):
        tree = merge(_task_settings(task, tree.get("data"), f"{where}: task"), tree)
    config = _build(Config, tree, "", where)
    _check(config, where)
    return config


def read_text(path: str | Path, where: str, what: str, kind: str) -> str:
    """The text of a small UTF-8 file. Raises ConfigError, in the words `where`, `what` and `kind`, if it cannot be read."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise ConfigError(f"{where}: cannot read {what} ({reason}); give the path of a {kind} file") from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{where}: larger than 1 MB; this is no {what} file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not UTF-8 text; save the file as UTF-8") from None


def _task_settings(path: str, data: Any, where: str) -> dict[str, Any]:
    """What a task file sets beneath the config's own keys. A resolved config has a template, and needs the file no more."""
    if not path.endswith(".py"):
        raise ConfigError(f"{where}: expected a Python file, name.py, got {_shown(path)}")
    settings: dict[str, Any] = {"reward": {"verifier": "custom", "function": f"{path}:reward"}}
    if not (isinstance(data, Mapping) and "template" in data):
        settings["data"] = {"template": _task_template(path, f"{where}: {printable(path)}")}
    return settings


def _task_template(path: str, where: str) -> str:
    """The text that a Python file assigns to TEMPLATE. The file is parsed, and nothing of it is run."""
    try:
        body = ast.parse(read_text(path, where, "task", "Python")).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        line = f":{e.lineno}" if isinstance(e, SyntaxError) and e.lineno else ""
        reason = e.msg if isinstance(e, SyntaxError) else str(e) or "nested too deeply"
        raise ConfigError(f"{where}{line}: not valid Python ({printable(reason)[:200]}); correct the file") from None
    assigned = [
        node.value
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == "TEMPLATE"
    ]
    if not assigned:
        raise ConfigError(f'{where}: has no TEMPLATE; add TEMPLATE = "{{prompt}}", with your words around it, or set data.template')
    template = assigned[-1].value if isinstance(assigned[-1], ast.Constant) else None
    if not isinstance(template, str):
        raise ConfigError(f"{where}: TEMPLATE must be one text in quotes: it is read without running the file")
    if template.count("{prompt}") != 1:
        raise ConfigError(f"{where}: TEMPLATE must contain {{prompt}} exactly once")
    return template


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file of at most 1 MB holds. Raises ConfigError, and nothing else, for anything wrong with it."""
    where = printable(str(path))
    tree = _parse_yaml(read_text(path, where or "config", "config", "YAML"), where)
    if not isinstance(tree, dict):
        what = "empty" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{where}: is {what}; expected `section:` keys, see `python -m dapo_jax.config`")
    return tree


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file, applies `section.key=value` overrides, and checks the result.

    An override of a section is merged into it, any other takes the place of what was there: `data.train={a.jsonl: 1}` of all data
    sets, `data.train.a.jsonl=1` of one entry. Raises ConfigError, and nothing else, for anything wrong with file or overrides.

    >>> config = load_config("configs/tiny_cpu.yaml", ["dapo.clip_eps_high=0.2", "optim.learning_rate=1e-5"])
    >>> config.dapo.clip_eps_high, config.optim.learning_rate, config.dapo.responses_per_prompt
    (0.2, 1e-05, 8)
    """
    tree = read_mapping(path)
    for assignment in overrides:
        tree = _override(tree, assignment)
    return config_from_dict(tree, printable(str(path)))


# --------------------------------------------------------------------------------------------------------------------
# Checks across fields
# --------------------------------------------------------------------------------------------------------------------


def check_model(model: Architecture, fail) -> None:
    """Calls `fail(key, message)` for the first thing that makes an architecture impossible."""
    for name in ("vocab_size", "model_dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "max_position"):
        if getattr(model, name) < 1:
            fail(name, f"must be at least 1, got {getattr(model, name)}")
    if model.heads % model.kv_heads:
        fail("kv_heads", f"{model.kv_heads} does not divide heads {model.heads}")
    if model.head_dim % 2:
        fail("head_dim", f"must be even for rotary embeddings, got {model.head_dim}")
    if model.rope_theta <= 0 or model.norm_eps <= 0:
        fail("rope_theta" if model.rope_theta <= 0 else "norm_eps", "must be above 0")
    if s := model.rope_scaling:
        if s.factor < 1 or s.low_freq_factor <= 0 or s.high_freq_factor <= s.low_freq_factor or s.original_max_position < 1:
            fail("rope_scaling", "needs factor >= 1, 0 < low_freq_factor < high_freq_factor, original_max_position >= 1")
    if (w := model.windows) and (w.size < 1 or w.every < 1 or w.rope_theta <= 0):
        fail("windows", "needs size >= 1, every >= 1, rope_theta > 0")
    for name in ("rope_factor", "query_scalar"):
        value = getattr(model, name)
        if value is not None and value < 1:
            fail(name, f"must be at least 1, got {value}")
        if value not in (None, 1) and model.family != "gemma3_text":
            fail(name, "goes with family gemma3_text only")
    if (model.family == "gemma3_text") != (model.windows is not None):
        fail("windows", "goes with family gemma3_text, and is needed there")
    if model.windows and model.rope_scaling:
        fail("rope_scaling", "is of Llama 3.x; gemma3_text has rope_factor")


def _check(c: Config, where: str) -> None:
    def fail(key: str, message: str) -> typing.NoReturn:
        raise ConfigError(f"{where}: {key}: {message}")

    def at_least(key: str, bound: float) -> None:
        value: Any = c
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None and value < bound:
            fail(key, f"must be at least {bound}, got {value}")

    for key in (
        "data.max_prompt_len data.arithmetic.train_problems data.arithmetic.heldout_problems data.arithmetic.min_steps "
        "data.arithmetic.max_operand eval.samples_per_problem eval.max_problems rollout.max_response_len "
        "rollout.decode_slots reward.workers reward.memory_mb dapo.prompts_per_step dapo.responses_per_update "
        "dapo.prompts_per_draw dapo.max_generation_batches dapo.rest_after dapo.rest_epochs "
        "optim.max_nonfinite_updates optim.rollback_steps supervised.responses_per_update supervised.save_every "
        "train.steps train.row_len train.rows_per_microbatch train.save_every train.keep_checkpoints train.stall_timeout_s "
        "train.profile_start train.profile_steps model.attention_block"
    ).split():
        at_least(key, 1)
    for key in (
        "seed data.arithmetic.seed eval.every eval.temperature rollout.top_k reward.overlong_buffer_len dapo.advantage_eps "
        "optim.learning_rate optim.warmup_steps optim.weight_decay supervised.updates supervised.learning_rate "
        "supervised.warmup_updates train.samples_per_step"
    ).split():
        at_least(key, 0)
    for section, name in (("eval", "top_p"), ("rollout", "top_p")):
        if not 0 < getattr(getattr(c, section), name) <= 1:
            fail(f"{section}.{name}", "must be above 0 and at most 1")
    for name in ("b1", "b2"):
        if not 0 <= getattr(c.optim, name) < 1:
            fail(f"optim.{name}", "must be at least 0 and below 1")
    if c.optim.eps <= 0 or c.optim.grad_clip <= 0:
        fail("optim.eps" if c.optim.eps <= 0 else "optim.grad_clip", "must be above 0")

    # The policy
    if (c.model.folder is None) == (c.model.architecture is None):
        fail("model.folder", "give either a Hugging Face model or model.architecture, one of the two")
    if (arch := c.model.architecture) is not None:
        check_model(arch, lambda key, message: fail(f"model.architecture.{key}", message))
        check_context(c, arch, where)
    if (lora := c.model.lora) is not None:
        at_least("model.lora.rank", 0)
        if lora.alpha <= 0:
            fail("model.lora.alpha", "must be above 0")
        if not lora.targets or len({*lora.targets}) < len(lora.targets) or {*lora.targets} - {*TARGETS}:
            fail("model.lora.targets", f"expected some of {', '.join(TARGETS)}, each once")

    # Data
    try:
        datetime.date.fromisoformat(c.data.chat_date)
    except ValueError:
        fail("data.chat_date", f"expected a day as 2024-07-26, got {_shown(c.data.chat_date)}")
    if c.data.template.count("{prompt}") != 1:
        fail("data.template", "must contain {prompt} exactly once")
    if c.data.arithmetic.max_steps < c.data.arithmetic.min_steps:
        fail("data.arithmetic.max_steps", f"is below min_steps {c.data.arithmetic.min_steps}")
    if isinstance(c.data.train, Mapping):
        if not c.data.train:
            fail("data.train", "is empty; name a data set")
        for name, weight in c.data.train.items():
            if weight <= 0:
                fail(f"data.train.{_shown(name)}", f"a weight must be above 0, got {weight:g}; leave the data set out instead")
    sets = {c.data.train} if isinstance(c.data.train, str) else {*c.data.train}
    for name, columns in c.data.columns.items():
        if name not in sets | {*c.eval.sets.values()}:
            fail(f"data.columns.{_shown(name)}", "is no data set of data.train or eval.sets; write it as it is written there")
        for part, column in vars(columns).items():
            if column is not None and not column.strip():
                fail(f"data.columns.{_shown(name)}.{part}", "is empty; name a column, or leave it out")
    if c.eval.every and not c.eval.sets:
        fail("eval.sets", "is empty; name a data set, or set eval.every to 0")
    for name in ("mistake_rate", "check_rate"):
        if not 0 <= getattr(c.data.arithmetic, name) <= 1:
            fail(f"data.arithmetic.{name}", "must be from 0 to 1")
    for name in c.eval.sets:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            fail("eval.sets", f"name {_shown(name)} may hold letters, digits, '_', '.' and '-' only, and starts with one of the first two")

    # Rollout and reward
    if c.rollout.temperature <= 0:
        fail("rollout.temperature", "must be above 0: training needs responses that differ")
    if c.reward.overlong_buffer_len > c.rollout.max_response_len:
        fail("reward.overlong_buffer_len", f"exceeds rollout.max_response_len {c.rollout.max_response_len}")
    if c.reward.timeout_s <= 0:
        fail("reward.timeout_s", "must be above 0")
    if not 0 <= c.reward.max_error_fraction <= 1:
        fail("reward.max_error_fraction", "must be from 0 to 1")
    if (c.reward.verifier == "custom") != (c.reward.function is not None):
        fail("reward.function", "goes with `verifier: custom`, and only with it")
    if c.reward.function is not None:
        module, colon, name = c.reward.function.rpartition(":")
        if not colon or not module or not name.isidentifier():
            fail("reward.function", f"expected package.module:function or file.py:function, got {_shown(c.reward.function)}")
        if module not in c.reward.allowed_modules:
            kind = "file" if module.endswith(".py") else "module"
            fail("reward.function", f"{kind} {printable(repr(module))[:100]} is not in reward.allowed_modules; add it if you trust it")

    # The algorithm
    d = c.dapo
    if d.responses_per_prompt < 2:
        fail("dapo.responses_per_prompt", f"a group needs at least 2 responses to compare, got {d.responses_per_prompt}")
    if d.responses_per_update % d.responses_per_prompt:
        fail(
            "dapo.responses_per_update",
            f"{d.responses_per_update} is no multiple of responses_per_prompt {d.responses_per_prompt}; updates hold whole groups",
        )
    if (d.prompts_per_step * d.responses_per_prompt) % d.responses_per_update:
        fail(
            "dapo.responses_per_update",
            f"{d.responses_per_update} does not divide prompts_per_step x responses_per_prompt = "
            f"{d.prompts_per_step * d.responses_per_prompt}",
        )
    if not 0 <= d.clip_eps_low < 1:
        fail("dapo.clip_eps_low", f"must be at least 0 and below 1, got {d.clip_eps_low}")
    if d.clip_eps_high < 0:
        fail("dapo.clip_eps_high", f"must be at least 0, got {d.clip_eps_high}")
    if d.dual_clip is not None and d.dual_clip <= 1:
        fail("dapo.dual_clip", f"must be above 1, got {d.dual_clip}")
    if d.importance_cap is not None and d.importance_cap < 1 + d.clip_eps_high:
        fail("dapo.importance_cap", f"must be at least 1 + clip_eps_high = {1 + d.clip_eps_high:g}, got {d.importance_cap:g}")
    if d.dynamic_sampling and d.on_cap == "error" and (most := d.prompts_per_draw * d.max_generation_batches) < d.prompts_per_step:
        fail(
            "dapo.max_generation_batches",
            f"{d.max_generation_batches} x prompts_per_draw {d.prompts_per_draw} = {most} prompts, of which no step can have "
            f"prompts_per_step {d.prompts_per_step} groups; raise one of the two, or set dapo.on_cap to train",
        )
    if d.partial_rollouts and not d.dynamic_sampling:
        fail("dapo.partial_rollouts", "needs dapo.dynamic_sampling, which decides when groups suffice")
    if not 0 <= d.advantage_ddof < d.responses_per_prompt:
        fail("dapo.advantage_ddof", f"must be at least 0 and below responses_per_prompt {d.responses_per_prompt}")

    # Rows and devices
    longest = c.data.max_prompt_len + c.rollout.max_response_len
    if c.train.row_len is not None and c.train.row_len < longest:
        fail("train.row_len", f"{c.train.row_len} cannot hold a prompt and a response of {longest} tokens")
    axes = (c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    if axes.count(-1) > 1 or any(a < 1 and a != -1 for a in axes):
        fail("mesh", f"axes are at least 1, and one of them may be -1; got {axes}")


def check_context(c: Config, model: Architecture, where: str = "config") -> None:
    """Raises ConfigError if prompt and response together exceed the model's context."""
    longest = c.data.max_prompt_len + c.rollout.max_response_len
    if longest > model.max_position:
        raise ConfigError(
            f"{where}: rollout.max_response_len: prompt limit {c.data.max_prompt_len} + response limit "
            f"{c.rollout.max_response_len} exceed the model's context of {model.max_position} tokens; lower one of them"
        )


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dicts and lists, every field resolved."""
    tree = dataclasses.asdict(config)
    return _plain(tree)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def dump_yaml(config: Config) -> str:
    """YAML that `load_config` reads back to an equal Config."""
    return yaml.dump(to_dict(config), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=120)


class _StrictDumper(yaml.SafeDumper):
    """Writes floats so that the strict reader sees floats, and quotes what it would not read as text."""

    yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data):
        return True


_StrictDumper.add_representer(float, lambda d, v: d.represent_scalar("tag:yaml.org,2002:float", repr(v)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _field_comments(cls: type) -> dict[str, str]:
    """The comment of each field, read from the source: one place to write it, one to print it."""
    comments, name = {}, None
    for line in inspect.getsource(cls).splitlines():
        if found := re.match(r"    (\w+):", line):
            name = found[1]
        if name and (comment := re.search(r"\s#\s(.*)$", line)):
            comments[name] = comment[1]
    return comments


def describe(cls: type = Config, default: Any = None, indent: str = "") -> list[str]:
    """Every field with its default and comment, as commented YAML lines."""
    default = cls() if default is None else default
    comments, lines = _field_comments(cls), []
    for field in dataclasses.fields(cls):
        value, comment = getattr(default, field.name), comments[field.name]
        if dataclasses.is_dataclass(value):
            lines.append(f"{indent}{field.name}:  # {comment}")
            lines += describe(type(value), value, indent + "  ")
            continue
        shown = str(_plain(value))
        if value is None or isinstance(value, bool):
            shown = {None: "null", True: "true", False: "false"}[value]
        elif len(shown) > 50:
            shown = f"{shown[:40]!r}..."
        lines.append(f"{indent + field.name + ': ' + shown:<50}  # {comment}")
        optional = [k for k in typing.get_args(typing.get_type_hints(cls)[field.name]) if dataclasses.is_dataclass(k)]
        for kind in optional:  # null by default: its fields are shown as comments
            lines += [f"{indent}  # {line}" for line in describe(typing.cast(type, kind))]
    return lines


def main(argv: list[str] | None = None) -> int:
    """Prints every config field with its default and meaning, or a resolved config file."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m dapo_jax.config", description=main.__doc__)
    parser.add_argument("--config", help="print this file, resolved and checked, instead of the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. optim.learning_rate=1e-5")
    args = parser.parse_args(argv)
    print(dump_yaml(load_config(args.config, args.set)) if args.config else "\n".join(describe()))
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
