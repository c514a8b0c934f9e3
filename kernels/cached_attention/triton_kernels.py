"""Triton kernels of `cached_attention`: partial attention over a range of slots, and the log-sum-exp reduce.

Why it is cheap (README.md has the algebra and the counts): codes are never converted. Two bytes of codes are one
16-bit word; masking a field of the word leaves u * 2^k in the low bits of an fp16, a subnormal number that is worth
exactly u * 2^(k-24), and tensor cores multiply subnormals exactly. So a field costs one AND for two values, its factor
2^k is folded into q (keys) or taken out of the accumulator at the end (values), and the loads are plain matrix loads.

One program reads one precision of one (row, KV head): a range of tiles of the high arena, of the low arena, or 32
slots of the tail. Rows of a tile are r = (s * G + g) * q + i: thought s, head g of the group, query i.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_SLOTS = tl.constexpr(128)  # slots of a block at most (quantize/layout.py)
TAIL_TILE = tl.constexpr(32)


@triton.jit
def _field(x, SHIFT: tl.constexpr, BITS: tl.constexpr, INTERPRET: tl.constexpr):
    """The code at bit SHIFT of each 16-bit word as an fp16 worth u * 2^(SHIFT - 24). SHIFT + BITS is at most 8."""
    if INTERPRET:
        return (x & (((1 << BITS) - 1) << SHIFT)).to(tl.float16, bitcast=True)
    if BITS == 4 and SHIFT == 0:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x000f000f;", "=r,r", [x], tl.float16, True, 2)
    elif BITS == 4:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00f000f0;", "=r,r", [x], tl.float16, True, 2)
    elif SHIFT == 0:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00030003;", "=r,r", [x], tl.float16, True, 2)
    elif SHIFT == 2:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x000c000c;", "=r,r", [x], tl.float16, True, 2)
    elif SHIFT == 4:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00300030;", "=r,r", [x], tl.float16, True, 2)
    else:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00c000c0;", "=r,r", [x], tl.float16, True, 2)
    return y


@triton.jit
def _high_bytes(x, INTERPRET: tl.constexpr):
    """The upper byte of each word in the place of the lower one (the bits above it are left undefined)."""
    if INTERPRET:
        return x >> 8
    else:
        return tl.inline_asm_elementwise("shr.b32 $0, $1, 8;", "=r,r", [x], tl.int16, True, 2)


@triton.jit
def _channels(f: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr):
    """Channels of field f of each word: byte 2e + f // H holds, in its field h = (H - 1) & f, channel byte + h * width."""
    H: tl.constexpr = 8 // BITS
    width: tl.constexpr = HEAD_DIM // H
    if BYTES:
        return tl.arange(0, width) + f * width
    else:
        return 2 * tl.arange(0, width // 2) + f // H + ((H - 1) & f) * width


@triton.jit
def _share_of(n_high, n_low, arena_parts, WEIGHT_HIGH: tl.constexpr, WEIGHT_LOW: tl.constexpr):
    """How many of the programs take the high arena, in proportion to the work that its tiles are."""
    cost = n_high * WEIGHT_HIGH + n_low * WEIGHT_LOW
    parts = (arena_parts * n_high * WEIGHT_HIGH + cost // 2) // tl.maximum(cost, 1)
    parts = tl.maximum(parts, tl.minimum(n_high, 1))
    return tl.minimum(parts, arena_parts - tl.minimum(n_low, 1))


@triton.jit
def _row_scale(q_max):
    """2^floor(log2 q_max) and its inverse, exactly."""
    exponent = tl.maximum(q_max, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _packed_part(
    p_q, m_row, limit, p_key, p_value, p_scale, p_min, p_key_scale, p_key_min, p_channel, p_start,
    first, last, factor, p_out, p_lse,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    LIMITS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Tiles [first, last) of a packed arena; tile = TILE slots of a block, BLOCK_SLOTS // TILE tiles a block."""
    H: tl.constexpr = 8 // BITS  # fields of a byte
    BYTES: tl.constexpr = HEAD_DIM * BITS // 16 < 16  # too narrow for matrix products over words
    FIELDS: tl.constexpr = H if BYTES else 2 * H
    WIDTH: tl.constexpr = HEAD_DIM // FIELDS
    TILES: tl.constexpr = BLOCK_SLOTS // TILE
    q = tl.load(p_q[None, :] + tl.arange(0, HEAD_DIM)[:, None], mask=m_row[None, :], other=0)
    power, inverse = _row_scale(tl.max(tl.abs(q.to(tl.float32)), 0))
    planes = ()
    acc = ()
    for f in tl.static_range(FIELDS):
        q = tl.load(p_q[None, :] + _channels(f, HEAD_DIM, BITS, BYTES)[:, None], mask=m_row[None, :], other=0)
        planes = planes + ((q.to(tl.float32) * (inverse * 2.0 ** (4 - BITS * ((H - 1) & f)))[None, :]).to(tl.float16),)
        acc = acc + (tl.zeros([WIDTH, ROWS], tl.float32),)
    score_scale = power * (factor * LOG2E * 2.0**20)
    zeta_scale = power * (factor * LOG2E)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE, ROWS], tl.float32)
    if BYTES:
        p_key, p_value = p_key.to(tl.pointer_type(tl.uint8)), p_value.to(tl.pointer_type(tl.uint8))
    i_word = tl.arange(0, WIDTH)
    for i_tile in tl.range(0, last - first, num_stages=STAGES):
        tile = first + i_tile
        block = tile // TILES
        slot = tl.load(p_start + block) + (tile - block * TILES) * TILE + tl.arange(0, TILE)
        live = slot < tl.load(p_start + block + 1)
        p_block = block.to(tl.int64) * HEAD_DIM
        o_word = slot.to(tl.int64) * WIDTH
        keys = tl.load(p_key + o_word[:, None] + i_word[None, :], mask=live[:, None], other=0)
        values = tl.load(p_value + o_word[None, :] + i_word[:, None], mask=live[None, :], other=0)
        if BYTES:
            keys, values = keys.to(tl.int16), values.to(tl.int16)
        scale = tl.load(p_scale + slot, mask=live, other=0)
        minimum = tl.load(p_min + slot, mask=live, other=0)
        key_scale, key_min, channel = (), (), ()
        for f in tl.static_range(FIELDS):
            p_f = p_block + _channels(f, HEAD_DIM, BITS, BYTES)
            key_scale = key_scale + (tl.load(p_key_scale + p_f),)
            key_min = key_min + (tl.load(p_key_min + p_f),)
            channel = channel + (tl.load(p_channel + p_f),)
        # scores: raw = sum_j (q_j s_j) u_j in units of 2^-20, zeta = q . z through a product of 16 equal rows
        raw = tl.zeros([TILE, ROWS], tl.float32)
        zetas = tl.zeros([16, ROWS], tl.float32)
        for f in tl.static_range(FIELDS):
            word = _high_bytes(keys, INTERPRET) if f >= H else keys
            raw = tl.dot(_field(word, BITS * ((H - 1) & f), BITS, INTERPRET), planes[f] * key_scale[f][:, None], raw)
            zetas += tl.dot(tl.broadcast_to(key_min[f][None, :], [16, WIDTH]), planes[f]) * 2.0 ** (BITS * ((H - 1) & f) - 4)
        zeta = tl.max(zetas, 0) * zeta_scale
        if LIMITS:
            raw = tl.where(live[:, None] & (slot[:, None] < limit[None, :]), raw, float("-inf"))
        else:
            raw = tl.where(live[:, None], raw, float("-inf"))
        # softmax in base 2; weights carry 2^8 so that small ones stay normal numbers in fp16
        peak = tl.maximum(top, tl.max(raw, 0) * score_scale + zeta)
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        weight = tl.exp2(raw * score_scale[None, :] + (zeta - safe + 8.0)[None, :])
        decay = tl.exp2(top - safe)[None, :]
        top = peak
        total = total * decay + weight
        mu = tl.sum(weight * minimum.to(tl.float32)[:, None], 0)
        scaled = (weight * scale.to(tl.float32)[:, None]).to(tl.float16)
        fresh = ()
        for f in tl.static_range(FIELDS):
            word = _high_bytes(values, INTERPRET) if f >= H else values
            start = tl.broadcast_to((mu * 2.0 ** (BITS * ((H - 1) & f) - 24))[None, :], [WIDTH, ROWS])
            part = tl.dot(_field(word, BITS * ((H - 1) & f), BITS, INTERPRET), scaled, start)
            fresh = fresh + (acc[f] * decay + part * channel[f].to(tl.float32)[:, None],)
        acc = fresh
    total = tl.sum(total, 0)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    for f in tl.static_range(FIELDS):
        p_channels = p_out[None, :] + _channels(f, HEAD_DIM, BITS, BYTES)[:, None]
        tl.store(p_channels, acc[f] * (norm * 2.0 ** (24 - BITS * ((H - 1) & f)))[None, :], mask=m_row[None, :])
    tl.store(p_lse, tl.where(total == 0.0, float("-inf"), top + tl.log2(total) - 8.0), mask=m_row)


@triton.jit
def _plain_tile(
    q, p_key, p_value, slot, load, visible, factor, top, total, acc, HEAD_DIM: tl.constexpr, INTERPRET: tl.constexpr
):
    """One tile of 16-bit slots: (scores [T, rows] in base 2, top, total, acc). Slots without `load` are never used."""
    p_tile = slot.to(tl.int64)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    key = tl.load(p_key + p_tile, mask=load[:, None], other=0)
    value = tl.load(p_value + p_tile, mask=load[:, None], other=0)
    if INTERPRET:  # its matrix product does not know bf16
        q, key, value = q.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    score = tl.where(visible, tl.dot(key, q) * (factor * LOG2E), float("-inf"))
    peak = tl.maximum(top, tl.max(score, 0))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(score - safe[None, :])
    decay = tl.exp2(top - safe)
    total = total * decay + tl.sum(weight, 0)
    acc = tl.dot(tl.trans(value), weight.to(value.dtype), acc * decay[None, :])
    return score, peak, total, acc


@triton.jit
def _store_part(acc, top, total, m_row, p_out, p_lse, HEAD_DIM: tl.constexpr):
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out[None, :] + tl.arange(0, HEAD_DIM)[:, None], acc * norm[None, :], mask=m_row[None, :])
    tl.store(p_lse, tl.where(total == 0.0, float("-inf"), top + tl.log2(total)), mask=m_row)


@triton.jit
def _plain_part(
    p_q, m_row, limit, p_key, p_value, first, last, length, factor, p_out, p_lse,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, LIMITS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Tiles [first, last) of TILE slots of a 16-bit arena with `length` slots in use."""
    q = tl.load(p_q[None, :] + tl.arange(0, HEAD_DIM)[:, None], mask=m_row[None, :], other=0)
    acc = tl.zeros([HEAD_DIM, ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i_tile in tl.range(0, last - first, num_stages=STAGES):
        slot = (first + i_tile) * TILE + tl.arange(0, TILE)
        live = slot < length
        visible = live[:, None]
        if LIMITS:
            visible = visible & (slot[:, None] < limit[None, :])
        _, top, total, acc = _plain_tile(
            q, p_key, p_value, slot, live, visible, factor, top, total, acc, HEAD_DIM, INTERPRET
        )
    _store_part(acc, top, total, m_row, p_out, p_lse, HEAD_DIM)


@triton.jit
def _tail_part(
    p_q, m_row, m_mine, first_rows, position, tail_row, kv_head, part, kv_heads, query_length,
    p_tail_key, p_tail_value, p_tail_valid, p_tail_length, tail_width,
    p_total, p_pending, p_accepted, p_scores, factor, p_out, p_lse,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, PENDING: tl.constexpr, SALIENCY: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Slots [part * 32, part * 32 + 32) of one row of the tail, for the rows m_mine that are its own."""
    slot = part * TAIL_TILE + tl.arange(0, TAIL_TILE)
    inside = slot < tail_width
    line = (tail_row * kv_heads + kv_head).to(tl.int64)
    if SALIENCY and first_rows:
        accepted = tl.load(p_accepted)
        i_query = tl.arange(0, PENDING)
        p_fold = p_pending + (line * PENDING + i_query[:, None]) * tail_width + slot[None, :]
        gained = tl.load(p_fold, mask=(i_query < accepted)[:, None] & inside[None, :], other=0.0)
        p_sum = p_total + line * tail_width + slot
        tl.store(p_sum, tl.load(p_sum, mask=inside, other=0.0) + tl.sum(gained, 0), mask=inside)
    length = tl.load(p_tail_length)
    if part * TAIL_TILE < length:
        valid = tl.load(p_tail_valid + tail_row.to(tl.int64) * tail_width + slot, mask=inside, other=0)
        load = inside & (slot < length) & (valid != 0)
        visible = load[:, None] & (slot[:, None] < (length - query_length + 1 + position)[None, :])
        q = tl.load(p_q[None, :] + tl.arange(0, HEAD_DIM)[:, None], mask=m_row[None, :], other=0)
        acc = tl.zeros([HEAD_DIM, ROWS], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        base = line * tail_width * HEAD_DIM
        score, top, total, acc = _plain_tile(
            q, p_tail_key + base, p_tail_value + base, slot, load, visible & m_mine[None, :], factor,
            top, total, acc, HEAD_DIM, INTERPRET,
        )  # fmt: skip
        _store_part(acc, top, total, m_row, p_out, p_lse, HEAD_DIM)
        if SALIENCY:
            tl.store(p_scores[None, :] + slot[:, None], score, mask=m_mine[None, :] & inside[:, None])
    else:
        tl.store(p_lse, tl.full([ROWS], float("-inf"), tl.float32), mask=m_row)


@triton.jit
def _arena_part(
    p_q, m_row, limit, p_key, p_value, p_scale, p_min, p_key_scale, p_key_min, p_channel, p_start, blocks,
    line, slots, capacity, part, parts, factor, p_out, p_lse,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    PLAIN_TILE: tl.constexpr, LIMITS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Part `part` of `parts` of one row and head of an arena: tiles are dealt out evenly, first come the early ones."""
    if BITS == 16:
        length = tl.load(p_start + blocks)
        tiles = tl.cdiv(length, PLAIN_TILE)
    else:
        tiles = blocks * (BLOCK_SLOTS // TILE)
    first = (part * tiles) // parts
    last = ((part + 1) * tiles) // parts
    if first >= last:
        tl.store(p_lse, tl.full([ROWS], float("-inf"), tl.float32), mask=m_row)
    elif BITS == 16:
        base = line * slots * HEAD_DIM
        _plain_part(
            p_q, m_row, limit, p_key + base, p_value + base, first, last, length, factor, p_out, p_lse,
            HEAD_DIM, ROWS, PLAIN_TILE, STAGES, LIMITS, INTERPRET,
        )  # fmt: skip
    else:
        base = line * slots * (HEAD_DIM * BITS // 16)
        p_block = line * capacity * HEAD_DIM
        _packed_part(
            p_q, m_row, limit, p_key + base, p_value + base, p_scale + line * slots, p_min + line * slots,
            p_key_scale + p_block, p_key_min + p_block, p_channel + p_block, p_start, first, last, factor,
            p_out, p_lse, HEAD_DIM, ROWS, BITS, TILE, STAGES, LIMITS, INTERPRET,
        )  # fmt: skip


# sizes that change while a cache grows: one compiled kernel for all of them
SIZES = ["hi_slots", "hi_capacity", "lo_slots", "lo_capacity", "limit_share", "tail_width", "tail_parts"]
SIZES += ["kv_heads", "query_length", "rows", "arena_parts", "parts", "slot_tiles"]
ATTEND_SIZES, REDUCE_SIZES = SIZES[:-2], [*SIZES[7:10], "tail_width", "parts", "slot_tiles"]


@triton.jit(do_not_specialize=ATTEND_SIZES)
def attend_kernel(
    p_query, stride_qb, stride_qh, stride_qi,
    p_hi_key, p_hi_value, p_hi_scale, p_hi_min, p_hi_key_scale, p_hi_key_min, p_hi_channel, p_hi_start, p_hi_blocks,
    p_lo_key, p_lo_value, p_lo_scale, p_lo_min, p_lo_key_scale, p_lo_key_min, p_lo_channel, p_lo_start, p_lo_blocks,
    hi_slots, hi_capacity, lo_slots, lo_capacity,
    p_hi_limit, p_lo_limit, limit_share,
    p_tail_key, p_tail_value, p_tail_valid, p_tail_length, tail_width, tail_parts,
    p_total, p_pending, p_accepted, p_scores,
    p_part_out, p_part_lse, kv_heads, query_length, rows, arena_parts, factor,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HIGH_BITS: tl.constexpr, LOW_BITS: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, WEIGHT_HIGH: tl.constexpr, WEIGHT_LOW: tl.constexpr,
    PLAIN_TILE: tl.constexpr, LIMITS: tl.constexpr, SALIENCY: tl.constexpr, PENDING: tl.constexpr,
    INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """grid (B * Hk, arena_parts + share * tail_parts, row tiles); slots/capacity: of each arena, slots and blocks.

    OVERLAP: the reduce kernel may start its launch while this one runs; it waits for the results itself.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    line = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch = line // kv_heads
    kv_head = line % kv_heads
    per_thought = GROUP * query_length
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    m_row = row < rows
    thought = row // per_thought
    head = kv_head * GROUP + (row % per_thought) // query_length
    position = row % query_length
    query_row = batch * (rows // per_thought) + thought
    p_q = p_query + query_row * stride_qb + head * stride_qh + position * stride_qi
    parts = tl.num_programs(1)
    p_lse = p_part_lse + (line * parts + part) * rows + row
    p_out = p_part_out + ((line * parts + part) * rows + row) * HEAD_DIM
    if part >= arena_parts:
        own = (part - arena_parts) // tail_parts
        _tail_part(
            p_q, m_row, m_row & (thought == own), tl.program_id(2) == 0, position,
            batch * (rows // per_thought) + own, kv_head, (part - arena_parts) % tail_parts, kv_heads, query_length,
            p_tail_key, p_tail_value, p_tail_valid, p_tail_length, tail_width,
            p_total, p_pending, p_accepted, p_scores + (line * rows + row) * tail_width, factor, p_out, p_lse,
            HEAD_DIM, ROWS, PENDING, SALIENCY, INTERPRET,
        )  # fmt: skip
        return
    n_high = tl.load(p_hi_blocks + batch)
    n_low = tl.load(p_lo_blocks + batch)
    parts_high = _share_of(n_high, n_low, arena_parts, WEIGHT_HIGH, WEIGHT_LOW)
    limit = tl.zeros([ROWS], tl.int32)
    o_limit = ((query_row // limit_share) * kv_heads + kv_head) * query_length + position
    if part < parts_high:
        if LIMITS:
            limit = tl.load(p_hi_limit + o_limit, mask=m_row, other=0)
        _arena_part(
            p_q, m_row, limit, p_hi_key, p_hi_value, p_hi_scale, p_hi_min, p_hi_key_scale, p_hi_key_min, p_hi_channel,
            p_hi_start + batch * (hi_capacity + 1), n_high, line, hi_slots, hi_capacity, part, parts_high, factor,
            p_out, p_lse, HEAD_DIM, ROWS, HIGH_BITS, TILE, STAGES, PLAIN_TILE, LIMITS, INTERPRET,
        )  # fmt: skip
    else:
        if LIMITS:
            limit = tl.load(p_lo_limit + o_limit, mask=m_row, other=0)
        _arena_part(
            p_q, m_row, limit, p_lo_key, p_lo_value, p_lo_scale, p_lo_min, p_lo_key_scale, p_lo_key_min, p_lo_channel,
            p_lo_start + batch * (lo_capacity + 1), n_low, line, lo_slots, lo_capacity, part - parts_high,
            arena_parts - parts_high, factor, p_out, p_lse,
            HEAD_DIM, ROWS, LOW_BITS, TILE, STAGES, PLAIN_TILE, LIMITS, INTERPRET,
        )  # fmt: skip


@triton.jit(do_not_specialize=REDUCE_SIZES)
def reduce_kernel(
    p_part_out, p_part_lse, p_out, stride_ob, stride_oh, stride_oi, p_lse,
    p_scores, p_tail_valid, p_tail_length, tail_width, p_pending, p_accepted,
    kv_heads, query_length, rows, parts, slot_tiles,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, PARTS_PADDED: tl.constexpr, CHUNK: tl.constexpr,
    PENDING: tl.constexpr, GROUP_PADDED: tl.constexpr, SLOT_TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """grid (B * Hk, rows + thoughts * slot_tiles): first the rows' outputs, then the saliency of tiles of tail slots."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)
    batch = line // kv_heads
    kv_head = line % kv_heads
    per_thought = GROUP * query_length
    thoughts = rows // per_thought
    i_part = tl.arange(0, PARTS_PADDED)
    p_lses = p_part_lse + line * parts * rows
    if job < rows:
        lses = tl.load(p_lses + i_part * rows + job, mask=i_part < parts, other=float("-inf"))
        top = tl.max(lses, 0)
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(lses - safe), 0)
        acc = tl.zeros([HEAD_DIM], tl.float32)
        i_channel = tl.arange(0, HEAD_DIM)
        for i_chunk in tl.static_range(PARTS_PADDED // CHUNK):  # unrolled: all loads are in flight together
            i_row = i_chunk * CHUNK + tl.arange(0, CHUNK)
            weight = tl.load(p_lses + i_row * rows + job, mask=i_row < parts, other=float("-inf"))
            weight = tl.exp2(weight - safe)
            p_rows = p_part_out + ((line * parts + i_row) * rows + job)[:, None] * HEAD_DIM + i_channel[None, :]
            acc += tl.sum(tl.load(p_rows, mask=(weight > 0)[:, None], other=0.0) * weight[:, None], 0)
        acc = acc / tl.where(total == 0.0, 1.0, total)
        query_row = batch * thoughts + job // per_thought
        head = kv_head * GROUP + (job % per_thought) // query_length
        position = job % query_length
        p_row = p_out + query_row * stride_ob + head * stride_oh + position * stride_oi
        tl.store(p_row + i_channel, acc.to(p_out.dtype.element_ty))
        lse = tl.where(total == 0.0, float("-inf"), (safe + tl.log2(total)) / LOG2E)
        tl.store(p_lse + (query_row * kv_heads * GROUP + head) * query_length + position, lse)
    else:
        thought = (job - rows) // slot_tiles
        slot = ((job - rows) % slot_tiles) * SLOT_TILE + tl.arange(0, SLOT_TILE)
        tail_row = batch * thoughts + thought
        length = tl.load(p_tail_length)
        i_head = tl.arange(0, GROUP_PADDED)
        for i in range(query_length):
            row = thought * per_thought + i_head * query_length + i
            m_part = (i_head < GROUP)[:, None] & (i_part < parts)[None, :]
            lses = tl.load(p_lses + i_part[None, :] * rows + row[:, None], mask=m_part, other=float("-inf"))
            top = tl.max(lses, 1)
            safe = tl.where(top == float("-inf"), 0.0, top)
            lse = safe + tl.log2(tl.maximum(tl.sum(tl.exp2(lses - safe[:, None]), 1), 1e-30))
            own = tl.maximum(length - query_length + i, 0)
            present = tl.load(p_tail_valid + tail_row * tail_width + own) != 0
            m_score = (i_head < GROUP)[:, None] & (slot < tl.minimum(length, tail_width))[None, :] & present
            p_row = p_scores + (line * rows + row)[:, None] * tail_width + slot[None, :]
            score = tl.load(p_row, mask=m_score, other=float("-inf"))
            gained = tl.sum(tl.exp2(score - lse[:, None]), 0)
            p_slot = p_pending + ((tail_row * kv_heads + kv_head) * PENDING + i) * tail_width + slot
            tl.store(p_slot, gained, mask=slot < tail_width)
        if (line == 0) & (job == rows):
            tl.store(p_accepted, query_length)
