"""What is read out of compiled programs: by hand from a text, and from programs that the CPU's
compiler made.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dapo_jax.config import MeshSection
from dapo_jax.runtime import compiled
from dapo_jax.runtime.compiled import (
    BETWEEN_SLICES,
    Counting,
    Link,
    compile_program,
    device_bytes,
    refused_bytes,
)
from dapo_jax.runtime.hlo import Module
from dapo_jax.runtime.mesh import make_mesh

TEXT = """HloModule jit_f, num_partitions=8

%scan_condition (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%scan_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-gather.1 = bf16[8,100]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%data_condition (p: (s32[], s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%data_body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %while.2 = (s32[], f32[4]) while(%t), condition=%scan_condition, body=%scan_body, metadata={op_name="a"}
  %all-reduce.1 = (f32[10]{0}, f32[]) all-reduce(%a, %b), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%all-reduce-scatter.3 (p: f32[80]) -> f32[10] {
  %all-reduce.5 = f32[80]{0} all-reduce(%p), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add
}

%fused_computation.8 (p: bf16[32]) -> bf16[64] {
  %all-gather.2 = bf16[64]{0:T(8,128)} all-gather(%p), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

%async_collective_fusion.9 (p: bf16[32]) -> bf16[64] {
  %all-gather.3 = bf16[64]{0:T(8,128)S(1)} all-gather(%p), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

%called_computation.11 (p: bf16[8]) -> bf16[32] {
  ROOT %all-gather.56 = bf16[32]{0} all-gather(%p), channel_id=8, replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"

%async_computation (p: bf16[8]) -> bf16[32] {
  ROOT %custom-call.15 = bf16[32]{0} custom-call(%p), custom_call_target="any", called_computations={%called_computation.11}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = (s32[], s32[]) while(%t), condition=%data_condition, body=%data_body
  %fusion.1 = f32[10]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
  %start = (f32[16]{0}, f32[16]{0}, u32[]) collective-permute-start(%a), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %done = f32[16]{0} collective-permute-done(%start)
  %reduce-scatter.1 = f32[5]{0} reduce-scatter(%a), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %again = f32[5]{0} reduce-scatter(%a), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %fusion.2 = bf16[64]{0} fusion(%a), kind=kOutput, calls=%fused_computation.8
  %fusion.3 = bf16[64]{0} fusion(%a), kind=kOutput, calls=%async_collective_fusion.9
  %fusion.4 = bf16[64]{0} fusion(%a), kind=kOutput, calls=%async_collective_fusion.9
  %call-start = ((bf16[8]{0}), bf16[32]{0}) async-start(%a), calls=%async_computation
  %call-done = bf16[32]{0} async-done(%call-start), calls=%async_computation
  ROOT %all-to-all.1 = f32[8]{0} all-to-all(%a), channel_id=6, replica_groups={}, dimensions={0}
}
"""  # noqa: E501


def sent_bytes(text, trips=()):
    """By kind of collective."""
    total = {}
    for link, size in compiled.sent_bytes(Module(text), Counting(trips)).items():
        total[link.kind] = total.get(link.kind, 0) + size
    return total


def test_sent_bytes_by_hand():
    found = sent_bytes(TEXT, trips=(3,))
    assert found == {
        "all-gather": 3 * 6 * 1600 * 3 / 4
        + 128 / 2
        + 64 * 3 / 4,  # a scan of 6 in a loop of 3, one in two fusions, an asynchronous one
        "all-reduce": 3 * 2 * 40 / 2,  # the scalar f32[] is not counted
        "reduce-scatter": 320 * 7 / 8
        + 2 * 20 * 3,  # a fused one, and two that share a channel, as those of `shard_map` do
        "collective-permute": 64,
        "all-to-all": 32 * 7 / 8,
    }
    assert sent_bytes(TEXT)["all-gather"] == 6 * 1600 * 3 / 4 + 128 / 2 + 64 * 3 / 4


def test_bytes_between_slices_by_hand():
    """As libtpu 0.0.52 writes it: a device hands to the host what the other slices get; over three
    slices, in a scan of 6.
    """
    sends = "".join(
        f"  %send.{i} = (f32[{size}]{{0:T(128)}}, u32[]{{:S(2)}}, token[]) send(%a, %b), "
        f"channel_id={i}, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target="{{1,2,3}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}\n'
        for i, (size, kind) in enumerate(
            [(30, "ALL_REDUCE"), (60, "REDUCE_SCATTER"), (100, "ALL_GATHER"), (7, "ONE_TO_ONE")]
        )
    )
    text = TEXT.replace("  %all-gather.1 =", sends + "  %all-gather.1 =")
    assert sent_bytes(text)[BETWEEN_SLICES] == 6 * 4 * (30 * 4 / 3 + 60 * 2 / 3 + 100 * 2 + 7)
    assert {
        kind: size for kind, size in sent_bytes(text).items() if kind != BETWEEN_SLICES
    } == sent_bytes(TEXT)


def test_links_have_the_axes_of_their_devices_and_whether_other_work_runs():
    """Eight devices on 4 x 2 chips: 0 1 / 2 3 / 4 5 / 6 7. All-gathers of groups [2,4] lie along
    both axes, of {0,1} along one.
    """
    coords = [(x, y, 0) for x in range(4) for y in range(2)]
    found = compiled.sent_bytes(Module(TEXT), Counting((3,), coords=coords))
    assert found == {
        Link("all-gather", 2, False): 3 * 6 * 1600 * 3 / 4 + 64 * 3 / 4,  # start, end: no work
        Link("all-gather", 1, True): 128 / 2,  # in fusions
        Link("all-reduce", 1, False): 3 * 2 * 40 / 2,
        Link("reduce-scatter", 2, False): 320 * 7 / 8 + 2 * 20 * 3,
        Link("collective-permute", 1, False): 64,
        Link("all-to-all", 2, False): 32 * 7 / 8,
    }


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", [0, 2, 4, 6]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", [0, 1]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("source_target_pairs={{0,6},{2,0}}", [0, 6]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_the_first_group_of_a_collective(groups, expected):
    assert compiled._group(f", channel_id=1, {groups}, dimensions={{0}}", 8) == expected


def test_a_program_of_this_machine():
    """An all-reduce of [16, 8] numbers a device, 5 times in a scan, in a loop of 2 that ends by
    data.
    """
    mesh = make_mesh(MeshSection(8, 1, 1))

    def local(x, n):
        def step(x, _):
            return jax.lax.psum(x * 2, "data") / 8, None

        return jax.lax.fori_loop(
            0, n[0], lambda i, x: jax.lax.scan(step, x, None, length=5)[0] + i, x
        )

    run = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False
        )
    )
    x = jax.ShapeDtypeStruct((128, 8), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    inputs = x, jax.ShapeDtypeStruct((1,), jnp.int32, sharding=NamedSharding(mesh, P()))
    assert device_bytes(inputs) == 16 * 8 * 4 + 4
    found = compile_program(run.lower(*inputs), device_bytes(inputs), Counting((2,)))
    assert found.fits and found.argument_bytes == device_bytes(inputs)
    assert found.peak_bytes >= found.argument_bytes + found.temp_bytes
    assert found.collectives == {"all-reduce": 2 * 5 * 2 * 512 * 7 / 8}


def test_a_refusal_is_read():
    """As libtpu 0.0.52 writes it."""
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (109.96G) "
        "exceeds available HBM (15.75G). HLO module: jit_update_step."
    )
    assert refused_bytes(message) == int(109.96 * 2**30)
    assert refused_bytes("INTERNAL: something else (1.5G)") is None


def test_other_errors_of_the_compiler_are_not_swallowed():
    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_program(Lowered(), 0)


def test_what_does_not_fit_is_an_answer():
    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: CompileTimeHbmOom: temporaries (2.5G) exceeds available HBM"
            )

    found = compile_program(Lowered(), np.int64(7))
    assert (
        not found.fits
        and found.temp_bytes == 2.5 * 2**30
        and found.peak_bytes == found.temp_bytes + 7
    )
