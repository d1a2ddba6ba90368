"""Host side of sampling: requests go into decode slots in draw order, responses come back in the same order."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dapo_jax.config import ModelConfig
from dapo_jax.rollout.sampler import SamplerState, Sampling, decode, prefill, response_keys
from dapo_jax.types import Array, Params, Request, Response

_SEGMENT = 64  # decode steps between looks at which sequences are still live
_ROWS = ("data", "fsdp")


class Engine:
    """A fixed number of decode slots over a mesh, and the programs compiled for them.

    Args:
      slots: B, over all devices; a multiple of the mesh's row shards. stop: token ids that end a response.
      mesh: slots are split over its ("data", "fsdp") axes, kv heads over "tensor" where they divide.
      put, fetch: numpy to a global array with a given sharding, and back, whole, on every process.
    """

    def __init__(
        self,
        model: ModelConfig,
        sampling: Sampling,
        stop: tuple[int, ...],
        *,
        slots: int,
        max_prompt_len: int,
        max_response_len: int,
        mesh: Mesh,
        put: Callable[[np.ndarray, NamedSharding], jax.Array],
        fetch: Callable[[Any], Any],
    ):
        self.slots, self.max_prompt_len = slots, max_prompt_len
        self._rows = NamedSharding(mesh, P(_ROWS))
        self._put, self._fetch = put, fetch
        heads = "tensor" if model.kv_heads % mesh.shape["tensor"] == 0 else None
        cache = NamedSharding(mesh, P(None, _ROWS, heads))
        layout = SamplerState(cache, *(self._rows,) * (len(SamplerState._fields) - 1))  # type: ignore[arg-type]

        def start(params: Params, seed: Array, prompts: Array, prompt_len: Array, draws: Array, samples: Array) -> SamplerState:
            keys = response_keys(seed, draws, samples)
            return prefill(params, prompts, prompt_len, keys, model=model, sampling=sampling, stop=stop, max_response_len=max_response_len)

        go_on = functools.partial(decode, model=model, sampling=sampling, stop=stop, max_steps=_SEGMENT)
        self._start = jax.jit(start, out_shardings=layout)
        self._decode = jax.jit(go_on, donate_argnums=1, out_shardings=layout)

    def generate(
        self, params: Params, requests: Sequence[Request], seed: Array, on_done: Callable[[int], None] = lambda count: None
    ) -> list[Response]:
        """Samples every request to its end. `on_done` is told how many more responses have ended."""
        responses: list[Response] = []
        for at in range(0, len(requests), self.slots):
            responses += self._batch(params, requests[at : at + self.slots], seed, on_done)
        return responses

    def _batch(self, params: Params, requests: Sequence[Request], seed: Array, on_done: Callable[[int], None]) -> list[Response]:
        prompts = np.zeros((self.slots, self.max_prompt_len), np.int32)
        prompt_len, draws, samples = np.zeros((3, self.slots), np.int32)  # a slot without a request has an empty prompt
        for slot, request in enumerate(requests):
            prompts[slot, : len(request.prompt)] = request.prompt
            prompt_len[slot], draws[slot], samples[slot] = len(request.prompt), request.draw, request.sample
        arrays = (self._put(a, self._rows) for a in (prompts, prompt_len, draws, samples))
        state = self._start(params, seed, *arrays)
        done = 0
        while (live := int(jnp.sum(state.live))) > 0:
            on_done(len(requests) - live - done)
            done = len(requests) - live
            state = self._decode(params, state)
        on_done(len(requests) - done)
        tokens, logprobs, length, ended = self._fetch((state.tokens, state.logprobs, state.length, state.ended))
        return [
            Response(tokens[i, : length[i]].copy(), logprobs[i, : length[i]].copy(), truncated=not ended[i]) for i in range(len(requests))
        ]
