"""Resize and normalise in one pass, and the gradient of the image in gather form.

Both directions sum a few elements of a source for each element of a target, rows first. Stretches of source rows are
read in order, as vectors, and summed with their weights into one row, from which the columns are then gathered on the
chip. So each source row is read once per target row, and an antialiased filter costs its height plus its width.
"""

import triton
import triton.language as tl

from .store import store
from .taps import scale_of, tap, term


@triton.jit
def offset(c, y, x, h, w, PATCH: tl.constexpr):
    """Return the offset of an output's value in [3, h, w], or in its patches [(h/p) (w/p), 3 p p]."""
    y = tl.cast(y, tl.int64)  # offsets of rows pass 2**31
    if PATCH:
        row = (y // PATCH * (w // PATCH) * 3 + c) * PATCH * PATCH + y % PATCH * PATCH
        at = row + (x // PATCH * (3 * PATCH * PATCH) + x % PATCH)
    else:
        at = (tl.cast(h, tl.int64) * c + y) * w + x
    return at


@triton.jit
def weigh_rows(
    source, inside,  # of one image; inside: whether each output was not clipped, None without a clamp
    y, start, sums, stride_c, stride_y, stride_x, H, W, h, w, scale_y, taps_y,
    CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr, BACKWARD: tl.constexpr, INTERLEAVED: tl.constexpr,
    PATCH: tl.constexpr, SEGMENT: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum the source rows of row y of the target with their weights, from column `start` on.

    The result is one row per channel, or with INTERLEAVED a single row in which the channels take turns.
    """
    PIXEL: tl.constexpr = 3 if INTERLEAVED else 1
    LANES: tl.constexpr = SEGMENT * 4 if INTERLEAVED else SEGMENT
    lane = tl.arange(0, LANES)
    width = w if BACKWARD else W
    column = start + lane // PIXEL
    live = (lane < SEGMENT * PIXEL) & (start * PIXEL + lane < width * PIXEL)
    r = tl.zeros((LANES,), ACC)
    g = tl.zeros((LANES,), ACC)
    b = tl.zeros((LANES,), ACC)
    for turn in range(0, taps_y, STEP):
        for j in tl.static_range(STEP):
            row, weight, valid = term(y, turn + j, H, h, scale_y, sums, CUBIC, ANTIALIAS, BACKWARD)
            if ANTIALIAS or BACKWARD:
                weight = tl.where(valid, weight, 0.0)
                valid = live & valid
            else:
                valid = live
            if INTERLEAVED:
                # Four elements a thread: more would meet in the banks of shared memory.
                at = tl.max_contiguous(source + tl.cast(row, tl.int64) * stride_y + start * 3 + lane, 4)
                # Upcast right at the load: half precision must not reach the products.
                r += weight * tl.load(at, mask=valid, other=0).to(ACC)
            elif BACKWARD:
                for c in tl.static_range(3):
                    at = offset(c, row, column, h, w, PATCH)
                    value = tl.load(source + at, mask=valid, other=0).to(ACC)
                    if inside is not None:
                        value = tl.where(tl.load(inside + at, mask=valid, other=0) != 0, value, 0.0)
                    if c == 0:
                        r += weight * value
                    elif c == 1:
                        g += weight * value
                    else:
                        b += weight * value
            else:
                at = source + tl.cast(row, tl.int64) * stride_y + column.to(tl.int64) * stride_x
                r += weight * tl.load(at, mask=valid, other=0).to(ACC)
                g += weight * tl.load(at + stride_c, mask=valid, other=0).to(ACC)
                b += weight * tl.load(at + 2 * tl.cast(stride_c, tl.int64), mask=valid, other=0).to(ACC)
    if INTERLEAVED:
        g = r
        b = r
    return r, g, b


@triton.jit
def place(
    x, k, start, W, w, scale_x, sums, CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr, BACKWARD: tl.constexpr,
    PIXEL: tl.constexpr, SEGMENT: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Return (at, weight, valid): the place in the segment of the k-th element of a column. ALL: all are valid."""
    s, weight, valid = term(x, k, W, w, scale_x, sums, CUBIC, ANTIALIAS, BACKWARD)
    at = s - start
    if not ALL:
        valid = valid & (at >= 0) & (at < SEGMENT)
        at = tl.where(valid, at, 0)
    return at * PIXEL, weight, valid


@triton.jit
def add(total, value, weight, valid, ALL: tl.constexpr):
    """Add a weighted value unless it is not valid: a weight of 0 would not do, since the value may be infinite."""
    value = weight * value
    return total + (value if ALL else tl.where(valid, value, 0.0))


@triton.jit
def add_tap(total, row, offset, one):
    """Add one tap of each column."""
    return add(total, tl.gather(row, one[0] + offset, 0), one[1], one[2], False)


@triton.jit
def add_pair(total, row, offset, one, two, ALL: tl.constexpr):
    """Add two taps of each column by one gather, so that the row goes to shared memory once for both."""
    count: tl.constexpr = total.shape[0]
    at = tl.reshape(tl.join(one[0], two[0]), (2 * count,))
    first, second = tl.split(tl.reshape(tl.gather(row, at + offset, 0), (count, 2)))
    total = add(total, first, one[1], one[2], ALL)
    return add(total, second, two[1], two[2], ALL)


@triton.jit
def resample_segment(
    source, inside, y, x, start, sums, stride_c, stride_y, stride_x, H, W, h, w, scale_y, scale_x, taps_y, taps_x,
    CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr, BACKWARD: tl.constexpr, INTERLEAVED: tl.constexpr,
    PATCH: tl.constexpr, SEGMENT: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum what the source's columns [start, start + SEGMENT) add to one row of the target, in three channels."""
    FIXED: tl.constexpr = not (ANTIALIAS or BACKWARD)  # every row and column has as many taps
    TAPS: tl.constexpr = 4 if CUBIC else 2
    ALL: tl.constexpr = FIXED and WHOLE
    PIXEL: tl.constexpr = 3 if INTERLEAVED else 1  # elements from one pixel to the next, on the chip
    r, g, b = weigh_rows(
        source, inside, y, start, sums, stride_c, stride_y, stride_x, H, W, h, w, scale_y, TAPS if FIXED else taps_y,
        CUBIC, ANTIALIAS, BACKWARD, INTERLEAVED, PATCH, SEGMENT, TAPS if FIXED else 1, ACC,
    )  # fmt: skip
    red = tl.zeros(x.shape, ACC)
    green = tl.zeros(x.shape, ACC)
    blue = tl.zeros(x.shape, ACC)
    if FIXED:
        for k in tl.static_range(0, TAPS, 2):
            one = place(x, k, start, W, w, scale_x, sums, CUBIC, False, False, PIXEL, SEGMENT, ALL)
            two = place(x, k + 1, start, W, w, scale_x, sums, CUBIC, False, False, PIXEL, SEGMENT, ALL)
            red = add_pair(red, r, 0, one, two, ALL)
            green = add_pair(green, g, PIXEL // 3, one, two, ALL)
            blue = add_pair(blue, b, PIXEL // 3 * 2, one, two, ALL)
    else:  # two at a time would take too many registers
        for k in range(taps_x):
            one = place(
                x, k, start, W, w, scale_x, sums + h if ANTIALIAS else sums,
                CUBIC, ANTIALIAS, BACKWARD, PIXEL, SEGMENT, False,
            )  # fmt: skip
            red = add_tap(red, r, 0, one)
            green = add_tap(green, g, PIXEL // 3, one)
            blue = add_tap(blue, b, PIXEL // 3 * 2, one)
    return red, green, blue


@triton.jit
def resample(
    source, inside, y, x, first, last,  # a row of the target, its columns, and the columns of the source that they read
    sums, stride_c, stride_y, stride_x, H, W, h, w, scale_y, scale_x, taps_y, taps_x,
    CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr, BACKWARD: tl.constexpr, INTERLEAVED: tl.constexpr,
    PATCH: tl.constexpr, SEGMENT: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute the three channels of a row of the target. WHOLE: one segment holds all the columns that it reads."""
    start = tl.multiple_of(first // 16 * 16, 16)
    red, green, blue = resample_segment(
        source, inside, y, x, start, sums, stride_c, stride_y, stride_x, H, W, h, w, scale_y, scale_x, taps_y, taps_x,
        CUBIC, ANTIALIAS, BACKWARD, INTERLEAVED, PATCH, SEGMENT, WHOLE, ACC,
    )  # fmt: skip
    if not WHOLE:
        for further in range(start + SEGMENT, last + 1, SEGMENT):
            more = resample_segment(
                source, inside, y, x, tl.multiple_of(further, 16), sums, stride_c, stride_y, stride_x, H, W, h, w,
                scale_y, scale_x, taps_y, taps_x,
                CUBIC, ANTIALIAS, BACKWARD, INTERLEAVED, PATCH, SEGMENT, WHOLE, ACC,
            )  # fmt: skip
            red += more[0]
            green += more[1]
            blue += more[2]
    return red, green, blue


@triton.jit
def normalise(pixel, SCALE: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr):
    """Return pixel * SCALE + SHIFT."""
    return pixel * tl.full((), SCALE, ACC) + tl.full((), SHIFT, ACC)


@triton.jit
def resize_fwd_kernel(
    images, sums,  # images [B, 3, H, W] of any strides; sums [h + w], 1 / the sums of the weights, if antialiased
    out, inside,  # one of them None, laid out as `offset` says: the result, or whether a pixel is not clipped
    stride_b, stride_c, stride_y, stride_x, H, W, h, w, rows, scale_y, scale_x, taps_y, taps_x,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, CLIP: tl.constexpr, CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr, PATCH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr, WHOLE: tl.constexpr, ACTIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns `rows` rows of COLUMNS columns of one image in three channels, so that the weights of its columns
    # are computed once for all of them.
    blocks = tl.cdiv(h, rows)
    image = (tl.program_id(0) // blocks).to(tl.int64)  # int64: image * stride passes 2**31
    top = tl.program_id(0) % blocks * rows
    left = tl.program_id(1) * COLUMNS
    right = tl.minimum(left + COLUMNS, w)
    # A warp's lanes own neighbouring columns, which lie in different banks of shared memory. Where those of 32 columns
    # would meet, only the first ACTIVE lanes own one.
    lane = tl.arange(0, BLOCK)
    column = left + lane // 32 * ACTIVE + tl.minimum(lane % 32, ACTIVE - 1)
    live = (lane % 32 < ACTIVE) & (column < right)
    scale_y = scale_of(H, h, scale_y, ACC)
    scale_x = scale_of(W, w, scale_x, ACC)
    x = tl.minimum(column, right - 1)
    first, _, _ = tap(left, 0, W, w, scale_x, CUBIC, ANTIALIAS)
    last, _, _ = tap(right - 1, taps_x - 1, W, w, scale_x, CUBIC, ANTIALIAS)
    images += image * stride_b
    start = image * 3 * h * w
    for y in range(top, tl.minimum(top + rows, h)):
        pixels = resample(
            images, None, y, x, first, last, sums, stride_c, stride_y, stride_x, H, W, h, w, scale_y, scale_x,
            taps_y, taps_x, CUBIC, ANTIALIAS, False, INTERLEAVED, PATCH, SEGMENT, WHOLE, ACC,
        )  # fmt: skip
        for c in tl.static_range(3):
            pixel = pixels[c]
            at = start + offset(c, y, column, h, w, PATCH)
            if CLIP is not None:
                low = tl.full((), CLIP[0], ACC)
                high = tl.full((), CLIP[1], ACC)
                if inside is not None:
                    tl.store(inside + at, (pixel > low) & (pixel < high), mask=live)
                # tl.where, not tl.clamp: NaN must stay NaN.
                pixel = tl.where(pixel < low, low, tl.where(pixel > high, high, pixel))
            if out is not None:
                store(out + at, normalise(pixel, SCALE[c], SHIFT[c], ACC), live)


@triton.jit
def resize_bwd_kernel(
    grad, inside, sums,  # grad and inside laid out as `offset` says
    grad_images,  # [B, 3, H, W] contiguous
    H, W, h, w, rows, scale_y, scale_x, taps_y, taps_x,
    SCALE: tl.constexpr, CUBIC: tl.constexpr, ANTIALIAS: tl.constexpr,
    PATCH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns `rows` rows of COLUMNS columns of one image, and gathers the gradients of the outputs that read
    # them.
    blocks = tl.cdiv(H, rows)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    top = tl.program_id(0) % blocks * rows
    left = tl.program_id(1) * COLUMNS
    right = tl.minimum(left + COLUMNS, W)
    column = left + tl.arange(0, BLOCK)
    scale_y = scale_of(H, h, scale_y, ACC)
    scale_x = scale_of(W, w, scale_x, ACC)
    x = tl.minimum(column, right - 1)
    first, _, _ = term(left, 0, W, w, scale_x, sums, CUBIC, ANTIALIAS, True)
    last, _, _ = term(right - 1, taps_x - 1, W, w, scale_x, sums, CUBIC, ANTIALIAS, True)
    grad += image * 3 * h * w
    if inside is not None:
        inside += image * 3 * h * w
    grad_images += image * 3 * H * W
    for y in range(top, tl.minimum(top + rows, H)):
        sums_of_row = resample(
            grad, inside, y, x, first, last, sums, 0, 0, 0, H, W, h, w, scale_y, scale_x, taps_y, taps_x,
            CUBIC, ANTIALIAS, True, False, PATCH, SEGMENT, WHOLE, ACC,
        )  # fmt: skip
        for c in tl.static_range(3):
            value = sums_of_row[c] * tl.full((), SCALE[c], ACC)
            store(grad_images + offset(c, y, column, H, W, 0), value, column < right)


@triton.jit
def antialias_sums_kernel(
    sums, H, W, h, w, scale_y, scale_x, taps,
    CUBIC: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK outputs of one axis: 1 / the sum of the weights of each, rows [h] before columns [w].
    is_column = tl.program_id(1) == 1
    size_in = tl.where(is_column, W, H)
    size_out = tl.where(is_column, w, h)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = scale_of(size_in, size_out, tl.where(is_column, scale_x, scale_y), ACC)
    total = tl.zeros((BLOCK,), ACC)
    for k in range(taps):
        _, weight, valid = tap(tl.minimum(o, size_out - 1), k, size_in, size_out, scale, CUBIC, True)
        total += tl.where(valid, weight, 0.0)
    tl.store(sums + tl.where(is_column, h, 0) + o, 1 / total, mask=o < size_out)
