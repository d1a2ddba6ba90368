"""Types shared across the package: problems, groups, batches, errors.

Dimension key, for every shape in this package:

    Q prompts · G responses per prompt · P prompt length · R response length · N rows · T row length
    S cache length · B decode slots · V vocab · D model · L layers · H query heads · K kv heads
    h head size · F feed-forward · M micro-batches

Lengths are tokens. Log-probs are natural-log float32 values of the sampled token.
`behavior_logprobs` are the sampler's; `old_logprobs` are log π_old, the denominator of the ratio.
Their difference is a metric.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

Params = Mapping[str, Any]  # nested dict of arrays
Tokens = Int32[np.ndarray, " _"]
Floats = Float32[np.ndarray, " _"]
Chosen = UInt8[np.ndarray, "_ _"]


class InputError(Exception):
    """Bad input. One line: file, key or row; what is wrong; what to do. Exit status 2."""


class SharedError(InputError):
    """Raised by every process of a job at the same place, so that they can still save together."""


class NonFiniteError(InputError):
    """Logits, or several updates in a row, are non-finite. Nothing of the step may be saved."""


class NoCheckpointError(Exception):
    """A run folder holds no usable checkpoint. Exit status 3."""


class RunError(Exception):
    """The run cannot continue, and its input is not at fault. One line. Exit status 1."""


class Stopped(Exception):
    """A signal requested a stop. Exit status 128 + its number: 143 for SIGTERM, 130 for SIGINT."""

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(message)
        self.number = number


def one_line(error: object) -> str:
    """The text of an error, or its type if it has none, on a line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclasses.dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its verifiable answer. `prompt` is plain text, or chat turns."""

    id: str  # stable across runs: derives from the content, or the dataset's own identifier
    prompt: str | tuple[Message, ...]
    answer: str
    solution: str | None = None  # a worked solution, for supervised warm-up only
    source: str = dataclasses.field(default="", compare=False)  # the config's name of its data set


_INTEGER = re.compile(r"(\$?[+-]?)([0-9]+)(\$?)")


def canonical_answer(text: str) -> str:
    """A ground truth as verifiers compare it: the element of a JSON list of one text; an integer
    without leading zeros.

    >>> canonical_answer('["34"]'), canonical_answer("025"), canonical_answer("0.5")
    ('34', '25', '0.5')
    """
    text = text.strip()
    if text.startswith("[") and '"' in text:
        try:
            match json.loads(text):
                case [str(answer)]:
                    text = answer.strip()
        except (ValueError, RecursionError):
            pass
    integer = _INTEGER.fullmatch(text)
    return f"{integer[1]}{integer[2].lstrip('0') or '0'}{integer[3]}" if integer else text


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem rendered through template and tokenizer."""

    problem: Problem
    tokens: Tokens  # [P]


class Request(NamedTuple):
    """One response to be sampled. `draw` and `sample` are folded into its random key."""

    draw: int  # index of the prompt's draw since the run began
    sample: int  # which of the G responses of that draw
    prompt: Tokens  # [P]
    prefix: tuple[np.ndarray, ...] | None = None  # what is sampled already: `Response.sampled`
    limit: int | None = None  # response tokens at most, prefix included; None is the engine's limit


class Response(NamedTuple):
    """One sampled response, with its end token if it has one."""

    tokens: Tokens  # [R]
    behavior_logprobs: Floats  # [R], the sampler's
    truncated: bool  # hit the length limit before an end token
    # (rollout step, tokens) of each policy that sampled some of it, in order; () where not recorded
    policies: tuple[tuple[int, int], ...] = ()
    # [R, L k]: the experts, in each layer, of the state that predicted the token; None where not
    # recorded (dapo.replay_routing)
    experts: Chosen | None = None

    @property
    def sampled(self) -> tuple[np.ndarray, ...]:
        """Tokens, log-probs, and experts where recorded."""
        arrays = self.tokens, self.behavior_logprobs
        return arrays if self.experts is None else (*arrays, self.experts)


class Verdict(NamedTuple):
    """The judgement of one response: the group filter uses `correct`, the reward `score`."""

    correct: bool
    score: float
    error: str | None = None  # why there is no verdict (time-out, exception); counted separately
    answered: bool = True  # whether the verifier found an answer in the response at all


@dataclasses.dataclass(frozen=True)
class Group:
    """One draw of a prompt: its responses that have a verdict, G unless judging failed for some."""

    draw: int
    prompt: Prompt
    responses: tuple[Response, ...]
    correct: Bool[np.ndarray, " _"]  # [G]
    reward: Floats  # [G], score + overlong penalty
    penalty: Floats  # [G], overlong penalty, in [-1, 0]
    old_logprobs: tuple[Floats, ...]  # [R] each, log π_old: of the sampling policy


class TrainBatch(NamedTuple):
    """Token-aligned packed rows, [N, T] each ([M, N, T] with micro-batches in front).

    Entry t describes the prediction of token t from the earlier tokens of its segment. Arrays are
    numpy on the host, jax on devices.
    """

    tokens: Int32[Any, "*M N T"]
    segment_ids: Int32[Any, "*M N T"]  # 0 where there is no token; from 1 inside a row
    positions: Int32[Any, "*M N T"]  # from 0 in each segment
    target_mask: Bool[Any, "*M N T"]  # True on response tokens
    old_logprobs: Float32[Any, "*M N T"]  # 0 outside targets
    behavior_logprobs: Float32[Any, "*M N T"]  # 0 outside targets
    advantages: Float32[Any, "*M N T"]  # the response's advantage on each of its tokens
    weight: Float32[Any, "*M N T"]  # 1 / normaliser on tokens that are trained, else 0
    current: Bool[Any, "*M N T"]  # True on response tokens that this step's policy sampled
    experts: UInt8[Any, "*M N T c"] | None = None  # `Response.experts`; 0 outside targets


class TrainState(NamedTuple):
    """Training state that an update changes, sharded like the parameters."""

    # float32 master weights; with LoRA: float32 adapters, and frozen weights in compute dtype
    params: Params
    opt_state: Any
    updates: Int32[Any, ""]  # updates applied so far
