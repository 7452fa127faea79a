"""Triton kernels of the fusion op. `reference.py` says what they mean, `docs/kernels.md` why so.

Two launches do a step, whatever the number of items and modalities:

    K1 `_project_up_kernel`     hidden[r] = act_m(W1_m norm_m(x_r) + b1_m), rows found by address;
                                of a projector of one layer, hidden[r] = norm_m(x_r)
    K2 `_project_down_kernel`   out[slots[r]] = W2_m hidden[r] + b2_m, and the text rows

Both are grouped over modalities by two small int64 tables in device memory, so that nothing is
stacked, padded or concatenated:

    entries [A, 8]   modality, first row, count, address of its first row, row stride in elements,
                     of the first entry the listed slots that are text (PROJECTED), two unused: one
                     a modality with rows, then rows of count 0 up to a power of two that has room
                     for all modalities
    weights [A, 8]   addresses of w1, b1, w2, b2 (0: none), then d, H, row strides of w1, w2; of one
                     layer H is d and w1 0; one a modality
    traits [A, 8]    places of its activation and norm in `reference.py`'s tables, 1 for one layer,
                     addresses of the norm's weight and bias, bits of its eps; behind the weights

With one modality (A = 1) both tables come as arguments instead: two dependent loads less before
the first weight is asked for.

Scalars are not specialised, so a new count never compiles anything; everything that may change
the code is a constexpr, so that `triton.compile` builds exactly what a launch runs:

    ALIGN        elements to which every address and stride is a multiple (16 bytes' worth: full
                 speed; less: correct and slower)
    EVEN_K       every K is a multiple of BLOCK_K: no masks in the loop
    SWAP         the weight rows, not x's, fill the MMA's M (few rows)
    BY_ADDRESS   rows are found through `row_address_ptr` [R] instead of base and stride
    DEPENDENT    K2 may start before K1 ends (programmatic dependent launch, sm_90 and later)
    ACTIVATION   place of the activation of all modalities, or MIXED: each program looks up its own
    NORMS        some modality has a norm
    DIRECT       some modality's projector has one layer
    PROJECTED    some listed slots are of rows that were projected before, and are gathered as text
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import inspect

import triton
import triton.language as tl

from mmqwen_kernels.reference import ACTIVATIONS, NORMS
from mmqwen_kernels.row_tables import NUM_TEXT_FIELD

MIXED = -1
ACTIVATION_PLACES = {name: at for at, name in enumerate(ACTIVATIONS)}
NORM_PLACES = {name: at for at, name in enumerate(NORMS)}

_MIXED = tl.constexpr(MIXED)
_RELU = tl.constexpr(ACTIVATION_PLACES["relu"])
_GELU = tl.constexpr(ACTIVATION_PLACES["gelu"])
_GELU_TANH = tl.constexpr(ACTIVATION_PLACES["gelu_tanh"])
_SILU = tl.constexpr(ACTIVATION_PLACES["silu"])
_NO_ACTIVATION = tl.constexpr(ACTIVATION_PLACES["none"])
_NUM_ACTIVATIONS = tl.constexpr(len(ACTIVATIONS))
_NO_NORM = tl.constexpr(NORM_PLACES["none"])
_LAYER_NORM = tl.constexpr(NORM_PLACES["layer"])
_SUMMED = tl.constexpr(64)
_NUM_TEXT_FIELD = tl.constexpr(NUM_TEXT_FIELD)

ROW_POINTERS = ("hidden_ptr", "out_ptr", "table_ptr")
"""The arguments whose alignment to 16 bytes is compiled in; nothing else of a value is."""


def _kernel(function):
    """`triton.jit` that specialises nothing but the alignment of `ROW_POINTERS`."""
    values = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation != "tl.constexpr" and name not in ROW_POINTERS
    ]
    return triton.jit(function, do_not_specialize=values)


@triton.jit
def _aligned_pointer(address, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """An int64 address as a pointer that is known to be ALIGN elements aligned."""
    return tl.multiple_of(
        address.to(tl.int64).to(tl.pointer_type(DTYPE)), ALIGN * (DTYPE.primitive_bitwidth // 8)
    )


@triton.jit
def _order_tiles(local, tiles_r, tiles_n, GROUP_R: tl.constexpr):
    """(row tile, column tile) of program `local` of `tiles_r` x `tiles_n`."""
    if GROUP_R > 1:
        # Programs that run together share a few row tiles and a few weight tiles: both stay in L2.
        per_group = GROUP_R * tiles_n
        group = local // per_group
        in_group = tl.minimum(tiles_r - group * GROUP_R, GROUP_R)
        within = local - group * per_group
        return group * GROUP_R + within % in_group, within // in_group
    else:
        tile_r = local // tiles_n
        return tile_r, local - tile_r * tiles_n


@triton.jit
def _along_rows(values, SWAP: tl.constexpr):
    """`[BLOCK_R]` values, to be spread over an accumulator's columns."""
    return values[None, :] if SWAP else values[:, None]


@triton.jit
def _along_columns(values, SWAP: tl.constexpr):
    """`[BLOCK_N]` values, to be spread over an accumulator's rows."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def _find_tile(
    pid,
    entries_ptr,
    weights_ptr,
    columns,
    NUM_ENTRIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_R: tl.constexpr,
    COLUMNS_ARE_HIDDEN: tl.constexpr,
):
    """(entry, modality, row tile, column tile, all tiles) of a program.

    Where `pid` lies past all tiles, `pid >= all tiles` and the rest means nothing.
    """
    begin = 0
    entry = 0
    modality = 0
    local = 0
    count_here = 1
    columns_here = 1
    for a in tl.static_range(NUM_ENTRIES):
        m = tl.load(entries_ptr + a * 8).to(tl.int32)
        count = tl.load(entries_ptr + a * 8 + 2).to(tl.int32)
        if COLUMNS_ARE_HIDDEN:  # noqa: SIM108  Triton reads `if` on a constexpr
            n = tl.load(weights_ptr + m * 8 + 5).to(tl.int32)
        else:
            n = columns
        tiles = tl.cdiv(count, BLOCK_R) * tl.cdiv(n, BLOCK_N)
        here = (pid >= begin) & (pid < begin + tiles)
        entry = tl.where(here, a, entry)
        modality = tl.where(here, m, modality)
        local = tl.where(here, pid - begin, local)
        count_here = tl.where(here, count, count_here)
        columns_here = tl.where(here, n, columns_here)
        begin += tiles
    tiles_r, tiles_n = tl.cdiv(count_here, BLOCK_R), tl.cdiv(columns_here, BLOCK_N)
    tile_r, tile_n = _order_tiles(local, tiles_r, tiles_n, GROUP_R)
    return entry, modality, tile_r, tile_n, begin


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The activation of float32 values, which a torch model of DTYPE would round first."""
    if ACTIVATION == _RELU:
        # `where` and not `maximum`: NaN goes through, as in torch. Rounding before changes nothing.
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == _NO_ACTIVATION:
        return x
    else:
        x = x.to(DTYPE).to(tl.float32)
        if ACTIVATION == _GELU:
            return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        elif ACTIVATION == _GELU_TANH:  # (1 + tanh(u)) / 2 is sigmoid(2 u)
            u = x * (1.5957691216057308 + 0.07135481627159856 * x * x)
            return x * tl.sigmoid(u)
        else:
            tl.static_assert(ACTIVATION == _SILU)
            return x * tl.sigmoid(x)


@triton.jit
def _row_statistics(x_ptr, x_rows, width, eps, kind):
    """Mean and inverse root of variance (rms: 0 and of mean square; none: 0 and 1) of rows, fp32.

    In one order whatever the tile, so that a row's bits do not depend on its batch: `_SUMMED`
    partial sums a row in order of k, and those in float64, where their order leaves no trace.

    `x_rows` are int32 offsets `[BLOCK_R, 1]` of the rows from `x_ptr`.
    """
    at = tl.arange(0, _SUMMED)[None, :]
    part = tl.zeros((x_rows.shape[0], _SUMMED), dtype=tl.float32)
    for k in tl.range(0, tl.where(kind == _LAYER_NORM, width, 0), _SUMMED):
        part += tl.load(x_ptr + (x_rows + at + k), mask=at < width - k, other=0.0).to(tl.float32)
    mean = (tl.sum(part.to(tl.float64), axis=1) / width).to(tl.float32)[:, None]
    part = tl.zeros((x_rows.shape[0], _SUMMED), dtype=tl.float32)
    for k in tl.range(0, tl.where(kind == _NO_NORM, 0, width), _SUMMED):
        inside = at < width - k
        x = tl.load(x_ptr + (x_rows + at + k), mask=inside, other=0.0).to(tl.float32)
        away = tl.where(inside, x - mean, 0.0)
        part += away * away
    variance = (tl.sum(part.to(tl.float64), axis=1) / width).to(tl.float32)[:, None]
    return mean, tl.where(kind == _NO_NORM, 1.0, tl.rsqrt(variance + eps))


@triton.jit
def _normalise(x, mean, scale, gamma, beta):
    """x `[BLOCK_R, K]` by its rows' statistics `[BLOCK_R, 1]` and the norm's weights `[1, K]`."""
    scaled = (x.to(tl.float32) - mean) * scale
    return (scaled * gamma.to(tl.float32) + beta.to(tl.float32)).to(x.dtype)


@triton.jit
def _multiply(
    acc,
    x_ptr,
    x_offsets,
    w_ptr,
    w_offsets,
    offs_k,
    width,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    mean=0.0,
    scale=1.0,
    gamma_ptr=None,
    beta_ptr=None,
    NORMS: tl.constexpr = False,
):
    """acc += x w^T over all of `width`, in order of k whatever the tile: no split-K.

    Scalar (or `[BLOCK_R, 1]`) pointers and int32 offsets `[BLOCK_R, BLOCK_K]` and
    `[BLOCK_N, BLOCK_K]`: 64-bit pointer tiles spill. acc is `[BLOCK_N, BLOCK_R]` where SWAP.
    `mean` to `beta_ptr` are for NORMS, which normalises x.
    """
    for k in tl.range(0, width, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptr + (x_offsets + k))
            w = tl.load(w_ptr + (w_offsets + k))
        else:
            # Both sides are masked: what lies past the end may be NaN, and NaN * 0 is NaN.
            inside = (offs_k < width - k)[None, :]
            x = tl.load(x_ptr + (x_offsets + k), mask=inside, other=0.0)
            w = tl.load(w_ptr + (w_offsets + k), mask=inside, other=0.0)
        if NORMS:
            within = (offs_k < width - k)[None, :]
            gamma = tl.load(gamma_ptr + (offs_k + k)[None, :], mask=within, other=0.0)
            beta = tl.load(beta_ptr + (offs_k + k)[None, :], mask=within, other=0.0)
            x = _normalise(x, mean, scale, gamma, beta)
        left = w if SWAP else x
        right = tl.trans(x) if SWAP else tl.trans(w)
        if x.dtype == tl.float32:
            # Sums of BLOCK_K products, then their sum: one run over all of K erred 2 to 5 times as
            # much as cuBLAS. By fma, because `acc + dot` is folded back into one accumulator.
            part = tl.dot(left, right, input_precision=INPUT_PRECISION)
            acc = tl.fma(part, tl.full(part.shape, 1.0, tl.float32), acc)
        else:
            acc = tl.dot(left, right, acc, input_precision=INPUT_PRECISION)
    return acc


@_kernel
def _project_up_kernel(
    entries_ptr,
    weights_ptr,
    row_address_ptr,
    hidden_ptr,
    hidden_stride,
    x_address,
    x_stride,
    count,
    w_address,
    b_address,
    width,
    units,
    w_stride,
    NUM_ENTRIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_R: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    BY_ADDRESS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMS: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """K1. Grid: the row tiles times the hidden tiles of every entry.

    `x_address` to `w_stride` are for one entry.

    hidden `[R, hidden_stride]`, rows in the order of the entries; its address and stride are
    16-byte aligned.
    """
    DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty
    hidden_stride = hidden_stride // 16 * 16
    pid = tl.program_id(0)
    if DEPENDENT:
        # K2 waits for this grid's end before it reads `hidden`; it may be resident before that.
        tl.extra.cuda.gdc_launch_dependents()
    if NUM_ENTRIES == 1:
        tile_r, tile_n = _order_tiles(
            pid, tl.cdiv(count, BLOCK_R), tl.cdiv(units, BLOCK_N), GROUP_R
        )
        first_row = tl.full((), 0, tl.int64)
        modality = 0
    else:
        entry, modality, tile_r, tile_n, _ = _find_tile(
            pid, entries_ptr, weights_ptr, 0, NUM_ENTRIES, BLOCK_R, BLOCK_N, GROUP_R, True
        )
        first_row = tl.load(entries_ptr + entry * 8 + 1)
        count = tl.load(entries_ptr + entry * 8 + 2).to(tl.int32)
        x_address = tl.load(entries_ptr + entry * 8 + 3)
        x_stride = tl.load(entries_ptr + entry * 8 + 4).to(tl.int32)
        w_address = tl.load(weights_ptr + modality * 8)
        b_address = tl.load(weights_ptr + modality * 8 + 1)
        width = tl.load(weights_ptr + modality * 8 + 4).to(tl.int32)
        units = tl.load(weights_ptr + modality * 8 + 5).to(tl.int32)
        w_stride = tl.load(weights_ptr + modality * 8 + 6).to(tl.int32)
    traits_ptr = weights_ptr + (NUM_ENTRIES + modality) * 8
    w_ptr = _aligned_pointer(w_address, DTYPE, ALIGN)
    b_ptr = b_address.to(tl.int64).to(tl.pointer_type(DTYPE))
    # Hints on arguments are lost, so alignment is made by division. Without `units`, the mask of
    # the store is not known to hold in pieces of 16 bytes, and each element is stored alone: K1
    # took 246 us instead of 137 at 8192 rows of 1024, H = 4096.
    width = width // ALIGN * ALIGN
    units = units // ALIGN * ALIGN
    w_stride = w_stride // ALIGN * ALIGN
    # Else ptxas keeps a way around the loop, on which accumulators are set by other instructions
    # than products, and lets every product of a 128x256 tile wait for the one before it (triton
    # 3.6; not 3.7, 3.9): a step of 8192 rows took 502 us instead of 470 (docs/kernels.md).
    if DIRECT:
        direct = tl.load(traits_ptr + 2) != 0
        depth = tl.where(direct, 0, width)
    else:
        tl.assume(width > 0)
        depth = width

    # Rows and units past the end are read from the last one and never stored: no row masks.
    offs_k = tl.arange(0, BLOCK_K)
    begin_r = tile_r * BLOCK_R
    begin_n = tile_n * BLOCK_N
    local_r = tl.arange(0, BLOCK_R)
    local_n = tl.arange(0, BLOCK_N)
    read_r = tl.minimum(local_r, count - 1 - begin_r)
    read_n = tl.minimum(local_n, units - 1 - begin_n)
    w_ptr += begin_n.to(tl.int64) * w_stride
    w_offsets = (read_n * w_stride)[:, None] + offs_k[None, :]
    if BY_ADDRESS:
        address = tl.load(row_address_ptr + first_row + begin_r + read_r)
        x_ptr = _aligned_pointer(address, DTYPE, ALIGN)[:, None]
        x_rows = (read_r * 0)[:, None]
        x_offsets = offs_k[None, :]
    else:
        x_stride = x_stride // ALIGN * ALIGN
        x_ptr = _aligned_pointer(x_address, DTYPE, ALIGN)
        x_ptr += begin_r.to(tl.int64) * x_stride
        x_rows = (read_r * x_stride)[:, None]
        x_offsets = x_rows + offs_k[None, :]
    mean, scale, gamma_ptr, beta_ptr = 0.0, 1.0, w_ptr, w_ptr
    if NORMS:
        kind = tl.load(traits_ptr + 1)
        gamma_ptr = tl.load(traits_ptr + 3).to(tl.pointer_type(DTYPE))
        beta_ptr = tl.load(traits_ptr + 4).to(tl.pointer_type(DTYPE))
        eps = tl.load(traits_ptr + 5).to(tl.int32).to(tl.float32, bitcast=True)
        mean, scale = _row_statistics(x_ptr, x_rows, width, eps, kind)

    bias = tl.load(b_ptr + begin_n + read_n).to(tl.float32)
    mask_r = local_r < count - begin_r
    mask_n = local_n < units - begin_n
    hidden_ptr += (first_row + begin_r) * hidden_stride + begin_n
    acc = tl.zeros((BLOCK_N, BLOCK_R) if SWAP else (BLOCK_R, BLOCK_N), dtype=tl.float32)
    acc = _multiply(
        acc,
        x_ptr,
        x_offsets,
        w_ptr,
        w_offsets,
        offs_k,
        depth,
        BLOCK_K,
        EVEN_K,
        SWAP,
        INPUT_PRECISION,
        mean,
        scale,
        gamma_ptr,
        beta_ptr,
        NORMS,
    )
    acc += _along_columns(bias, SWAP)
    if ACTIVATION == _MIXED:
        place = tl.load(traits_ptr)
        for at in tl.static_range(_NUM_ACTIVATIONS):
            if place == at:
                acc = _activate(acc, at, DTYPE)
    else:
        acc = _activate(acc, ACTIVATION, DTYPE)
    if DIRECT:  # noqa: SIM102  read by Triton's compiler, the next one on the GPU
        if direct:
            units_here = (begin_n + read_n)[None, :]
            x = tl.load(x_ptr + (x_rows + units_here))
            if NORMS:
                gamma, beta = tl.load(gamma_ptr + units_here), tl.load(beta_ptr + units_here)
                x = _normalise(x, mean, scale, gamma, beta)
            acc = tl.trans(x).to(tl.float32) if SWAP else x.to(tl.float32)
    tl.store(
        hidden_ptr + (_along_rows(local_r * hidden_stride, SWAP) + _along_columns(local_n, SWAP)),
        acc.to(DTYPE),
        mask=_along_rows(mask_r, SWAP) & _along_columns(mask_n, SWAP),
    )


@triton.jit
def _gather_text_tile(
    tile,
    ids_ptr,
    text_ptr,
    num_text,
    table_ptr,
    table_stride,
    vocab_start,
    vocab_rows,
    out_ptr,
    out_stride,
    columns,
    LISTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PROJECTED: tl.constexpr,
    entries_ptr,
    ALIGN: tl.constexpr,
):
    """out[t] = table[ids[t] - vocab_start], one tile of `num_text` tokens.

    The tokens are those that `text_ptr` lists, or all up to `num_text`. Zero where the id lies
    outside the table.

    Where PROJECTED, those past the first entry's number of text slots take rows by the addresses
    before the list, in its order; zero where one is 0.
    """
    tiles_d = tl.cdiv(columns, BLOCK_D)
    tile_t = tile // tiles_d
    offs_t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = (tile - tile_t * tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_text
    token = tl.load(text_ptr + offs_t, mask=mask_t, other=0) if LISTED else offs_t
    row = tl.load(ids_ptr + token, mask=mask_t, other=0).to(tl.int64) - vocab_start
    inside = mask_t & (row >= 0) & (row < vocab_rows)
    from_row = (tl.where(inside, row, 0) * table_stride)[:, None]
    to_row = (token * out_stride)[:, None]
    mask_d = (offs_d < columns)[None, :]
    if PROJECTED:
        DTYPE: tl.constexpr = table_ptr.dtype.element_ty
        by_address = mask_t & (offs_t >= tl.load(entries_ptr + _NUM_TEXT_FIELD))
        address = tl.load(text_ptr + offs_t - num_text, mask=by_address, other=0)
        of_text = (table_ptr + tl.where(inside, row, 0) * table_stride).to(tl.int64)
        inside = tl.where(by_address, address != 0, inside)
        address = tl.where(by_address, address, of_text)
        from_ptr = _aligned_pointer(address, DTYPE, ALIGN)[:, None]
        value = tl.load(from_ptr + offs_d[None, :], mask=inside[:, None] & mask_d, other=0.0)
    else:
        value = tl.load(
            table_ptr + from_row + offs_d[None, :], mask=inside[:, None] & mask_d, other=0.0
        )
    tl.store(out_ptr + to_row + offs_d[None, :], value, mask=mask_t[:, None] & mask_d)


@_kernel
def _project_down_kernel(
    entries_ptr,
    weights_ptr,
    hidden_ptr,
    hidden_stride,
    slots_ptr,
    out_ptr,
    out_stride,
    columns,
    ids_ptr,
    text_ptr,
    num_text,
    table_ptr,
    table_stride,
    vocab_start,
    vocab_rows,
    count,
    w_address,
    b_address,
    units,
    w_stride,
    NUM_ENTRIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_R: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    """K2. Grid: the row tiles times the column tiles of every entry, then the text tiles.

    `count` to `w_stride` are for one entry. Text tiles do not wait for K1.

    out `[T, columns]`; slots int64 `[R]`. Without HAS_TOKENS rows are projected alone: row r goes
    to out[r], and there is no text.
    """
    DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty
    hidden_stride = hidden_stride // 16 * 16
    out_stride = out_stride // ALIGN * ALIGN
    table_stride = table_stride // ALIGN * ALIGN
    columns = columns // ALIGN * ALIGN
    # Triton's own dispatch takes an address below 2^31 for an int32, which no branch can change.
    w_address, b_address = w_address.to(tl.int64), b_address.to(tl.int64)
    pid = tl.program_id(0)
    if NUM_ENTRIES == 1:
        tiles_r, tiles_n = tl.cdiv(count, BLOCK_R), tl.cdiv(columns, BLOCK_N)
        tile_r, tile_n = _order_tiles(pid, tiles_r, tiles_n, GROUP_R)
        tiles = tiles_r * tiles_n
    else:
        entry, modality, tile_r, tile_n, tiles = _find_tile(
            pid, entries_ptr, weights_ptr, columns, NUM_ENTRIES, BLOCK_R, BLOCK_N, GROUP_R, False
        )
    if pid < tiles:
        first_row = tl.full((), 0, tl.int64)
        if NUM_ENTRIES > 1:
            first_row = tl.load(entries_ptr + entry * 8 + 1)
            count = tl.load(entries_ptr + entry * 8 + 2).to(tl.int32)
            w_address = tl.load(weights_ptr + modality * 8 + 2)
            b_address = tl.load(weights_ptr + modality * 8 + 3)
            units = tl.load(weights_ptr + modality * 8 + 5).to(tl.int32)
            w_stride = tl.load(weights_ptr + modality * 8 + 7).to(tl.int32)
        w_ptr = _aligned_pointer(w_address, DTYPE, ALIGN)
        units = units // ALIGN * ALIGN
        w_stride = w_stride // ALIGN * ALIGN

        offs_k = tl.arange(0, BLOCK_K)
        begin_r = tile_r * BLOCK_R
        begin_n = tile_n * BLOCK_N
        local_r = tl.arange(0, BLOCK_R)
        local_n = tl.arange(0, BLOCK_N)
        mask_r = local_r < count - begin_r
        mask_n = local_n < columns - begin_n
        read_r = tl.minimum(local_r, count - 1 - begin_r)
        read_n = tl.minimum(local_n, columns - 1 - begin_n)
        w_ptr += begin_n.to(tl.int64) * w_stride
        w_offsets = (read_n * w_stride)[:, None] + offs_k[None, :]
        x_ptr = hidden_ptr + (first_row + begin_r) * hidden_stride
        x_offsets = (read_r * hidden_stride)[:, None] + offs_k[None, :]
        biased = tl.where(b_address != 0, columns - begin_n, 0)
        bias = tl.load(
            b_address.to(tl.int64).to(tl.pointer_type(DTYPE)) + begin_n + local_n,
            mask=local_n < biased,
            other=0.0,
        ).to(tl.float32)
        out_ptr += begin_n
        if HAS_TOKENS:
            slot = tl.load(slots_ptr + first_row + begin_r + local_r, mask=mask_r, other=0)
            to_row = slot * out_stride
        else:
            to_row = (first_row + begin_r + local_r) * out_stride
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
        acc = tl.zeros((BLOCK_N, BLOCK_R) if SWAP else (BLOCK_R, BLOCK_N), dtype=tl.float32)
        acc = _multiply(
            acc,
            x_ptr,
            x_offsets,
            w_ptr,
            w_offsets,
            offs_k,
            units,
            BLOCK_K,
            EVEN_K,
            SWAP,
            INPUT_PRECISION,
        )
        acc += _along_columns(bias, SWAP)
        tl.store(
            out_ptr + _along_rows(to_row, SWAP) + _along_columns(local_n, SWAP),
            acc.to(DTYPE),
            mask=_along_rows(mask_r, SWAP) & _along_columns(mask_n, SWAP),
        )
    elif HAS_TOKENS:
        _gather_text_tile(
            pid - tiles,
            ids_ptr,
            text_ptr,
            num_text,
            table_ptr,
            table_stride,
            vocab_start,
            vocab_rows,
            out_ptr,
            out_stride,
            columns,
            True,
            BLOCK_T,
            BLOCK_D,
            PROJECTED,
            entries_ptr,
            ALIGN,
        )


@_kernel
def _gather_text_kernel(
    ids_ptr,
    table_ptr,
    table_stride,
    vocab_start,
    vocab_rows,
    out_ptr,
    out_stride,
    num_tokens,
    columns,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All tokens are text: a step without rows. Grid: token tiles x column tiles."""
    out_stride = out_stride // ALIGN * ALIGN
    table_stride = table_stride // ALIGN * ALIGN
    columns = columns // ALIGN * ALIGN
    _gather_text_tile(
        tl.program_id(0),
        ids_ptr,
        ids_ptr,
        num_tokens,
        table_ptr,
        table_stride,
        vocab_start,
        vocab_rows,
        out_ptr,
        out_stride,
        columns,
        False,
        BLOCK_T,
        BLOCK_D,
        False,
        ids_ptr,
        ALIGN,
    )
