"""Triton kernels of the masked forward, each with its launcher.

One variant slab is read as a dense matrix, so that the channel is constant along one axis:

    channel-major  [B, C, X]   rows (b, c), columns x     channel = row % C
    channels-last  [B, X, C]   rows (b, x), columns c     channel = column

A program owns one tile of that matrix and walks over all variants, so what the variants share is
read once. Where every sample has gates of its own, the matrix is cut into a block for each; otherwise
there is one block. `masked_forward.py` holds the contract: these launchers expect dense tensors of one
layout and fill what they are given.
"""
# Arguments of a kernel are what Triton makes of them, so they carry no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from singe.errors import KernelError

NUM_WARPS = 4
# Elements of a tile: 8 for each of the 128 threads; 4 in float64. Half of it where the row length
# is odd, since each element then keeps its own address: at most 195 registers became 91.
TILE = 1024
# Columns of a channels-last tile: one 128-byte line of float32. Few, because the gate's partial
# sums are one float32 per tile column: 1/32 of the bytes of grad in float32, 1/16 in 16 bits.
LINE = 32
# Sizes and not values, so that a new batch size compiles nothing new; `row_vectors * VEC` tells
# the compiler the divisibility instead (specialisation only knows 16, and 14 x 14 has only 4).
SIZES = ["variants", "rows", "row_vectors", "channels"]


@triton.jit
def _activate(x, ACT: tl.constexpr):
    # Comparisons, not maximum/minimum: they let a NaN through, as torch does.
    if ACT == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif ACT == "relu6":
        x = tl.where(x <= 0, 0.0, tl.where(x >= 6, 6.0, x))
    elif ACT == "leaky_relu":
        x = tl.where(x > 0, x, x * 0.01)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "hardswish":
        x = tl.where(x <= -3, 0.0, tl.where(x >= 3, x, x * (x + 3) / 6))
    return x


@triton.jit
def _adjoint(grad, x, ACT: tl.constexpr):
    """grad * act'(x); at the kinks what torch's own backward does."""
    if ACT == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACT == "relu6":
        grad = tl.where((x <= 0) | (x >= 6), 0.0, grad)
    elif ACT == "leaky_relu":
        grad = tl.where(x > 0, grad, grad * 0.01)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        grad = grad * (cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACT == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        grad = grad * sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACT == "hardswish":
        grad = tl.where(x <= -3, 0.0, tl.where(x < 3, grad * (x / 3 + 0.5), grad))
    return grad


@triton.jit
def _place(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's block, the number of blocks, and its row and column of tiles in the block."""
    col_tiles = tl.cdiv(cols, COLS)
    tiles = ((rows - 1) // ROWS + 1) * col_tiles  # not cdiv: rows + ROWS may leave int32
    tile = tl.program_id(0) % tiles
    # int64 for everything that is multiplied by a size, but for the offsets inside a tile: a row
    # of 8192 or more columns has tiles of one row (channels-last: at most 32), so they stay far
    # below 2^31. As int64 they would cost a second register per element, which spilled.
    block = (tl.program_id(0) // tiles).to(tl.int64)
    row_tile = (tile // col_tiles).to(tl.int64)
    return block, tl.num_programs(0) // tiles, row_tile, tile % col_tiles


@triton.jit
def _tile(
    row_tile, col_tile, rows, cols, channels,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile's place in its block: base, offsets [ROWS, COLS], mask, channels, their mask."""
    base = row_tile * ROWS * cols + col_tile * COLS
    o_row = tl.arange(0, ROWS)[:, None]
    o_col = tl.arange(0, COLS)[None, :]
    row = row_tile * ROWS + o_row
    col = col_tile * COLS + o_col
    if CHANNELS_LAST:
        channel = col
        channel_mask = col < cols
    else:
        # One wide division per program; per row a 32-bit one (a 64-bit one is ~4x the work).
        first = (row_tile * ROWS % channels).to(tl.int32)
        channel = (first + o_row) % channels
        channel_mask = row < rows
    return base, o_row * cols + o_col, (row < rows) & (col < cols), channel, channel_mask


@triton.jit
def _affine(y, scale, shift, offset, mask, channel, channel_mask, dtype: tl.constexpr):
    """scale * y + shift. bfloat16 is widened right behind the load."""
    value = tl.load(y + offset, mask=mask, other=0.0).to(dtype)
    if scale is not None:
        value = value * tl.load(scale + channel, mask=channel_mask, other=0.0)
    if shift is not None:
        value = value + tl.load(shift + channel, mask=channel_mask, other=0.0)
    return value


@triton.jit(do_not_specialize=SIZES)
def masked_forward_fwd_kernel(
    out, y, gate, scale, shift, residual,
    variants, rows, row_vectors, channels,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    Y_SHARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """out = act(gate[v,(b),c] * (scale[c] * y[(v),b,c,x] + shift[c]) + residual[(v),b,c,x])"""
    dtype: tl.constexpr = gate.dtype.element_ty
    cols = row_vectors * VEC
    block, blocks, row_tile, col_tile = _place(rows, cols, ROWS, COLS)
    base, offset, mask, channel, m_channel = _tile(
        row_tile, col_tile, rows, cols, channels, CHANNELS_LAST, ROWS, COLS
    )
    base += block * rows * cols
    slab = blocks * rows.to(tl.int64) * cols
    gate += block * channels
    row_gate = blocks * channels.to(tl.int64)
    if Y_SHARED:
        b_y = _affine(y + base, scale, shift, offset, mask, channel, m_channel, dtype)
    if RESIDUAL == "shared":
        b_r = tl.load(residual + base + offset, mask=mask, other=0.0).to(dtype)
    if RESIDUAL == "scalar":
        b_r = tl.load(residual).to(dtype)
    for v in range(variants):
        here = base + v * slab
        if not Y_SHARED:
            b_y = _affine(y + here, scale, shift, offset, mask, channel, m_channel, dtype)
        pre = b_y * tl.load(gate + v * row_gate + channel, mask=m_channel, other=0.0)
        if RESIDUAL == "full":
            b_r = tl.load(residual + here + offset, mask=mask, other=0.0).to(dtype)
        if RESIDUAL != "none":
            pre += b_r
        tl.store(out + here + offset, _activate(pre, ACT).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def masked_forward_bwd_kernel(
    grad, y, gate, scale, shift, residual, grad_y, grad_residual, partial,
    variants, rows, row_vectors, channels,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    Y_SHARED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SUM_RESIDUAL: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """With adj = grad * act'(pre), summed over v where the input is shared by the variants:

    grad_residual[(v),b,c,x] = adj[v,b,c,x]
    grad_y[(v),b,c,x]        = adj[v,b,c,x] * gate[v,(b),c] * scale[c]
    partial[v,block,c,tile]  = sum of adj * (scale * y + shift) over the tile's elements of c

    An output that is None is not wanted. `y` is None where no value of it is needed.
    """
    dtype: tl.constexpr = gate.dtype.element_ty
    cols = row_vectors * VEC
    block, blocks, row_tile, col_tile = _place(rows, cols, ROWS, COLS)
    base, offset, mask, channel, m_channel = _tile(
        row_tile, col_tile, rows, cols, channels, CHANNELS_LAST, ROWS, COLS
    )
    base += block * rows * cols
    slab = blocks * rows.to(tl.int64) * cols
    gate += block * channels
    row_gate = blocks * channels.to(tl.int64)
    if Y_SHARED:
        if y is not None:
            b_y = _affine(y + base, scale, shift, offset, mask, channel, m_channel, dtype)
        if grad_y is not None:
            sum_y = tl.zeros([ROWS, COLS], dtype)
    if ACT != "identity":
        if RESIDUAL == "shared":
            b_r = tl.load(residual + base + offset, mask=mask, other=0.0).to(dtype)
        if RESIDUAL == "scalar":
            b_r = tl.load(residual).to(dtype)
    if SUM_RESIDUAL:
        sum_r = tl.zeros([ROWS, COLS], dtype)
    if grad_y is not None and scale is not None:
        b_scale = tl.load(scale + channel, mask=m_channel, other=0.0)
    if partial is not None:
        # Where this tile's sums go: [V, blocks, rows, col_tiles] or, channels-last,
        # [V, blocks, row_tiles, C].
        if CHANNELS_LAST:
            col = col_tile * COLS + tl.arange(0, COLS)
            o_partial = row_tile * cols + col
            m_partial = col < cols
            block_partial = ((rows - 1) // ROWS + 1).to(tl.int64) * cols
        else:
            row = row_tile * ROWS + tl.arange(0, ROWS)
            col_tiles = tl.cdiv(cols, COLS)
            o_partial = row * col_tiles + col_tile
            m_partial = row < rows
            block_partial = rows.to(tl.int64) * col_tiles
        partial += block * block_partial
        slab_partial = blocks * block_partial

    for v in range(variants):
        here = base + v * slab
        adj = tl.load(grad + here + offset, mask=mask, other=0.0).to(dtype)
        if y is not None and not Y_SHARED:
            b_y = _affine(y + here, scale, shift, offset, mask, channel, m_channel, dtype)
        if ACT != "identity" or grad_y is not None:
            b_gate = tl.load(gate + v * row_gate + channel, mask=m_channel, other=0.0)
        if ACT != "identity":
            pre = b_y * b_gate
            if RESIDUAL == "full":
                b_r = tl.load(residual + here + offset, mask=mask, other=0.0).to(dtype)
            if RESIDUAL != "none":
                pre += b_r
            adj = _adjoint(adj, pre, ACT)
        if partial is not None:
            b_partial = tl.sum(tl.where(mask, adj * b_y, 0.0), 0 if CHANNELS_LAST else 1)
            tl.store(partial + v * slab_partial + o_partial, b_partial, mask=m_partial)
        if SUM_RESIDUAL:
            sum_r += adj
        elif grad_residual is not None:
            b_r_out = adj.to(grad_residual.dtype.element_ty)
            tl.store(grad_residual + here + offset, b_r_out, mask=mask)
        if grad_y is not None:
            b_out = adj * b_gate
            if scale is not None:
                b_out = b_out * b_scale
            if Y_SHARED:
                sum_y += b_out
            else:
                b_y_out = b_out.to(grad_y.dtype.element_ty)
                tl.store(grad_y + here + offset, b_y_out, mask=mask)

    if SUM_RESIDUAL:
        tl.store(grad_residual + base + offset, sum_r.to(grad_residual.dtype.element_ty), mask=mask)
    if Y_SHARED and grad_y is not None:
        tl.store(grad_y + base + offset, sum_y.to(grad_y.dtype.element_ty), mask=mask)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when these kernels were defined."""
    return not isinstance(masked_forward_fwd_kernel, triton.JITFunction)


def _tile_shape(length: int, vec: int, itemsize: int, channels_last: bool) -> tuple[int, int]:
    """(ROWS, COLS) of a tile: the widest that leaves at most 1/8 of its lanes beyond the row."""
    elements = TILE // max(1, itemsize // 4) // (2 if vec == 1 else 1)
    narrowest = min(LINE, triton.next_power_of_2(length))
    width = narrowest if channels_last else elements
    while width > narrowest and triton.cdiv(length, width) * width * 8 > length * 9:
        width //= 2
    return elements // width, width


def _configuration(
    out: Tensor, gate: Tensor, channels_last: bool
) -> tuple[int, tuple[int, int], dict[str, Any]]:
    """The number of blocks, (rows, row_vectors) of each, and the constants of the launch."""
    _, batch, channels, spatial = out.shape
    blocks = 1 if gate.dim() == 2 else batch
    batch //= blocks
    # One column per row would waste 31 of 32 lanes: [B, C, 1] is [B, 1, C] as well.
    channels_last = channels_last or spatial == 1
    rows, length = (batch * spatial, channels) if channels_last else (batch * channels, spatial)
    if length >= 2**31 - TILE:
        raise KernelError(f"a row of {length} elements is too long: columns are counted in int32")
    vec = 16 if length % 16 == 0 else 4 if length % 4 == 0 else 1
    high, wide = _tile_shape(length, vec, out.element_size(), channels_last)
    # A sample alone may have few rows, behind pooling a single one. Not so without blocks, where small
    # batches would ask for kernels of their own.
    if blocks > 1 and (fewest := triton.next_power_of_2(rows)) < high:
        high, wide = fewest, min(high * wide // fewest, triton.next_power_of_2(length))
    constants = {"CHANNELS_LAST": channels_last, "VEC": vec, "ROWS": high, "COLS": wide}
    return blocks, (rows, length // vec), constants


def _residual_kind(residual: Tensor | None, variants: int) -> str:
    if residual is None:
        return "none"
    if residual.dim() == 0:
        return "scalar"
    return "full" if residual.shape[0] == variants > 1 else "shared"


def _tiles(rows: int, row_vectors: int, constants: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(rows, constants["ROWS"]), triton.cdiv(
        row_vectors * constants["VEC"], constants["COLS"]
    )


def masked_forward(
    out: Tensor,  # [V, B, C, X]
    y: Tensor,  # [V or 1, B, C, X], laid out as out
    gate: Tensor,  # [V, C] or [V, B, C]
    scale: Tensor | None,  # [C]
    shift: Tensor | None,  # [C]
    residual: Tensor | None,  # [V or 1, B, C, X], laid out as out, or a 0-dim scalar
    act: str,
    channels_last: bool,
) -> None:
    """Fills `out`."""
    if out.numel() == 0:
        return
    variants, channels = gate.shape[0], gate.shape[-1]
    blocks, sizes, constants = _configuration(out, gate, channels_last)
    row_tiles, col_tiles = _tiles(*sizes, constants)
    with torch.cuda.device_of(out):
        masked_forward_fwd_kernel[(blocks * row_tiles * col_tiles,)](
            out, y, gate, scale, shift, residual, variants, *sizes, channels,
            ACT=act, Y_SHARED=y.shape[0] == 1, RESIDUAL=_residual_kind(residual, variants),
            **constants, num_warps=NUM_WARPS,
        )  # fmt: skip


def masked_forward_backward(
    grad: Tensor,  # [V, B, C, X]
    y: Tensor | None,  # [V or 1, B, C, X], laid out as grad; None where its values do not matter
    gate: Tensor,  # [V, C] or [V, B, C]
    scale: Tensor | None,  # [C]
    shift: Tensor | None,  # [C]
    residual: Tensor | None,  # [V or 1, B, C, X], laid out as grad, or a 0-dim scalar
    grad_y: Tensor | None,  # [V or 1, B, C, X], laid out as grad, like all that follow
    grad_residual: Tensor | None,  # [V or 1, B, C, X]
    grad_gate: Tensor | None,  # like gate
    act: str,
    channels_last: bool,
    y_shared: bool,
) -> None:
    """Fills `grad_y`, `grad_residual` and `grad_gate`, each where it is not None."""
    if grad.numel() == 0:
        for empty in (grad_y, grad_residual, grad_gate):
            if empty is not None:
                empty.zero_()
        return
    variants, batch, channels, _ = grad.shape
    blocks, sizes, constants = _configuration(grad, gate, channels_last)
    row_tiles, col_tiles = _tiles(*sizes, constants)
    partial = None
    if grad_gate is not None:
        last = constants["CHANNELS_LAST"]
        sums = (row_tiles, channels, 1) if last else (batch // blocks, channels, col_tiles)
        partial = gate.new_empty(variants, blocks, *sums)
    # With an identity the pre-activation does not matter, nor does the residual then.
    kind = "none" if act == "identity" else _residual_kind(residual, variants)
    sum_residual = grad_residual is not None and grad_residual.shape[0] == 1
    with torch.cuda.device_of(grad):
        masked_forward_bwd_kernel[(blocks * row_tiles * col_tiles,)](
            grad, y, gate, scale, shift, None if kind == "none" else residual,
            grad_y, grad_residual, partial, variants, *sizes, channels,
            ACT=act, Y_SHARED=y_shared, RESIDUAL=kind, SUM_RESIDUAL=sum_residual,
            **constants, num_warps=NUM_WARPS,
        )  # fmt: skip
        if grad_gate is not None and partial is not None:
            # The second stage: no atomics, so the order is fixed by the shapes alone.
            grad_gate.copy_(partial.sum((2, 4), dtype=torch.float64).view_as(grad_gate))
