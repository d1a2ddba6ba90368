"""Embedding rows and the gradient of the table, however the table is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapo_jax.config import MeshSection
from dapo_jax.model.embedding import embed
from dapo_jax.runtime.mesh import make_mesh


@pytest.mark.parametrize("vocab", [12, 13], ids=["V divides", "V does not divide"])
@pytest.mark.parametrize("layout", [(8, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("split_sequence", [False, True])
def test_rows_and_gradient_do_not_depend_on_the_layout(vocab, layout, split_sequence):
    mesh = make_mesh(MeshSection(*layout))
    rng = np.random.default_rng(0)
    table, weight = (
        rng.normal(size=(vocab, 6)).astype(np.float32),
        rng.normal(size=(8, 4, 6)).astype(np.float32),
    )
    tokens = rng.integers(0, vocab, (8, 4)).astype(np.int32)
    rows, pull = jax.vjp(
        lambda t: jax.jit(embed, static_argnums=(2, 3, 4))(
            t, tokens, "float32", mesh, split_sequence
        ),
        table,
    )
    np.testing.assert_array_equal(rows, table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, weight)
    np.testing.assert_allclose(pull(jnp.asarray(weight))[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("meshed", [False, True])
def test_a_frequent_token_has_its_whole_gradient_in_bfloat16(meshed):
    """A thousand ones are a thousand. Added up in bfloat16 they are 256."""
    mesh = make_mesh(MeshSection(2, 2, 2)) if meshed else None
    table, tokens = np.ones((4, 2), np.float32), np.zeros((8, 128), np.int32)
    gradient = jax.jit(
        jax.grad(lambda t, at: embed(t, at, "bfloat16", mesh, False).astype(jnp.float32).sum())
    )(table, tokens)
    np.testing.assert_array_equal(gradient, [[1024, 1024], [0, 0], [0, 0], [0, 0]])
