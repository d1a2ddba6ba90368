"""One loss and one gradient, whatever the devices they are spread over."""

import functools

import jax
import numpy as np
import pytest
import tiny

from dapo_jax.config import DapoSection, MeshSection
from dapo_jax.dapo.loss import loss_fn
from dapo_jax.dapo.packing import build_batch
from dapo_jax.dapo.update import accumulate
from dapo_jax.runtime.mesh import make_mesh, params_sharding, put, put_rows

MODEL = tiny.model()
ITEMS = tiny.make_items(MODEL, 12)


@functools.cache
def plain():
    return jax.jit(jax.value_and_grad(functools.partial(tiny.plain_loss, config=MODEL, items=ITEMS)))(tiny.params(MODEL))


@pytest.mark.parametrize("layout", [(8, 1, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_loss_and_gradient_do_not_depend_on_the_layout_of_devices(layout):
    """Against one device, unpacked rows and whole log-softmaxes. Measured: loss MEASURED, gradient MEASURED relative."""
    mesh = make_mesh(MeshSection(*layout))
    batch, stats = build_batch(ITEMS, row_len=13, rows_per_microbatch=8, microbatches=2)
    loss_of = functools.partial(loss_fn, model=MODEL, algo=DapoSection(), chunk_size=8, mesh=mesh)
    sharding = params_sharding(tiny.params(MODEL), mesh)
    params = jax.tree.map(lambda p, s: put(np.asarray(p), s), tiny.params(MODEL), sharding)
    run = jax.jit(functools.partial(accumulate, loss_fn=loss_of), out_shardings=(None, None, sharding))
    loss, sums, grads = run(params, put_rows(batch, mesh, axis=1))
    expected, slopes = plain()
    print("GAPS", tiny.gap(loss, expected), tiny.gap(jax.device_get(grads), slopes))
    assert tiny.gap(loss, expected) < 1e-6 and tiny.gap(jax.device_get(grads), slopes) < 1e-6
    assert sums["tokens"] == stats.target_tokens
    assert jax.tree.all(jax.tree.map(lambda g, s: g.sharding.is_equivalent_to(s, g.ndim), grads, sharding))
