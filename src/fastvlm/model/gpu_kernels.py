"""Kernels for an NVIDIA GPU, in Triton, which comes with PyTorch's CUDA builds; compiled on first use, kept on disk.

Imported only where they run (`gpu.kernels`): other builds of PyTorch have no Triton. Each computes what the operators
it stands for compute, with float32 sums.

Letters: `P` images, `H, W` map, `C` channels, `T` tokens, `D` width, `A` query heads, `G` key/value heads, `E` width of
a head, `S` positions in the cache, `N` outputs and `K` inputs of a matrix.
"""

from typing import Any, Final

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor
from triton import language as tl

POSITIONS_A_PROGRAM: Final = 64
"""More positions of a cache than this are shared among several programs a head, 16 at most."""
_ROW: Final = 2**14  # longest row that one program holds


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gelu(x):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _seen(row, step, first, W, is_in, outside, MANY: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, PLR0913
    """MANY neighbours of one row of a map, each a vector of channels."""
    found = ()
    for j in tl.static_range(MANY):
        mask = is_in & (first + j >= 0) & (first + j < W)
        found = found + (tl.load(row + j * step, mask=mask, other=outside).to(tl.float32),)  # type: ignore[assignment] # noqa: RUF005  (Triton knows no star)
    return found


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _add_row(sums, seen, weight, C, KERNEL: tl.constexpr, STRIDE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, PLR0913
    """Add to each sum what one row of the kernel gives."""
    taps = ()
    for j in tl.static_range(KERNEL):
        taps = taps + (tl.load(weight + j * C).to(tl.float32),)  # type: ignore[assignment] # noqa: RUF005
    found = ()
    for k in tl.static_range(len(sums)):
        total = sums[k]
        for j in tl.static_range(KERNEL):
            total += seen[k * STRIDE + j] * taps[j]
        found = found + (total,)  # type: ignore[assignment] # noqa: RUF005
    return found


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _depthwise(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0913
    x, weight, bias, outside, y, H, W, C, OH, OW,  # noqa: ANN001
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, WIDER: tl.constexpr, ACT: tl.constexpr, HAS_OUTSIDE: tl.constexpr,
    COLUMNS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Two rows of COLUMNS outputs, whose sums and inputs stay in registers; a thread holds a few channels of them."""
    tiles = tl.cdiv(OW, COLUMNS)
    ox = (tl.program_id(0) % tiles) * COLUMNS
    oy = (tl.program_id(0) // tiles) * 2
    c = (tl.program_id(1) * BC + tl.arange(0, BC)) % C  # beyond the last the first are computed again
    picture = tl.program_id(2).to(tl.int64)
    step = C // WIDER
    x += picture * H * W * step + c // WIDER
    weight += c
    line = KERNEL * C
    ix, iy = ox * STRIDE - KERNEL // 2, oy * STRIDE - KERNEL // 2
    many: tl.constexpr = (COLUMNS - 1) * STRIDE + KERNEL
    around = tl.load(outside + c // WIDER) if HAS_OUTSIDE else tl.zeros((BC,), x.dtype.element_ty)
    upper = (tl.load(bias + c),) * COLUMNS
    lower = upper
    for i in range(KERNEL + STRIDE):
        at = iy + i
        seen = _seen(x + (at * W + ix) * step, step, ix, W, (at >= 0) & (at < H), around, many)
        if i < KERNEL:
            upper = _add_row(upper, seen, weight + i * line, C, KERNEL, STRIDE)
        if i >= STRIDE:
            lower = _add_row(lower, seen, weight + (i - STRIDE) * line, C, KERNEL, STRIDE)
    y += ((picture * OH + oy) * OW + ox) * C + c
    for k in tl.static_range(COLUMNS):
        high, low = upper[k], lower[k]
        if ACT:
            high, low = _gelu(high), _gelu(low)
        is_in = ox + k < OW
        tl.store(y + k * C, high.to(y.dtype.element_ty), mask=is_in)
        tl.store(y + (OW + k) * C, low.to(y.dtype.element_ty), mask=is_in & (oy + 1 < OH))


def depthwise(  # noqa: PLR0913  (a convolution is described by its shape)
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, has_act: bool, outside: Tensor | None = None
) -> Tensor:
    """Convolve each channel with its own kernel, and GELU where asked for.

    Args:
        x: `(P, C, H, W)`, channels_last.
        weight: `(k, k, C')`, in any format; `C'` is a multiple of `C`: a channel may have several kernels.
        bias: `(C',)` in float32.
        stride: In both directions; half the kernel is padded.
        has_act: Whether GELU follows.
        outside: `(C,)` in the format of `x`, what lies around the map; zeros by default.

    Returns:
        `(P, C', H', W')`, channels_last.
    """
    num_images, num_in, height, width = x.shape
    kernel, _, num_out = weight.shape
    high, wide = (height + stride - 1) // stride, (width + stride - 1) // stride
    y = torch.empty(
        (num_images, num_out, high, wide), device=x.device, dtype=x.dtype, memory_format=torch.channels_last
    )
    columns, channels = 16 if stride == 1 and kernel > 3 else 8, 32 if num_out % 64 else 64
    grid = (triton.cdiv(wide, columns) * triton.cdiv(high, 2), triton.cdiv(num_out, channels), num_images)
    _depthwise[grid](
        x, weight, bias, bias if outside is None else outside, y, height, width, num_out, high, wide,
        KERNEL=kernel, STRIDE=stride, WIDER=num_out // num_in, ACT=has_act, HAS_OUTSIDE=outside is not None,
        COLUMNS=columns, BC=channels, num_warps=1, maxnreg=168,
    )  # fmt: skip
    return y


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _convolve(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0913
    x, weight, bias, y, H, W, N, OH, OW,  # noqa: ANN001
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, INPUTS: tl.constexpr, ACT: tl.constexpr,
    BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BW columns of a row and BN channels, as one product over what a kernel sees, which BK holds."""
    tiles = tl.cdiv(OW, BW)
    at = tl.program_id(0)
    ox = (at % tiles) * BW + tl.arange(0, BW)
    oy = at // tiles
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    picture = tl.program_id(2).to(tl.int64)
    k = tl.arange(0, BK)
    i = k // (INPUTS * KERNEL)
    iy = oy * STRIDE + i - KERNEL // 2
    ix = (ox * STRIDE)[:, None] + (k // INPUTS % KERNEL - KERNEL // 2)[None, :]
    is_n = n < N
    is_in = ((i < KERNEL) & (iy >= 0) & (iy < H))[None, :] & (ix >= 0) & (ix < W)
    offset = ((picture * H + iy[None, :]) * W + ix) * INPUTS + (k % INPUTS)[None, :]
    seen = tl.load(x + offset, mask=is_in, other=0.0)
    matrix = tl.load(weight + k[:, None] * N + n[None, :], mask=(i < KERNEL)[:, None] & is_n[None, :], other=0.0)
    total = tl.dot(seen, matrix, input_precision="ieee")
    total += tl.load(bias + n, mask=is_n, other=0.0)[None, :]
    if ACT:
        total = _gelu(total)
    out = y + ((picture * OH + oy) * OW + ox[:, None]) * N + n[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(ox < OW)[:, None] & is_n[None, :])


def convolve(  # noqa: PLR0913  (a convolution is described by its shape)
    x: Tensor, weight: Tensor, bias: Tensor, *, kernel: int, stride: int, has_act: bool
) -> Tensor:
    """Convolve few channels, such as a picture's three, into many, and GELU where asked for.

    Args:
        x: `(P, C, H, W)`, channels_last.
        weight: `(k * k * C, C')`, like `x`; a row for each row, column and channel that a kernel sees.
        bias: `(C',)` in float32.
        kernel: Its side `k`.
        stride: In both directions; half the kernel is padded.
        has_act: Whether GELU follows.

    Returns:
        `(P, C', H', W')`, channels_last.
    """
    num_images, num_in, height, width = x.shape
    num_out = weight.shape[1]
    high, wide = (height + stride - 1) // stride, (width + stride - 1) // stride
    y = torch.empty(
        (num_images, num_out, high, wide), device=x.device, dtype=x.dtype, memory_format=torch.channels_last
    )
    columns, channels = 64, 32
    grid = (triton.cdiv(wide, columns) * high, triton.cdiv(num_out, channels), num_images)
    _convolve[grid](
        x, weight, bias, y, height, width, num_out, high, wide,
        KERNEL=kernel, STRIDE=stride, INPUTS=num_in, ACT=has_act,
        BW=columns, BN=channels, BK=max(16, triton.next_power_of_2(len(weight))), num_warps=4,
    )  # fmt: skip
    return y


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _matvec(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0913
    x, norm, weight, bias, skip, y, N, K, epsilon,  # noqa: ANN001
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, IS_GATED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BN outputs; a gated one has the gates in the first N rows of the matrix and what they gate in the next N."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    is_n = n < N
    row = n.to(tl.int64) * K
    square = tl.zeros((BK,), tl.float32)
    total = tl.zeros((BN, BK), tl.float32)
    other = tl.zeros((BN, BK), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        is_k = k < K
        value = tl.load(x + k, mask=is_k, other=0.0).to(tl.float32)
        if HAS_NORM:
            square += value * value
            value *= tl.load(norm + k, mask=is_k, other=0.0).to(tl.float32)
        mask = is_n[:, None] & is_k[None, :]
        total += tl.load(weight + row[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32) * value[None, :]
        if IS_GATED:
            below = weight + N.to(tl.int64) * K + row[:, None] + k[None, :]
            other += tl.load(below, mask=mask, other=0.0).to(tl.float32) * value[None, :]
    result = tl.sum(total, 1)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(square, 0) / K + epsilon)
        result *= scale
    if HAS_BIAS:
        result += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)
    if IS_GATED:
        gated = tl.sum(other, 1)
        if HAS_NORM:
            gated *= scale
        result = result * tl.sigmoid(result) * gated
    if HAS_SKIP:
        result += tl.load(skip + n, mask=is_n, other=0.0).to(tl.float32)
    tl.store(y + n, result.to(y.dtype.element_ty), mask=is_n)


def matvec(  # noqa: PLR0913  (a product, and what stands around it)
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """Multiply one vector with a matrix, with what stands before and behind it in a layer.

    Args:
        x: `(K,)`.
        weight: `(N, K)`; `(2 N, K)` when gated: SiLU of what the upper half gives times what the lower half gives.
        norm: Weights of an RMSNorm before it, `(K,)`.
        epsilon: Of that norm.
        bias: `(N,)`.
        skip: Added to the result, `(N,)`.
        is_gated: Whether the matrix holds gates.

    Returns:
        `(N,)` in the format of `x`.
    """
    num_in = weight.shape[1]
    num_out = weight.shape[0] // (2 if is_gated else 1)
    y = torch.empty(num_out, device=x.device, dtype=x.dtype)
    rows, depth, warps = _tile(num_out, num_in, is_gated=is_gated)
    _matvec[(triton.cdiv(num_out, rows),)](
        x, x if norm is None else norm, weight, x if bias is None else bias, x if skip is None else skip, y,
        num_out, num_in, epsilon,
        HAS_NORM=norm is not None, HAS_BIAS=bias is not None, HAS_SKIP=skip is not None, IS_GATED=is_gated,
        BN=rows, BK=depth, num_warps=warps,
    )  # fmt: skip
    return y


def _tile(num_out: int, num_in: int, *, is_gated: bool) -> tuple[int, int, int]:
    """Rows and columns that a program reads at once, and its warps: what was fastest for 0.5b and 7b on an H100."""
    is_small = num_out * num_in < 2**23
    if num_in > 2 * num_out:
        return 2, 2048, 8 if is_small else 2
    if is_gated:
        return (4, 1024, 4) if is_small else (4, 512, 2)
    return (2, 1024, 8) if is_small else (8, 512, 4)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _attend(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0913
    qkv, keys, values, frequencies, position, out, best, weight, capacity, scale,  # noqa: ANN001
    A: tl.constexpr, G: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One query head and a share of the positions; the first of a group also writes the new key and value."""
    head, split = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = A // G
    g = head // group
    e = tl.arange(0, HALF)
    is_e = e < E // 2
    pos = tl.load(position)
    angle = pos.to(tl.float32) * tl.load(frequencies + e, mask=is_e, other=0.0)
    cosine, sine = tl.cos(angle), tl.sin(angle)
    left = tl.load(qkv + head * E + e, mask=is_e, other=0.0).to(tl.float32)
    right = tl.load(qkv + head * E + E // 2 + e, mask=is_e, other=0.0).to(tl.float32)
    query_left, query_right = left * cosine - right * sine, right * cosine + left * sine
    base = (g * capacity).to(tl.int64) * E
    new_key = qkv + (A + g) * E + e
    new_value = qkv + (A + G + g) * E + e
    left = tl.load(new_key, mask=is_e, other=0.0).to(tl.float32)
    right = tl.load(new_key + E // 2, mask=is_e, other=0.0).to(tl.float32)
    key_left, key_right = left * cosine - right * sine, right * cosine + left * sine
    value_left = tl.load(new_value, mask=is_e, other=0.0).to(tl.float32)
    value_right = tl.load(new_value + E // 2, mask=is_e, other=0.0).to(tl.float32)
    if (head % group == 0) & (split == 0):
        at = base + pos * E + e
        tl.store(keys + at, key_left.to(keys.dtype.element_ty), mask=is_e)
        tl.store(keys + at + E // 2, key_right.to(keys.dtype.element_ty), mask=is_e)
        tl.store(values + at, value_left.to(values.dtype.element_ty), mask=is_e)
        tl.store(values + at + E // 2, value_right.to(values.dtype.element_ty), mask=is_e)
    highest = tl.full((), -1e30, tl.float32)
    total = tl.zeros((), tl.float32)
    sum_left = tl.zeros((HALF,), tl.float32)
    sum_right = tl.zeros((HALF,), tl.float32)
    if split == 0:
        highest = tl.sum(query_left * key_left + query_right * key_right, 0) * scale
        total = tl.full((), 1.0, tl.float32)
        sum_left, sum_right = value_left, value_right
    share = tl.cdiv(capacity, SPLITS)
    first = split * share
    last = tl.minimum(pos, first + share)
    for start in range(first, last, BS):
        s = start + tl.arange(0, BS)
        mask = (s < last)[:, None] & is_e[None, :]
        at = base + s[:, None].to(tl.int64) * E + e[None, :]
        scores = tl.sum(tl.load(keys + at, mask=mask, other=0.0).to(tl.float32) * query_left[None, :], 1)
        scores += tl.sum(tl.load(keys + at + E // 2, mask=mask, other=0.0).to(tl.float32) * query_right[None, :], 1)
        scores = tl.where(s < last, scores * scale, -1e30)
        higher = tl.maximum(highest, tl.max(scores, 0))
        shrink = tl.exp(highest - higher)
        share_of = tl.where(s < last, tl.exp(scores - higher), 0.0)
        total = total * shrink + tl.sum(share_of, 0)
        upper = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        lower = tl.load(values + at + E // 2, mask=mask, other=0.0).to(tl.float32)
        sum_left = sum_left * shrink + tl.sum(upper * share_of[:, None], 0)
        sum_right = sum_right * shrink + tl.sum(lower * share_of[:, None], 0)
        highest = higher
    if SPLITS == 1:
        tl.store(out + head * E + e, (sum_left / total).to(out.dtype.element_ty), mask=is_e)
        tl.store(out + head * E + E // 2 + e, (sum_right / total).to(out.dtype.element_ty), mask=is_e)
    else:
        part = head * SPLITS + split
        tl.store(best + part, highest)
        tl.store(weight + part, total)
        tl.store(out + part * E + e, sum_left, mask=is_e)
        tl.store(out + part * E + E // 2 + e, sum_right, mask=is_e)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _combine(parts, best, weight, out, E: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, MANY: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, PLR0913
    """Put the shares of one head together."""
    head = tl.program_id(0)
    s, e = tl.arange(0, MANY), tl.arange(0, WIDE)
    is_s, is_e = s < SPLITS, e < E
    highest = tl.load(best + head * SPLITS + s, mask=is_s, other=-1e30)
    factor = tl.exp(highest - tl.max(highest, 0))
    total = tl.sum(tl.load(weight + head * SPLITS + s, mask=is_s, other=0.0) * factor, 0)
    at = parts + (head * SPLITS + s)[:, None] * E + e[None, :]
    found = tl.load(at, mask=is_s[:, None] & is_e[None, :], other=0.0)
    result = tl.sum(found * factor[:, None], 0) / total
    tl.store(out + head * E + e, result.to(out.dtype.element_ty), mask=is_e)


def attend(  # noqa: PLR0913  (a token, and a layer's cache)
    qkv: Tensor, keys: Tensor, values: Tensor, frequencies: Tensor, position: Tensor, num_heads: int
) -> Tensor:
    """Turn one token's query and key by its position, write key and value into the cache, and attend.

    Args:
        qkv: Queries, keys and values of the token side by side, `((A + 2 G) E,)`.
        keys: Of a layer, `(G, S, E)`; written at the position.
        values: The same.
        frequencies: Angles a position, `(E / 2,)` in float32.
        position: How many positions the cache holds: one whole number on the device.
        num_heads: A.

    Returns:
        `(A E,)`.
    """
    num_kv_heads, capacity, width = keys.shape
    splits = min(16, triton.cdiv(capacity, POSITIONS_A_PROGRAM))
    out = torch.empty(num_heads * width, device=qkv.device, dtype=qkv.dtype)
    parts, best, weight = out, out, out
    if splits > 1:
        parts = torch.empty(num_heads * splits * width, device=qkv.device, dtype=torch.float32)
        best = torch.empty(num_heads * splits, device=qkv.device, dtype=torch.float32)
        weight = torch.empty_like(best)
    _attend[(num_heads, splits)](
        qkv, keys, values, frequencies, position, parts, best, weight, capacity, width**-0.5,
        A=num_heads, G=num_kv_heads, E=width, HALF=triton.next_power_of_2(width // 2), SPLITS=splits, BS=32,
        num_warps=1,
    )  # fmt: skip
    if splits > 1:
        _combine[(num_heads,)](
            parts, best, weight, out,
            E=width, WIDE=triton.next_power_of_2(width), SPLITS=splits, MANY=triton.next_power_of_2(splits),
            num_warps=2,
        )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _turn(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0913
    qkv, keys, values, frequencies, position, query, capacity, num_tokens,  # noqa: ANN001
    A: tl.constexpr, G: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of queries, keys or values of one token."""
    t, head = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, HALF)
    is_e = e < E // 2
    pos = tl.load(position) + t
    at = qkv + (t * (A + 2 * G) + head).to(tl.int64) * E + e
    left = tl.load(at, mask=is_e, other=0.0)
    right = tl.load(at + E // 2, mask=is_e, other=0.0)
    if head < A + G:
        angle = pos.to(tl.float32) * tl.load(frequencies + e, mask=is_e, other=0.0)
        cosine, sine = tl.cos(angle), tl.sin(angle)
        x, y = left.to(tl.float32), right.to(tl.float32)
        left = (x * cosine - y * sine).to(qkv.dtype.element_ty)
        right = (y * cosine + x * sine).to(qkv.dtype.element_ty)
    if head < A:
        out = query + (head * num_tokens + t).to(tl.int64) * E + e
    elif head < A + G:
        out = keys + ((head - A) * capacity + pos).to(tl.int64) * E + e
    else:
        out = values + ((head - A - G) * capacity + pos).to(tl.int64) * E + e
    tl.store(out, left, mask=is_e)
    tl.store(out + E // 2, right, mask=is_e)


def turn(  # noqa: PLR0913  (a token, and a layer's cache)
    qkv: Tensor, keys: Tensor, values: Tensor, frequencies: Tensor, position: Tensor, num_heads: int
) -> Tensor:
    """Turn queries and keys `(T, (A + 2 G) E)` by their positions; write keys and values into the cache.

    Arguments as those of `attend`; the first token stands at `position`.

    Returns:
        The queries, `(A, T, E)`.
    """
    num_kv_heads, capacity, width = keys.shape
    num_tokens = len(qkv)
    query = torch.empty(num_heads, num_tokens, width, device=qkv.device, dtype=qkv.dtype)
    _turn[(num_tokens, num_heads + 2 * num_kv_heads)](
        qkv, keys, values, frequencies, position, query, capacity, num_tokens,
        A=num_heads, G=num_kv_heads, E=width, HALF=triton.next_power_of_2(width // 2), num_warps=1,
    )  # fmt: skip
    return query


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _add_norm(x, more, norm, total, y, D, epsilon, BD: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, PLR0913
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    is_d = d < D
    value = tl.load(x + t * D + d, mask=is_d, other=0.0).to(tl.float32)
    value += tl.load(more + t * D + d, mask=is_d, other=0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty).to(tl.float32)
    tl.store(total + t * D + d, value.to(total.dtype.element_ty), mask=is_d)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + epsilon)
    result = value * scale * tl.load(norm + d, mask=is_d, other=0.0).to(tl.float32)
    tl.store(y + t * D + d, result.to(y.dtype.element_ty), mask=is_d)


def add_norm(x: Tensor, more: Tensor, norm: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Add two maps `(T, D)`; return the sum and its RMSNorm."""
    num_tokens, dim = x.shape
    assert dim <= _ROW
    total, y = torch.empty_like(x), torch.empty_like(x)
    wide = triton.next_power_of_2(dim)
    _add_norm[(num_tokens,)](x, more, norm, total, y, dim, epsilon, BD=wide, num_warps=4 if wide <= 2048 else 8)
    return total, y


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gate(x, y, M, total, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    row, column = at // M, at % M
    gate = tl.load(x + row * 2 * M + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * M + M + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=mask)


def gate(x: Tensor) -> Tensor:
    """SiLU of the left half of `(T, 2 M)` times the right half, `(T, M)`."""
    num_tokens, wide = x.shape
    y = torch.empty(num_tokens, wide // 2, device=x.device, dtype=x.dtype)
    block = 1024
    _gate[(triton.cdiv(y.numel(), block),)](x, y, wide // 2, y.numel(), BLOCK=block, num_warps=4)
    return y


def version() -> Any:
    """Of Triton."""
    return triton.__version__
