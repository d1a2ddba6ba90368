"""Validation: a tree against the schema, and fields against each other."""

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from dapo_jax.config.schema import (
    Architecture,
    Config,
    DapoSection,
    DataSection,
    EvalSection,
    ModelSection,
    RewardSection,
    flatten,
    to_dict,
)
from dapo_jax.types import InputError

Fail = Callable[[str, str], Any]  # raises an error about a key
_CREDENTIALS = re.compile(r"(?<=\w\w):/{1,2}[^/?#\s]*@")  # https://user:password@host; or one slash
_REMOVED = {
    ("data", "chat_date"): "was removed: chat templates get 2024-07-26; leave it out",
    ("data", "allow_change"): "was removed; give train --allow-change data.train instead",
    ("reward", "allow_change"): "was removed; give train --allow-change reward.function instead",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class ConfigError(InputError):
    """A configuration that cannot be used: names the file, the key, what is wrong, what to do."""


def printable(text: str) -> str:
    """The text as messages show it: one line, no terminal controls, no credentials of URLs."""
    text = _CREDENTIALS.sub("://...@", text)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(key: object) -> str:
    """A key as messages name it."""
    key = str(key)
    return key if re.fullmatch(r"[\w.-]{1,60}", key) else printable(repr(key))[:60]


def check_texts(value: Any, key: str, fail: Fail) -> None:
    """Refuses text that no file or tokenizer accepts, and secrets: run folders hold the config."""
    if isinstance(value, Mapping | list):
        for name, below in value.items() if isinstance(value, Mapping) else enumerate(value):
            path = f"{key}.{shown(name)}" if key else shown(name)
            check_texts(name, path, fail)
            check_texts(below, path, fail)
    elif isinstance(value, str):
        if "\0" in value:
            fail(key, "contains a NUL character; remove it")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            fail(key, "is not valid Unicode; correct the value")
        if _CREDENTIALS.search(value):
            fail(key, "holds the user name or password of a URL; remove it, files keep no secrets")


def build(cls: type, tree: Mapping[str, Any], fail: Fail) -> Any:
    """The section that a tree of mappings, lists and scalars describes."""
    import pydantic  # not at the top: reward workers read no config

    try:  # as JSON: strict, and yet lists are tuples and mappings are sections
        section = _reader(cls).validate_json(json.dumps(tree))
    except pydantic.ValidationError as e:
        errors = e.errors(include_url=False)
        unknown = [error for error in errors if error["type"] == "unexpected_keyword_argument"]
        error = (unknown or errors)[0]
        return fail(".".join(map(shown, error["loc"])), _in_words(cls, error))
    for key, value in flatten(to_dict(section)).items():
        if type(value) is int and abs(value) >= 2**31:
            fail(key, f"{str(value)[:20]} is too large; give a number below 2^31")
    return section


@functools.cache
def _reader(cls: type) -> Any:
    """Makes sections of a class; a run reads its config a dozen times."""
    import pydantic

    return pydantic.TypeAdapter(cls)


def limits(field: dataclasses.Field) -> str:
    """The range of a number, in words; empty where it has none."""
    given = ((word, field.metadata.get(key)) for key, word in _BOUNDS.items())
    return " and ".join(f"{word} {n}" for word, n in given if n is not None)


def _in_words(cls: type, error: Mapping[str, Any]) -> str:
    """A validation error as what is wrong and what to do."""
    kind, (*sections, name), value = error["type"], error["loc"], error["input"]
    for section in sections:
        hint = typing.get_type_hints(cls).get(section)
        inner = [k for k in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(k)]
        cls = typing.cast(type, inner[0]) if inner else cls
    fields = {field.name: field for field in dataclasses.fields(cls)}
    got = "null" if value is None else printable(repr(value))[:60]
    if kind == "unexpected_keyword_argument":
        if sections == ["model", "architecture"] and name in ModelSection.__dataclass_fields__:
            return f"set model.{name} instead"
        if error["loc"] in _REMOVED:
            return _REMOVED[error["loc"]]
        if error["loc"] == ("data", "columns"):
            return "belongs to a data set: train: [{path: a.jsonl, columns: {prompt: question}}]"
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "it has: " + ", ".join(fields)
        return f"unknown key; {hint}"
    if kind == "missing":
        return "is missing; give it"
    if kind in ("too_short", "string_too_short", "string_pattern_mismatch"):
        return "is empty; give something, or leave it out"
    if kind.startswith(("greater_than", "less_than")):
        return f"must be {limits(fields[name])}, got {got}"
    must = error["msg"].replace("Input should", "must")
    return f"{must}, got {got}; correct the value"


def check_model(model: Architecture, fail: Fail) -> None:
    """Calls `fail(key, message)` for the first thing that makes an architecture impossible."""
    build(type(model), to_dict(model), fail)
    if model.heads % model.kv_heads:
        fail("kv_heads", f"{model.kv_heads} does not divide heads {model.heads}")
    if model.head_dim % 2:
        fail("head_dim", f"must be even for rotary embeddings, got {model.head_dim}")
    if (s := model.rope_scaling) and s.high_freq_factor <= s.low_freq_factor:
        fail("rope_scaling", "needs low_freq_factor < high_freq_factor")
    gemma = model.family == "gemma3_text"
    for name in ("rope_factor", "query_scalar"):
        if getattr(model, name) not in (None, 1) and not gemma:
            fail(name, "goes with family gemma3_text only")
    if gemma != (model.windows is not None):
        fail("windows", "goes with family gemma3_text, and is needed there")
    if (model.family == "qwen3_moe") != (model.experts is not None):
        fail("experts", "goes with family qwen3_moe, and is needed there")
    if (e := model.experts) and e.per_token > e.count:
        fail("experts.per_token", f"{e.per_token} exceeds experts.count {e.count}")
    if model.windows and model.rope_scaling:
        fail("rope_scaling", "is of Llama 3.x; gemma3_text has rope_factor")


def check_context(c: Config, model: Architecture, where: str = "config") -> None:
    """Raises ConfigError if prompt and response together exceed the model's context."""
    longest = c.data.max_prompt_len + c.rollout.max_response_len
    if longest > model.max_position:
        raise ConfigError(
            f"{where}: rollout.max_response_len: prompt limit {c.data.max_prompt_len} + response "
            f"limit {c.rollout.max_response_len} exceed the model's context of "
            f"{model.max_position} tokens; lower one of them"
        )


def check(c: Config, where: str) -> None:
    """Raises ConfigError for the first thing that contradicts another."""

    def fail(key: str, message: str) -> typing.NoReturn:
        raise ConfigError(f"{where}: {key}: {message}")

    if (c.model.folder is None) == (c.model.architecture is None):
        fail("model.folder", "give either a Hugging Face model or model.architecture")
    if (model := c.model.architecture) is not None:
        check_model(model, lambda key, message: fail(f"model.architecture.{key}", message))
        check_context(c, model, where)
    if (lora := c.model.lora) and len({*lora.targets}) < len(lora.targets):
        fail("model.lora.targets", "names one twice; name each once")
    _check_data(c.data, fail)
    _check_eval(c.eval, fail)
    _check_reward(c.reward, c.rollout.max_response_len, fail)
    _check_dapo(c.dapo, fail)
    corrections = ("importance_cap", "token_mask", "sequence_mask")
    if c.rollout.weights == "int8" and not any(getattr(c.dapo, key) for key in corrections):
        what = "needs a correction of the sampler's mismatch; set one of dapo."
        fail("rollout.weights", f"int8 {what}{', dapo.'.join(corrections)}")
    longest = c.data.max_prompt_len + c.rollout.max_response_len
    if c.train.row_len is not None and c.train.row_len < longest:
        row = f"{c.train.row_len} cannot hold a prompt and a response"
        fail("train.row_len", f"{row} of {longest} tokens")
    axes = (c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    if axes.count(-1) > 1 or 0 in axes:
        fail("mesh", f"axes are at least 1, and one of them may be -1; got {axes}")


def _check_data(d: DataSection, fail: Fail) -> None:
    if d.template.count("{prompt}") != 1:
        fail("data.template", "must contain {prompt} exactly once")
    if d.arithmetic.max_steps < d.arithmetic.min_steps:
        fail("data.arithmetic.max_steps", f"is below min_steps {d.arithmetic.min_steps}")
    paths = [one.path for one in d.train]
    for n, path in enumerate(paths):
        if path in paths[:n]:
            fail(f"data.train.{n}.path", f"{shown(path)} is in the list already; remove one")


def _check_eval(e: EvalSection, fail: Fail) -> None:
    if e.every and not e.sets:
        fail("eval.sets", "is empty; name a data set, or set eval.every to 0")
    for name in e.sets:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            fail("eval.sets", f"name {shown(name)} may hold letters, digits, '_', '.' and '-' only")


def _check_reward(r: RewardSection, max_response_len: int, fail: Fail) -> None:
    if r.overlong_buffer_len > max_response_len:
        fail("reward.overlong_buffer_len", f"exceeds rollout.max_response_len {max_response_len}")
    if not all(name.isidentifier() for name in r.environment):
        no_name = "holds what is no variable's name; list names, values stay outside"
        fail("reward.environment", no_name)
    if (r.verifier == "custom") != (r.function is not None):
        fail("reward.function", "goes with `verifier: custom`, and only with it")
    if r.function is not None:
        module, colon, name = r.function.rpartition(":")
        if not colon or not module or not name.isidentifier():
            forms = "package.module:function or file.py:function"
            fail("reward.function", f"expected {forms}, got {shown(r.function)}")
        if module not in r.allowed_modules:
            what = "file" if module.endswith(".py") else "module"
            what = f"{what} {printable(repr(module))[:100]} is not in reward.allowed_modules"
            fail("reward.function", f"{what}; add it if you trust it")


def _check_correction(d: DapoSection, fail: Fail) -> None:
    masks = {"token_mask": d.token_mask, "sequence_mask": d.sequence_mask}
    for name, bounds in masks.items():
        if bounds and not 0 < bounds[0] < 1 < bounds[1]:
            fail(f"dapo.{name}", f"expected [a, b] with 0 < a < 1 < b, got {list(bounds)}")
    if d.token_mask and d.importance_cap is not None and d.importance_cap >= d.token_mask[1]:
        fail(
            "dapo.importance_cap",
            f"never acts: token_mask removes what is above {d.token_mask[1]:g}",
        )
    for name in ("sequence_mask", "sequence_veto"):
        if getattr(d, name) is not None and d.old_logprobs == "sampler":
            fail(f"dapo.{name}", "needs dapo.old_logprobs: recompute")
    if d.objective == "cispo" and d.dual_clip is not None:
        fail("dapo.dual_clip", "goes with dapo.objective: dapo only; set it to null")
    if d.objective == "cispo" and d.importance_cap is not None and d.old_logprobs == "sampler":
        fail("dapo.importance_cap", "never acts: cispo clips the same ratio; set it to null")
    if d.loss_length is not None and d.loss_normalizer != "seq-mean-token-sum":
        fail("dapo.loss_length", "goes with dapo.loss_normalizer: seq-mean-token-sum only")


def _check_dapo(d: DapoSection, fail: Fail) -> None:
    group, update = d.responses_per_prompt, d.responses_per_update
    drawn, wanted = d.prompts_per_draw * d.max_generation_batches, d.prompts_per_step
    if update % group:
        fail(
            "dapo.responses_per_update",
            f"{update} is no multiple of responses_per_prompt {group}; updates hold whole groups",
        )
    if (wanted * group) % update:
        step = f"prompts_per_step x responses_per_prompt = {wanted * group}"
        fail("dapo.responses_per_update", f"{update} does not divide {step}")
    if d.importance_cap is not None and d.importance_cap < (least := 1 + d.clip_eps_high):
        bound = f"must be at least 1 + clip_eps_high = {least:g}"
        fail("dapo.importance_cap", f"{bound}, got {d.importance_cap:g}")
    _check_correction(d, fail)
    if d.dynamic_sampling and d.on_cap == "error" and drawn < wanted:
        fail(
            "dapo.max_generation_batches",
            f"{d.max_generation_batches} x prompts_per_draw {d.prompts_per_draw} = {drawn} "
            f"prompts, of which no step can have prompts_per_step {wanted} groups; "
            "raise one of the two, or set dapo.on_cap to train",
        )
    if d.partial_rollouts and not d.dynamic_sampling:
        fail("dapo.partial_rollouts", "needs dapo.dynamic_sampling")
    if d.max_policy_age is not None and not d.partial_rollouts:
        fail("dapo.max_policy_age", "needs dapo.partial_rollouts")
    if d.advantage_ddof >= group:
        fail("dapo.advantage_ddof", f"must be below responses_per_prompt {group}")
