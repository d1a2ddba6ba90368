"""HBM traffic, operations and overlap of hand-made programs, with figures counted by hand."""

import pytest

from dapo_jax.runtime.hlo import Module, Traffic, arrays, hbm_bytes


@pytest.mark.parametrize(
    "text, size",
    [
        ("f32[8,128]{1,0:T(8,128)}", 8 * 128 * 4),
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),  # padded to a tile
        ("bf16[3,100]{0,1:T(8,128)(2,1)}", 104 * 128 * 2),  # minor axis first: 3 to 128, 100 to 104
        ("s8[5,200]{1,0:T(32,128)(4,1)}", 32 * 256),
        ("f32[6]{0:T(128)}", 128 * 4),
        ("pred[4,4]{1,0}", 16),
        ("f32[]", 4),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),  # in the core's memory
        ("(f32[2]{0}, bf16[2]{0}, token[])", 12),
    ],
)
def test_bytes_of_a_type(text, size):
    assert hbm_bytes(text) == size


def test_an_array_without_padding():
    (found,) = arrays("bf16[3,100]{1,0:T(8,128)(2,1)S(1)}")
    assert (found.size, found.bits, found.scalar, found.hbm) == (300, 16, False, False)


def program(body: str, *others: str) -> Module:
    return Module("\n".join([*others, "ENTRY %main (p: f32[8,128]) -> f32[] {", body, "}", ""]))


BLOCK = "f32[8,128]{1,0:T(8,128)}"  # 4096 bytes
CACHE = "f32[64,8,128]{2,1,0:T(8,128)}"
CORE = "f32[8,128]{1,0:T(8,128)S(1)}"


def test_operands_are_read_and_results_written():
    module = program(
        f"  %a = {BLOCK} parameter(0)\n"
        f"  %b = {CORE} exponential(%a)\n"  # into the core's memory
        f"  %c = {BLOCK} add(%b, %a)\n"
        f"  ROOT %d = ({BLOCK}) tuple(%c)"
    )
    assert module.traffic() == Traffic(2 * 4096, 4096, 2, 0, 0)
    assert module.traffic(small_bytes=4097) == Traffic(2 * 4096, 4096, 2, 1, 4096)


def test_a_slice_reads_what_it_takes_and_an_update_in_place_writes_what_it_changes():
    module = program(
        f"  %cache = {CACHE} parameter(0)\n"
        "  %i = s32[] parameter(1)\n"
        f"  %new = {BLOCK} dynamic-slice(%cache, %i, %i, %i), dynamic_slice_sizes={{1,8,128}}\n"
        f"  ROOT %put = {CACHE} dynamic-update-slice(%cache, %new, %i, %i, %i)"
    )
    assert module.traffic() == Traffic(2 * 4096, 2 * 4096, 2)


def test_a_grouped_matmul_reads_one_layer_of_a_stack():
    """64 layers; rows, which have two axes, are read whole."""
    module = program(
        f"  %rows = {BLOCK} parameter(0)\n"
        "  %stack = f32[64,2,8,128]{3,2,1,0:T(8,128)} parameter(1)\n"
        f"  ROOT %grouped_matmul.3 = {BLOCK} custom-call(%rows, %stack), "
        'custom_call_target="tpu_custom_call"'
    )
    assert module.traffic() == Traffic(3 * 4096, 4096, 1)


def test_a_fusion_reads_the_slices_inside_it():
    """It takes a block of the cache, adds an operand in the core's memory, and puts the sum back."""
    fused = f"""%fused (cache: f32[], other: f32[], i: s32[]) -> f32[] {{
  %cache = {CACHE} parameter(0)
  %view = {CACHE} bitcast(%cache)
  %other = {CORE} parameter(1)
  %i = s32[] parameter(2)
  %block = {BLOCK} dynamic-slice(%view, %i, %i, %i), dynamic_slice_sizes={{1,8,128}}
  %sum = {BLOCK} add(%block, %other)
  ROOT %put = {CACHE} dynamic-update-slice(%view, %sum, %i, %i, %i)
}}
"""
    module = program(
        f"  %cache = {CACHE} parameter(0)\n  %other = {CORE} parameter(1)\n  %i = s32[] parameter(2)\n"
        f"  ROOT %f = {CACHE} fusion(%cache, %other, %i), kind=kLoop, calls=%fused",
        fused,
    )
    assert module.traffic() == Traffic(4096 + 4, 4096, 1)  # and the index


def test_of_a_conditional_the_branch_that_moves_most_counts():
    """One branch copies a block, one a cache of 64 blocks, as does a loop of 64 turns in another."""

    def branch(name: str, *lines: str) -> str:
        return f"%{name} (x: f32[]) -> f32[] {{\n" + "\n".join(lines) + "\n}\n"

    small = branch("small", f"  %x = {BLOCK} parameter(0)", f"  ROOT %y = {BLOCK} copy(%x)")
    large = branch("large", f"  %x = {CACHE} parameter(0)", f"  ROOT %y = {CACHE} copy(%x)")
    looped = branch(
        "looped",
        f"  %x = {BLOCK} parameter(0)",
        f"  ROOT %w = {BLOCK} while(%x), condition=%until, body=%small",
    )
    until = branch(
        "until",
        "  %n = s32[]{:T(128)} constant(65)",
        "  ROOT %less = pred[]{:T(512)} compare(%n, %n), direction=LT",
    )

    def choose(*names: str) -> Module:
        called = ", ".join(f"%{name}" for name in names)
        main = f"  %i = s32[] parameter(0)\n  ROOT %c = {BLOCK} conditional(%i), "
        body = f"{main}branch_computations={{{called}}}"
        return program(body, small, large, looped, until)

    assert choose("small", "small").traffic() == Traffic(4096, 4096, 1)
    assert choose("small", "large").traffic() == Traffic(64 * 4096, 64 * 4096, 1)
    assert choose("large", "looped", "small").traffic() == Traffic(65 * 4096, 65 * 4096, 65)


def test_a_fusion_that_uses_all_of_an_operand_reads_it_once():
    fused = f"""%fused (x: f32[]) -> f32[] {{
  %x = {CACHE} parameter(0)
  %part = {BLOCK} slice(%x), slice={{[0:1], [0:8], [0:128]}}
  %sum = {BLOCK} reduce(%x, %part), to_apply=%add
  ROOT %both = ({BLOCK}, {BLOCK}) tuple(%sum, %part)
}}
"""
    module = program(
        f"  %x = {CACHE} parameter(0)\n"
        f"  ROOT %f = ({BLOCK}, {BLOCK}) fusion(%x), kind=kLoop, calls=%fused",
        fused,
    )
    assert module.traffic() == Traffic(64 * 4096, 2 * 4096, 1)


LOOPS = f"""%fused_compare (i: s32[]) -> pred[] {{
  %limit = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}

%scan_condition (p: (s32[])) -> pred[] {{
  ROOT %lt = pred[] fusion(%p), kind=kLoop, calls=%fused_compare
}}

%scan_body (p: (s32[])) -> (s32[]) {{
  %x = {BLOCK} copy(%y)
}}

%data_condition (p: (s32[])) -> pred[] {{
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%data_body (p: (s32[])) -> (s32[]) {{
  %one = s32[]{{:T(128)S(6)}} add(%i, %i)
  %while.2 = (s32[]) while(%t), condition=%scan_condition, body=%scan_body
}}
"""


def test_loops_run_as_often_as_they_say_or_as_they_are_told():
    """A copy of 4096 bytes in a scan of 6 in a loop that ends by data. A sum of two numbers is no
    operation.
    """
    module = program("  %w = (s32[]) while(%t), condition=%data_condition, body=%data_body", LOOPS)
    assert module.traffic() == Traffic(0, 6 * 4096, 6)  # %y is unknown
    assert module.traffic(trips=(5,)) == Traffic(0, 30 * 4096, 30)


def test_a_loop_that_compares_with_zero_ends_by_data():
    counted = LOOPS.replace("ROOT %lt = pred[] compare(%i, %n)", "%n = s32[] constant(0)")
    module = program(
        "  %w = (s32[]) while(%t), condition=%data_condition, body=%data_body", counted
    )
    assert module.traffic(trips=(5,)) == Traffic(0, 30 * 4096, 30)


def test_asynchronous_copies_move_bytes_but_are_no_operation():
    sliced = f"""%async (x: f32[]) -> f32[] {{
  %x = {CACHE} parameter(0)
  ROOT %slice = {CORE} slice(%x), slice={{[0:1], [0:8], [0:128]}}
}}
"""
    module = program(
        f"  %x = {BLOCK} parameter(0)\n  %cache = {CACHE} parameter(1)\n"
        f"  %s = ({CORE}, {BLOCK}, u32[]) copy-start(%x)\n"
        f"  %d = {CORE} copy-done(%s)\n"
        f"  %s2 = (({CACHE}), {CORE}, s32[]) async-start(%cache), calls=%async\n"
        f"  %u2 = (({CACHE}), {CORE}, s32[]) async-update(%s2, %x), calls=%async\n"
        f"  %d2 = {CORE} async-done(%u2), calls=%async\n"
        f"  %s3 = (({CACHE}), {BLOCK}, s32[]) slice-start(%cache), slice={{[0:1], [0:8], [0:128]}}\n"
        f"  %d3 = {BLOCK} slice-done(%s3)",
        sliced,
    )
    assert module.traffic() == Traffic(3 * 4096, 4096, 0)


def test_kernels_move_their_operands_and_notes_nothing():
    module = program(
        f"  %x = {BLOCK} parameter(0)\n"
        f'  %k = {BLOCK} custom-call(%x), custom_call_target="tpu_custom_call"\n'
        f'  %n = {CACHE} custom-call(%x), custom_call_target="AllocateBuffer"'
    )
    assert module.traffic() == Traffic(4096, 4096, 1)


def test_a_kernel_of_live_entries_is_counted_without_its_caches():
    operands = "%x, %x, %x, %x, %x, %x, %cache, %cache"  # scalars, new entries, angles; caches
    module = program(
        f"  %x = {BLOCK} parameter(0)\n  %cache = {CACHE} parameter(1)\n"
        f"  %ragged_attention.1 = ({BLOCK}, {CACHE}, {CACHE}) custom-call({operands}), "
        'custom_call_target="tpu_custom_call"'
    )
    assert module.traffic() == Traffic(6 * 4096, 4096, 1)


GATHER = "all-gather{}(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={{0}}"


@pytest.mark.parametrize("between, expected", [("", False), ("  %y = {b} copy(%x)\n", True)])
def test_a_collective_overlaps_if_work_stands_between_its_start_and_its_end(between, expected):
    module = program(
        f"  %x = {BLOCK} parameter(0)\n"
        f"  %s = ({BLOCK}, {CACHE}) {GATHER.format('-start')}\n"
        f"  %view = {BLOCK} bitcast(%x)\n"
        + between.format(b=BLOCK)
        + f"  %d = {CACHE} all-gather-done(%s)\n"
        f"  %sync = {CACHE} {GATHER.format('')}"
    )
    found = {e.instruction.name: module.overlaps(e) for e in module.executed()}
    assert found["s"] == expected and not found["sync"]


def test_a_collective_inside_a_fusion_overlaps_but_for_a_fused_scatter():
    fused = "".join(
        f"%{name} (x: f32[]) -> f32[] {{\n  %{name}.sum = {BLOCK} all-reduce(%x)\n}}\n"
        for name in ("async_collective_fusion.1", "all-reduce-scatter.2")
    )
    module = program(
        f"  %a = {BLOCK} fusion(%x), calls=%async_collective_fusion.1\n"
        f"  %b = {BLOCK} fusion(%x), calls=%all-reduce-scatter.2",
        fused,
    )
    executed = [e for e in module.executed() if e.instruction.opcode == "all-reduce"]
    assert [module.overlaps(e) for e in executed] == [True, False]
