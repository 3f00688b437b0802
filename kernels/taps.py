"""The inputs that an output of a resize reads along one axis, and their weights, as in ATen, forward and backward.

Every function works on one axis, on a scalar or on a vector of positions, in the dtype of `scale` = size_in / size_out.
"""

import triton
import triton.language as tl


@triton.jit
def scale_of(size_in, size_out, scale, ACC: tl.constexpr):
    """Return size_in / size_out. The host divides too, but Triton rounds that to float32: float64 divides here."""
    if ACC is tl.float64:
        scale = tl.cast(size_in, ACC) / tl.cast(size_out, ACC)
    return scale


@triton.jit
def cubic(x, a):
    """Return the cubic convolution at a distance x >= 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def support(scale, CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Return how far from its centre an output reads. Only an antialiased filter widens with the scale."""
    half = 2.0 if CUBIC else 1.0
    return half * tl.maximum(scale, 1.0) if ANTIALIAS else half


@triton.jit
def span(o, size_in, size_out, scale, CUBIC: tl.constexpr):
    """Return the inputs [first, end) of an antialiased output o, and its centre. An axis of the same size is copied."""
    center = scale * (o + 0.5)
    reach = support(scale, CUBIC, True)
    same = size_in == size_out
    first = tl.where(same, o, tl.maximum((center - reach + 0.5).to(tl.int32), 0))
    end = tl.where(same, o + 1, tl.minimum((center + reach + 0.5).to(tl.int32), size_in))
    return first, end, center


@triton.jit
def antialias(i, center, scale, CUBIC: tl.constexpr):
    """Return the weight of input i. The weights of an output's inputs do not sum to one yet."""
    x = tl.abs((i - center + 0.5) * tl.where(scale >= 1, 1 / scale, 1.0))
    return cubic(x, -0.5) if CUBIC else tl.maximum(1 - x, 0.0)


@triton.jit
def tap(o, k, size_in, size_out, scale, CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Return (i, weight, valid) of the k-th input that output o reads. Past the last i is any input, not valid."""
    if ANTIALIAS:
        first, end, center = span(o, size_in, size_out, scale, CUBIC)
        i = tl.minimum(first + k, end - 1)
        weight = antialias(i, center, scale, CUBIC)
        valid = first + k < end
    else:
        x = scale * (o + 0.5) - 0.5
        if CUBIC:
            low = tl.minimum(tl.floor(x).to(tl.int32), size_in - 1)
            i = tl.minimum(tl.maximum(low - 1 + k, 0), size_in - 1)
            weight = cubic(tl.abs(x - low - (k - 1)), -0.75)
        else:
            x = tl.maximum(x, 0.0)
            low = tl.minimum(x.to(tl.int32), size_in - 1)
            # An axis that keeps its size reads no neighbour, not even with a weight of 0, which infinity makes NaN.
            i = tl.where(size_in == size_out, low, tl.minimum(low + k, size_in - 1))
            weight = tl.where(k == 0, 1 - (x - low), x - low)
        valid = i >= 0
    return i, weight, valid


@triton.jit
def reader(i, k, size_in, size_out, scale, CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Return (o, weight, valid) of the k-th output that may read input i, and the weight of that input in it."""
    inverse = 1 / scale
    first = tl.floor((i + 0.5 - support(scale, CUBIC, ANTIALIAS)) * inverse - 0.5625).to(tl.int32) + 1
    unclamped = tl.maximum(first, 0) + k
    o = tl.minimum(unclamped, size_out - 1)
    if ANTIALIAS:
        first, end, center = span(o, size_in, size_out, scale, CUBIC)
        weight = antialias(i, center, scale, CUBIC)
        valid = (first <= i) & (i < end)
    else:
        weight = 0 * scale
        valid = o < 0
        for j in tl.static_range(4 if CUBIC else 2):  # at a border several taps of an output are one input
            at, part, _ = tap(o, j, size_in, size_out, scale, CUBIC, False)
            weight += tl.where(at == i, part, 0.0)
            valid |= at == i
    return o, weight, valid & (unclamped < size_out)


@triton.jit
def term(
    t, k, size_in, size_out, scale, sums,
    CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Return (s, weight, valid) of the k-th element of the source that element t of the target sums.

    The source is the input in the forward, and the gradient of the output in the backward. sums: 1 / the sum of each
    output's weights, for an antialiased resize.
    """
    if BACKWARD:
        s, weight, valid = reader(t, k, size_in, size_out, scale, CUBIC, ANTIALIAS)
    else:
        s, weight, valid = tap(t, k, size_in, size_out, scale, CUBIC, ANTIALIAS)
    if ANTIALIAS:
        weight *= tl.load(sums + (s if BACKWARD else t))
    return s, weight, valid
