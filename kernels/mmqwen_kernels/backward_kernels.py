"""Triton kernels of the backward: three or four launches, whatever the number of modalities.

For rows r of modality m at slots s_r, g_r = grad[s_r]; `reference.py` says what is differentiated:

    B1 `_hidden_kernel`             hidden[r] = relu(W1 x_r + b1), where forward did not keep it
    B2 `_hidden_gradient_kernel`    below[r] = (W2^T g_r) where hidden[r] > 0, else 0
    B3 `_weight_gradient_kernel`    dW2 = sum g_r hidden_r^T, db2 = sum g_r,
                                    dW1 = sum below_r x_r^T,  db1 = sum below_r

Rows of `grad` are read at their slots and never copied. Sums run over the rows of a modality in one
order, in float32, with no atomics: gradients are the same bits at every run. `below` may be
`hidden` itself once dW2 is there (B3 is then launched twice).

Up to four modalities share a launch. What stays from step to step is in a table in device memory,
the rest are arguments:

    facts [A, 16] int64   d, H, address and row stride of W1, address of b1, address and row stride
                          of W2, offsets of dW1, db1, dW2, db2 in `flat` (db2: -1 where there is no
                          b2), 5 unused
    n0 .. n3              rows of each; x0 .. x3 and their row strides s0 .. s3

Every address and stride is a multiple of 16 bytes, d, H and D are multiples of 16 bytes' worth of
elements (rows of another width come widened by zeros, and so does W1 where B1 reads it), and no
tensor has 2^31 elements or more: `backward.py` sees to it. Scalars are not
specialised, so that a new count never compiles anything.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from mmqwen_kernels.triton_kernels import (
    _aligned_pointer,
    _along_columns,
    _along_rows,
    _multiply,
    _order_tiles,
)

FACTS = 16


@triton.jit
def _pick(m, a, b, c, d):
    """The m-th of four."""
    return tl.where(m == 0, a, tl.where(m == 1, b, tl.where(m == 2, c, d)))


@triton.jit
def _find_rows(
    pid,
    facts_ptr,
    n0,
    n1,
    n2,
    n3,
    NUM_ENTRIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(entry, its first row, its rows, its hidden units, row tile, unit tile) of a program."""
    begin = 0
    first = 0
    entry = 0
    local = 0
    first_here = 0
    count_here = 1
    units_here = 1
    for m in tl.static_range(NUM_ENTRIES):
        count = _pick(m, n0, n1, n2, n3)
        units = tl.load(facts_ptr + m * 16 + 1).to(tl.int32)
        tiles = tl.cdiv(count, BLOCK_R) * tl.cdiv(units, BLOCK_N)
        here = (pid >= begin) & (pid < begin + tiles)
        entry = tl.where(here, m, entry)
        local = tl.where(here, pid - begin, local)
        first_here = tl.where(here, first, first_here)
        count_here = tl.where(here, count, count_here)
        units_here = tl.where(here, units, units_here)
        begin += tiles
        first += count
    tiles_r = tl.cdiv(count_here, BLOCK_R)
    tiles_n = tl.cdiv(units_here, BLOCK_N)
    tile_r, tile_n = _order_tiles(local, tiles_r, tiles_n, GROUP)
    return entry, first_here, count_here, units_here, tile_r, tile_n


@triton.jit(
    do_not_specialize=[
        "facts_ptr", "hidden_stride", "s0", "s1", "s2", "s3", "n0", "n1", "n2", "n3",
    ]
)  # fmt: skip
def _hidden_kernel(
    facts_ptr,
    hidden_ptr,
    hidden_stride,
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x3_ptr,
    s0,
    s1,
    s2,
    s3,
    n0,
    n1,
    n2,
    n3,
    NUM_ENTRIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """B1. hidden `[R, hidden_stride]`. Grid: row tiles times unit tiles of every entry."""
    DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if tl.float32 == DTYPE else "tf32"
    hidden_stride = hidden_stride // ALIGN * ALIGN
    entry, first, count, units, tile_r, tile_n = _find_rows(
        tl.program_id(0), facts_ptr, n0, n1, n2, n3, NUM_ENTRIES, BLOCK_R, BLOCK_N, GROUP
    )
    fact = facts_ptr + entry * 16
    width = tl.load(fact).to(tl.int32) // ALIGN * ALIGN
    tl.assume(width > 0)  # as in K1
    w_ptr = _aligned_pointer(tl.load(fact + 2), DTYPE, ALIGN)
    w_stride = tl.load(fact + 3).to(tl.int32) // ALIGN * ALIGN
    b_ptr = tl.load(fact + 4).to(tl.pointer_type(DTYPE))
    x_address = _pick(
        entry,
        x0_ptr.to(tl.int64),
        x1_ptr.to(tl.int64),
        x2_ptr.to(tl.int64),
        x3_ptr.to(tl.int64),
    )
    x_stride = _pick(entry, s0, s1, s2, s3) // ALIGN * ALIGN
    offs_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and units past the end are read from the last one and never stored.
    x_offsets = (tl.minimum(offs_r, count - 1) * x_stride)[:, None] + offs_k[None, :]
    w_offsets = (tl.minimum(offs_n, units - 1) * w_stride)[:, None] + offs_k[None, :]
    x_ptr = _aligned_pointer(x_address, DTYPE, ALIGN)
    bias = tl.load(b_ptr + tl.minimum(offs_n, units - 1)).to(tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_R) if SWAP else (BLOCK_R, BLOCK_N), dtype=tl.float32)
    acc = _multiply(
        acc,
        x_ptr,
        x_offsets,
        w_ptr,
        w_offsets,
        offs_k,
        width,
        BLOCK_K,
        EVEN_K,
        SWAP,
        PRECISION,
    )
    acc += _along_columns(bias, SWAP)
    acc = tl.where(acc < 0, 0.0, acc)  # and not `maximum`: NaN goes through, as in torch
    tl.store(
        hidden_ptr
        + first * hidden_stride
        + (_along_rows(offs_r * hidden_stride, SWAP) + _along_columns(offs_n, SWAP)),
        acc.to(DTYPE),
        mask=_along_rows(offs_r < count, SWAP) & _along_columns(offs_n < units, SWAP),
    )


@triton.jit(
    do_not_specialize=[
        "facts_ptr", "grad_stride", "columns", "slots_ptr", "hidden_stride", "n0", "n1", "n2", "n3",
    ]
)  # fmt: skip
def _hidden_gradient_kernel(
    facts_ptr,
    grad_ptr,
    grad_stride,
    columns,
    slots_ptr,
    hidden_ptr,
    below_ptr,
    hidden_stride,
    n0,
    n1,
    n2,
    n3,
    NUM_ENTRIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """B2. below `[R, hidden_stride]`. Grid: row tiles times unit tiles of every entry."""
    DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if tl.float32 == DTYPE else "tf32"
    hidden_stride = hidden_stride // ALIGN * ALIGN
    grad_stride = grad_stride // ALIGN * ALIGN
    columns = columns // ALIGN * ALIGN
    entry, first, count, units, tile_r, tile_n = _find_rows(
        tl.program_id(0), facts_ptr, n0, n1, n2, n3, NUM_ENTRIES, BLOCK_R, BLOCK_N, GROUP
    )
    fact = facts_ptr + entry * 16
    w_ptr = _aligned_pointer(tl.load(fact + 5), DTYPE, ALIGN)
    w_stride = tl.load(fact + 6).to(tl.int32) // ALIGN * ALIGN
    units = units // ALIGN * ALIGN
    offs_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = (offs_n < units)[None, :]
    slot = tl.load(slots_ptr + first + tl.minimum(offs_r, count - 1)).to(tl.int32)
    g_offsets = (slot * grad_stride)[:, None] + offs_k[None, :]
    w_offsets = (offs_k * w_stride)[:, None] + offs_n[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_R) if SWAP else (BLOCK_R, BLOCK_N), dtype=tl.float32)
    tl.assume(columns > 0)  # as in K1
    for k in tl.range(0, columns, BLOCK_K):
        if EVEN_K:
            g = tl.load(grad_ptr + (g_offsets + k))
            w = tl.load(w_ptr + (w_offsets + k * w_stride), mask=mask_n, other=0.0)
        else:
            inside = offs_k < columns - k
            g = tl.load(grad_ptr + (g_offsets + k), mask=inside[None, :], other=0.0)
            w = tl.load(
                w_ptr + (w_offsets + k * w_stride), mask=inside[:, None] & mask_n, other=0.0
            )
        left = tl.trans(w) if SWAP else g
        right = tl.trans(g) if SWAP else w
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    at = _along_rows((first + offs_r) * hidden_stride, SWAP) + _along_columns(offs_n, SWAP)
    inside = _along_rows(offs_r < count, SWAP) & _along_columns(offs_n < units, SWAP)
    hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0)
    # where(hidden <= 0, 0, acc), in words: of a select of floats ptxas holds that it reads
    # accumulators while they are multiplied, and lets every product wait for the one before it.
    bits = acc.to(tl.int32, bitcast=True) & ((hidden <= 0).to(tl.int32) - 1)
    tl.store(below_ptr + at, bits.to(tl.float32, bitcast=True).to(DTYPE), mask=inside)


@triton.jit(
    do_not_specialize=[
        "facts_ptr", "grad_stride", "columns", "slots_ptr", "hidden_stride",
        "s0", "s1", "s2", "s3", "n0", "n1", "n2", "n3",
    ]
)  # fmt: skip
def _weight_gradient_kernel(
    facts_ptr,
    grad_ptr,
    grad_stride,
    columns,
    slots_ptr,
    hidden_ptr,
    below_ptr,
    hidden_stride,
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x3_ptr,
    s0,
    s1,
    s2,
    s3,
    n0,
    n1,
    n2,
    n3,
    flat_ptr,
    NUM_ENTRIES: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS_K: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """B3. Grid: for each entry and each of W2 (SECOND) and W1 (FIRST), bias tiles, then tiles.

    A product is p^T q over the rows: p = g, q = hidden for W2; p = below, q = x for W1.
    """
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    OUT: tl.constexpr = flat_ptr.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if tl.float32 == DTYPE else "tf32"
    hidden_stride = hidden_stride // ALIGN * ALIGN
    grad_stride = grad_stride // ALIGN * ALIGN
    columns = columns // ALIGN * ALIGN
    pid = tl.program_id(0)
    begin = 0
    first_row = 0
    entry = 0
    local = 0
    first = 0
    count = 1
    size_m = 1
    size_n = 1
    is_second = SECOND
    for m in tl.static_range(NUM_ENTRIES):
        rows = _pick(m, n0, n1, n2, n3)
        width = tl.load(facts_ptr + m * 16).to(tl.int32)
        units = tl.load(facts_ptr + m * 16 + 1).to(tl.int32)
        for which in tl.static_range(2):
            if which == 0:
                a = columns
                b = units
            else:
                a = units
                b = width
            # The condition is a constexpr, whose branches Triton picks while compiling.
            if (SECOND and which == 0) or (FIRST and which == 1):
                tiles = tl.where(rows > 0, tl.cdiv(a, BLOCK_M) * (tl.cdiv(b, BLOCK_N) + 1), 0)
                here = (pid >= begin) & (pid < begin + tiles)
                entry = tl.where(here, m, entry)
                local = tl.where(here, pid - begin, local)
                first = tl.where(here, first_row, first)
                count = tl.where(here, rows, count)
                size_m = tl.where(here, a, size_m)
                size_n = tl.where(here, b, size_n)
                if FIRST and SECOND:
                    is_second = tl.where(here, which == 0, is_second)
                begin += tiles
        first_row += rows

    fact = facts_ptr + entry * 16
    size_m = size_m // ALIGN * ALIGN
    size_n = size_n // ALIGN * ALIGN
    x_address = _pick(
        entry,
        x0_ptr.to(tl.int64),
        x1_ptr.to(tl.int64),
        x2_ptr.to(tl.int64),
        x3_ptr.to(tl.int64),
    )
    x_stride = _pick(entry, s0, s1, s2, s3)
    bytes_here = tl.cast(first, tl.int64) * hidden_stride * (DTYPE.primitive_bitwidth // 8)
    if FIRST and SECOND:
        p_address = tl.where(is_second, grad_ptr.to(tl.int64), below_ptr.to(tl.int64) + bytes_here)
        p_stride = tl.where(is_second, grad_stride, hidden_stride)
        q_address = tl.where(is_second, hidden_ptr.to(tl.int64) + bytes_here, x_address)
        q_stride = tl.where(is_second, hidden_stride, x_stride)
        weight_at = tl.load(fact + tl.where(is_second, 9, 7))
        bias_at = tl.load(fact + tl.where(is_second, 10, 8))
    elif SECOND:
        p_address = grad_ptr.to(tl.int64)
        p_stride = grad_stride
        q_address = hidden_ptr.to(tl.int64) + bytes_here
        q_stride = hidden_stride
        weight_at = tl.load(fact + 9)
        bias_at = tl.load(fact + 10)
    else:
        p_address = below_ptr.to(tl.int64) + bytes_here
        p_stride = hidden_stride
        q_address = x_address
        q_stride = x_stride
        weight_at = tl.load(fact + 7)
        bias_at = tl.load(fact + 8)
    weight_at = weight_at // ALIGN * ALIGN  # so that stores are 16 bytes wide
    p_ptr = _aligned_pointer(p_address, DTYPE, ALIGN)
    q_ptr = _aligned_pointer(q_address, DTYPE, ALIGN)
    p_stride = p_stride // ALIGN * ALIGN
    q_stride = q_stride // ALIGN * ALIGN

    tiles_m = tl.cdiv(size_m, BLOCK_M)
    if local < tiles_m:  # names of its own: Triton joins the types of both branches' variables
        bias_m = local * BLOCK_M + tl.arange(0, BLOCK_M)
        bias_k = tl.arange(0, BIAS_K)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for j in tl.range(0, count, BIAS_K):
            bias_inside = bias_k < count - j
            bias_row = j + bias_k
            if SECOND:
                bias_slot = tl.load(slots_ptr + first + j + bias_k, mask=bias_inside, other=0).to(
                    tl.int32
                )
                bias_row = tl.where(is_second, bias_slot, bias_row) if FIRST else bias_slot
            part = tl.load(
                p_ptr + ((bias_row * p_stride)[:, None] + bias_m[None, :]),
                mask=bias_inside[:, None] & (bias_m < size_m)[None, :],
                other=0.0,
            )
            total += tl.sum(part.to(tl.float32), axis=0)
        written = tl.where(bias_at < 0, 0, size_m)
        tl.store(flat_ptr + bias_at + bias_m, total.to(OUT), mask=bias_m < written)
    else:
        tile_m, tile_n = _order_tiles(local - tiles_m, tiles_m, tl.cdiv(size_n, BLOCK_N), GROUP)
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = offs_m < size_m
        mask_n = offs_n < size_n
        offs_k = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, count, BLOCK_K):
            inside = offs_k < count - k
            at = k + offs_k
            if SECOND:
                slot = tl.load(slots_ptr + first + k + offs_k, mask=inside, other=0).to(tl.int32)
                at = tl.where(is_second, slot, at) if FIRST else slot
            p = tl.load(
                p_ptr + ((at * p_stride)[:, None] + offs_m[None, :]),
                mask=inside[:, None] & mask_m[None, :],
                other=0.0,
            )
            q = tl.load(
                q_ptr + (((k + offs_k) * q_stride)[:, None] + offs_n[None, :]),
                mask=inside[:, None] & mask_n[None, :],
                other=0.0,
            )
            acc = tl.dot(tl.trans(p), q, acc, input_precision=PRECISION)
        to = flat_ptr + weight_at + (offs_m.to(tl.int64) * size_n)[:, None] + offs_n[None, :]
        tl.store(to, acc.to(OUT), mask=mask_m[:, None] & mask_n[None, :])
