"""Base product and expand of one site in one persistent kernel for Hopper's warpgroup products: y = x W^T + hm B (+ bias).

What linear_expand (triton_linear.py) computes, at the rate of the library's products. Written in Gluon, Triton's dialect with explicit
layouts, barriers and copies, since it depends on who issues what, and when:

- A program takes tile after tile. One warp starts the copies (`copy_tiles`), eight multiply and store (`multiply_tiles`); what one
  has filled and the others have read is told by barriers in shared memory. So copies run ahead of products, into the next
  tile, too, and go on while a tile is stored.
- The next product is issued before the one before it is waited for, so the tensor cores see no gap between steps.
- hm and B follow x and W through the same buffers: to the pipeline the experts are a few steps more.

For 16-bit numbers; every tensor is read and written by descriptors, which cut off whatever lies beyond it.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
# (the checker sees Python functions where the compiler sees Gluon)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def tile_corner(tile, blocks_t, blocks_o, BLOCK_T: gl.constexpr, BLOCK_O: gl.constexpr, SWEEP: gl.constexpr):
    """First token and first output of a tile: SWEEP token blocks share a column block in L2."""
    band = tile // (SWEEP * blocks_o)
    rows = min(blocks_t - band * SWEEP, SWEEP)
    within = tile % (SWEEP * blocks_o)
    return (band * SWEEP + within % rows) * BLOCK_T, (within // rows) * BLOCK_O


@gluon.jit
def following(slot, phase, BUFFERS: gl.constexpr):
    """The next buffer, and the phase of its barriers."""
    last = slot == BUFFERS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def copy_tiles(
    d_x, d_w, d_h, d_b, filled, emptied, rows, columns, blocks_t, blocks_o, steps_x, steps_r,
    BUFFERS: gl.constexpr, SWEEP: gl.constexpr,
):  # fmt: skip
    """Fills the buffers, step by step of every tile: with tiles of x and W, then of hm and B. One warp."""
    BLOCK_T: gl.constexpr = d_x.block_type.shape[0]
    BLOCK_O: gl.constexpr = d_w.block_type.shape[0]
    BLOCK_I: gl.constexpr = d_x.block_type.shape[1]
    slot, phase = 0, 1  # a barrier that nobody has arrived at counts as through with the phase before its first
    for tile in range(gl.program_id(0), blocks_t * blocks_o, gl.num_programs(0)):
        first_t, first_o = tile_corner(tile, blocks_t, blocks_o, BLOCK_T, BLOCK_O, SWEEP)
        for step in range(steps_x):
            mbarrier.wait(emptied.index(slot), phase)
            bar = filled.index(slot)
            mbarrier.expect(bar, d_x.block_type.nbytes + d_w.block_type.nbytes)
            tma.async_copy_global_to_shared(d_x, [first_t, step * BLOCK_I], bar, rows.index(slot))
            tma.async_copy_global_to_shared(d_w, [first_o, step * BLOCK_I], bar, columns.index(slot))
            slot, phase = following(slot, phase, BUFFERS)
        for step in range(steps_r):
            mbarrier.wait(emptied.index(slot), phase)
            bar = filled.index(slot)
            mbarrier.expect(bar, d_h.block_type.nbytes + d_b.block_type.nbytes)
            tma.async_copy_global_to_shared(d_h, [first_t, step * BLOCK_I], bar, rows.index(slot))
            b_up = columns.index(slot)._reinterpret(d_b.dtype, d_b.block_type.shape, d_b.layout)
            tma.async_copy_global_to_shared(d_b, [step * BLOCK_I, first_o], bar, b_up)
            slot, phase = following(slot, phase, BUFFERS)


@gluon.jit
def multiply_tiles(
    d_b, d_y, p_bias, filled, emptied, rows, columns, leaving, num_out, blocks_t, blocks_o, steps_x, steps_r,
    BIAS: gl.constexpr, BUFFERS: gl.constexpr, SWEEP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Multiplies what the buffers hold and stores y, tile after tile. A buffer is given back when the product after its own has been
    issued, since only then its own has certainly ended."""
    BLOCK_T: gl.constexpr = d_y.block_type.shape[0]
    BLOCK_O: gl.constexpr = d_y.block_type.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_O, 16]
    )
    slot, phase, last = 0, 0, 0
    acc = gl.zeros([BLOCK_T, BLOCK_O], gl.float32, LAYOUT)
    for tile in range(gl.program_id(0), blocks_t * blocks_o, gl.num_programs(0)):
        first_t, first_o = tile_corner(tile, blocks_t, blocks_o, BLOCK_T, BLOCK_O, SWEEP)
        for step in range(steps_x):
            mbarrier.wait(filled.index(slot), phase)
            b_w = columns.index(slot).permute((1, 0))
            acc = warpgroup_mma(rows.index(slot), b_w, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(emptied.index(last), count=1, pred=step > 0)
            last = slot
            slot, phase = following(slot, phase, BUFFERS)
        for _ in range(steps_r):
            mbarrier.wait(filled.index(slot), phase)
            b_up = columns.index(slot)._reinterpret(d_b.dtype, d_b.block_type.shape, d_b.layout)
            acc = warpgroup_mma(rows.index(slot), b_up, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(emptied.index(last), count=1)
            last = slot
            slot, phase = following(slot, phase, BUFFERS)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(emptied.index(last), count=1)
        out = acc
        if BIAS:
            o_o = first_o + gl.arange(0, BLOCK_O, gl.SliceLayout(0, LAYOUT))
            out += gl.load(p_bias + o_o, mask=o_o < num_out, other=0.0).to(gl.float32)[None, :]
        tma.store_wait(0)
        leaving.store(out.to(d_y.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(d_y, [first_t, first_o], leaving)
    tma.store_wait(0)


# sizes are bounds of loops only: code of its own for lengths that are multiples of 16 would only be compiled once more
@gluon.jit(do_not_specialize=["num_tokens", "num_out", "width", "slots"])
def persistent_linear(
    d_x, d_w, d_h, d_b, d_y, p_bias, num_tokens, num_out, width, slots,
    BIAS: gl.constexpr, BUFFERS: gl.constexpr, SWEEP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: programs that are resident at once. x [T, I], W [O, I], hm [T, R], B [R, O], y [T, O]; tiles of x and hm
    [BLOCK_T, BLOCK_I], of W [BLOCK_O, BLOCK_I], of B [BLOCK_I, BLOCK_O]."""
    BLOCK_T: gl.constexpr = d_y.block_type.shape[0]
    BLOCK_O: gl.constexpr = d_y.block_type.shape[1]
    BLOCK_I: gl.constexpr = d_x.block_type.shape[1]
    rows = gl.allocate_shared_memory(d_x.dtype, [BUFFERS, BLOCK_T, BLOCK_I], d_x.layout)
    columns = gl.allocate_shared_memory(d_w.dtype, [BUFFERS, BLOCK_O, BLOCK_I], d_w.layout)
    leaving = gl.allocate_shared_memory(d_y.dtype, [BLOCK_T, BLOCK_O], d_y.layout)
    filled = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(BUFFERS):
        mbarrier.init(filled.index(slot), count=1)
        mbarrier.init(emptied.index(slot), count=1)
    blocks_t, blocks_o = gl.cdiv(num_tokens, BLOCK_T), gl.cdiv(num_out, BLOCK_O)
    steps_x, steps_r = gl.cdiv(width, BLOCK_I), gl.cdiv(slots, BLOCK_I)
    gl.warp_specialize(
        [
            (multiply_tiles, (
                d_b, d_y, p_bias, filled, emptied, rows, columns, leaving, num_out, blocks_t, blocks_o, steps_x, steps_r,
                BIAS, BUFFERS, SWEEP, num_warps,
            )),
            (copy_tiles, (
                d_x, d_w, d_h, d_b, filled, emptied, rows, columns, blocks_t, blocks_o, steps_x, steps_r,
                BUFFERS, SWEEP,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip
