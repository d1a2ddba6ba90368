"""Mixtures of experts against a plain loop over tokens, and over meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dapo_jax.config import Experts, MeshSection
from dapo_jax.model.experts import mix, mixture, mixture_decoded, mixture_over, route
from dapo_jax.runtime.mesh import make_mesh

E, D, F = 5, 6, 4
RNG = np.random.default_rng(0)
KERNELS = {
    name: jnp.asarray(0.4 * RNG.normal(size=(E, *shape)), jnp.float32)
    for name, shape in (("gate", (D, F)), ("up", (D, F)), ("down", (F, D)))
}


def tokens(t, k):
    draws = RNG.normal(size=(t, D)), RNG.uniform(0.1, 1, size=(t, k))
    return [jnp.asarray(a, jnp.float32) for a in draws]


def plain(x, chosen, weight, kernels):
    """All experts of every token, and a sum over those chosen."""
    gate, up = (jnp.einsum("td,edf->tef", x, kernels[name]) for name in ("gate", "up"))
    each = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, kernels["down"])
    share = (jax.nn.one_hot(chosen, E) * weight[..., None]).sum(axis=1)
    return jnp.einsum("ted,te->td", each, share)


CHOICES = {
    "spread": np.stack([np.random.default_rng(n).permutation(E)[:2] for n in range(150)]),
    "one expert": np.tile([[3, 0]], (70, 1)),  # more rows than two blocks; three experts without
    "blocks end": np.repeat([[0, 4], [1, 2]], 32, axis=0),
    "one token": np.array([[4, 1]]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_experts_compute_exactly_their_tokens(name):
    """Values and gradients. Measured: 3e-7."""
    chosen = jnp.asarray(CHOICES[name], jnp.uint8)
    x, weight = tokens(*chosen.shape)

    def loss(f, x, weight, kernels):
        return jnp.sin(f(x, chosen, weight, kernels)).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1, 2)))(x, weight, KERNELS)
        for f in (mix, plain)
    )
    assert float(found[0]) == pytest.approx(float(expected[0]), abs=1e-3)  # a sum of 900 terms
    for part, other in zip(found[1], expected[1], strict=True):
        assert tiny.gap(part, other) < tiny.GRADIENT


def test_a_part_of_the_experts_adds_what_is_its_own():
    chosen = jnp.asarray(CHOICES["spread"], jnp.uint8)
    x, weight = tokens(*chosen.shape)
    whole = mix(x, chosen, weight, KERNELS)
    parts = [
        mix(x, chosen, weight, {n: w[first:last] for n, w in KERNELS.items()}, first)
        for first, last in ((0, 2), (2, 5))
    ]
    np.testing.assert_allclose(parts[0] + parts[1], whole, atol=1e-5)


def test_a_token_does_not_depend_on_its_neighbours():
    """To the bit, also where others are NaN."""
    chosen = jnp.asarray(CHOICES["spread"], jnp.uint8)
    x, weight = tokens(*chosen.shape)
    others = jnp.where(jnp.arange(len(x))[:, None] % 3 == 1, jnp.nan, x)
    found, alone = (np.asarray(jax.jit(mix)(a, chosen, weight, KERNELS)) for a in (others, x))
    kept = np.arange(len(x)) % 3 != 1
    np.testing.assert_array_equal(found[kept], alone[kept])


@pytest.mark.parametrize("normalize", [True, False])
def test_routes(normalize):
    x = RNG.normal(size=(7, D)).astype(np.float32)
    kernel = RNG.normal(size=(D, E)).astype(np.float32)
    probs = np.exp(x @ kernel) / np.exp(x @ kernel).sum(axis=1, keepdims=True)
    inputs = jnp.asarray(x), jnp.asarray(kernel), Experts(E, 2, normalize)
    routing, weight = route(*inputs)
    best = np.argsort(-probs, axis=1)[:, :2]
    np.testing.assert_array_equal(routing.chosen, best)
    expected = np.take_along_axis(probs, best, axis=1)
    expected /= expected.sum(axis=1, keepdims=True) if normalize else 1
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    np.testing.assert_allclose(routing.entropy, -(probs * np.log(probs)).sum(axis=1), rtol=1e-5)
    # earlier choices with the router's own weights, where they are asked for
    earlier, asked = (best + 1) % E, np.arange(7) < 4
    replayed = jnp.asarray(earlier, jnp.uint8), jnp.asarray(asked)
    routing, weight = route(*inputs, replayed)
    np.testing.assert_array_equal(routing.chosen, np.where(asked[:, None], earlier, best))
    expected = np.take_along_axis(probs, np.asarray(routing.chosen, int), axis=1)
    expected /= expected.sum(axis=1, keepdims=True) if normalize else 1
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


@pytest.mark.parametrize("layout, count", [((2, 2, 2), 4), ((1, 4, 2), 5)], ids=str)
def test_experts_over_a_mesh(layout, count):
    """Values and gradients; 5 experts, which tensor 2 does not divide, are whole everywhere. And as
    decoding calls them, under vmap over the row shards.
    """
    mesh, experts = make_mesh(MeshSection(*layout)), Experts(count, 2)
    x = tokens(36, 2)[0].reshape(4, 9, -1)
    kernels = {name: w[:count] for name, w in KERNELS.items()}
    kernels["router"] = jnp.asarray(RNG.normal(size=(D, count)), jnp.float32)

    def loss(f, x, kernels):
        y, routing = f(x, kernels, experts, None)
        return jnp.sin(y).sum(), routing

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1), has_aux=True))(x, kernels)
        for f in (functools.partial(mixture_over, mesh), mixture)
    )
    assert tiny.gap(found, expected) < tiny.GRADIENT
    decoded = jax.vmap(
        lambda x: mixture_decoded(mesh, x, kernels, experts, None), spmd_axis_name=("data", "fsdp")
    )
    y, routing = jax.jit(decoded)(x)
    np.testing.assert_allclose(y, mixture(x, kernels, experts, None)[0], atol=1e-5)
    np.testing.assert_array_equal(routing.chosen, expected[0][1].chosen)
