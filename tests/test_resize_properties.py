"""preprocess: the properties of every resize, and images of bytes, of floats and of every layout."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from fused_dino import functional as FD
from proving import DEVICE, DTYPES, INTERPRETED, check_error
from table import PREPROCESS
from table.resize import MODES, pixels

MEAN, STD = (
    torch.tensor(v, dtype=torch.float64, device=DEVICE).view(3, 1, 1) for v in (FD.IMAGENET_MEAN, FD.IMAGENET_STD)
)
SHRUNK, ENLARGED = ((11, 9), (5, 7)), ((4, 5), (9, 8))
# The interpreter is slow, and takes each of the dtypes with one of the sizes.
PAIRS = [(SHRUNK, torch.float64), (ENLARGED, torch.float32)]
PAIRS += [] if INTERPRETED else [(SHRUNK, torch.float32), (ENLARGED, torch.float64)]
each_mode = pytest.mark.parametrize(("interpolation", "antialias"), MODES)
each_pair = pytest.mark.parametrize(("sizes", "dtype"), PAIRS, ids=str)


def some_bytes(*shape):
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return raw.to(DEVICE)


def tolerance(dtype, steepest):
    """Bound the error of a normalised pixel whose image is within -1..1 and whose neighbours differ by `steepest`.

    A source coordinate below 64 is rounded twice, by up to 32 eps each time. That moves a pixel along its slope, which
    a bicubic curve exceeds by half. Sixteen weighted terms and the normalisation round the rest.
    """
    return torch.finfo(dtype).eps * (2 * 32 * 1.5 * steepest / 2 + 16 + 4) / min(FD.IMAGENET_STD)


@each_mode
@each_pair
def test_a_constant_stays_constant(preprocess, sizes, dtype, interpolation, antialias):
    sides, size = sizes
    constant = torch.tensor([-1.0, 0.25, 1.0], dtype=dtype, device=DEVICE).view(1, 3, 1, 1)
    out = preprocess(constant.expand(1, 3, *sides), size, interpolation=interpolation, antialias=antialias)
    expected = (((constant.double() + 1) / 2 - MEAN) / STD).expand(1, 3, *size)
    assert_close(out.double(), expected, rtol=0, atol=tolerance(dtype, 0))


@each_mode
@each_pair
def test_flips_commute_and_images_and_channels_are_independent(preprocess, sizes, dtype, interpolation, antialias):
    sides, size = sizes
    x = pixels(2, 3, *sides, dtype=dtype)
    run = partial(preprocess, size=size, interpolation=interpolation, antialias=antialias)
    out = run(x)
    for axis in (2, 3):
        assert_close(run(x.flip(axis)).flip(axis), out, rtol=0, atol=tolerance(dtype, 2))
    assert torch.equal(run(x.flip(0)).flip(0), out)
    changed = x.clone()
    changed[:, 1] = 0
    assert torch.equal(run(changed)[:, ::2], out[:, ::2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize(
    ("interpolation", "antialias", "length"),
    [("bilinear", False, 12), ("bilinear", False, 45), ("bilinear", True, 45), ("bicubic", True, 45)],
)
def test_linear_ramps_stay_linear(preprocess, interpolation, antialias, length, axis, dtype):
    """Only pixels that read no border count.

    Other filters miss a line by some thousandths: eager's cubic without antialias has a parameter of -0.75, not -0.5,
    and a widened filter's weights lie off its centre.
    """
    ramp = torch.linspace(0, 1, 20, dtype=torch.float64, device=DEVICE).to(dtype).expand(1, 3, 2, 20)
    size = (3, length)
    if axis == 2:
        ramp, size = ramp.mT, size[::-1]
    out = preprocess(ramp, size, interpolation=interpolation, antialias=antialias)
    row = (out.mT if axis == 2 else out)[0, :, 1].double()
    border = 1 + 2 * math.ceil(length / 20)
    slope = 20 / length / 19 / 2 / STD[:, 0]
    inside = row[:, border:-border].diff()
    assert_close(inside, slope.expand_as(inside), rtol=0, atol=2 * tolerance(dtype, 1 / 19))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_one_column_is_one_row_turned(preprocess, interpolation):
    """torch on a CPU leaves an antialiased image's rows as they are where the result is one column wide."""
    x = pixels(1, 3, 5, 9, dtype=torch.float64).requires_grad_()
    run = partial(preprocess, interpolation=interpolation, antialias=True)
    out, turned = run(x, (3, 1)), run(x.mT, (1, 3)).mT
    assert_close(out, turned, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, turned))
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clamp", [False, True])
def test_images_are_saved_for_a_clamp_alone(preprocess, clamp):
    """A change of the images in place is refused only where the gradient would have been wrong."""
    leaf = pixels(1, 3, 8, 8, dtype=torch.float64).requires_grad_()
    images = leaf * 2
    out = preprocess(images, 4, clamp=clamp)
    images.mul_(0.5)
    if clamp and preprocess.keywords["backend"] != "reference":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    else:
        out.sum().backward()
        assert leaf.grad.abs().sum() > 0


def test_a_vmap_over_nothing(preprocess):
    images = pixels(4, 3, 8, 8, dtype=torch.float32).view(1, 4, 3, 8, 8)[:0]
    out = torch.func.vmap(partial(preprocess, size=4))(images)
    assert (out.shape[0], out.shape[2:]) == (0, (3, 4, 4))


def check_value(preprocess, x, size, **options):
    """Hold the value to the rule of `proving.check_accuracy`, in units of float32's or float64's arithmetic.

    The oracle gets bytes as floats, and is given their range. The op under test has to know it.
    """
    ours = preprocess(x, size, **options)
    options["input_range"] = (-1, 1) if x.is_floating_point() else (0, 255)
    plain = FD.preprocess(x, size, **options, backend="reference")
    true = FD.preprocess(x.double(), size, **{**options, "out_dtype": torch.float64}, backend="reference")
    scale, _ = PREPROCESS.scales(x, true, size=size, **options)
    assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_error("value", ours, plain, true, scale, torch.finfo(arithmetic).eps * PREPROCESS.floor)


@each_mode
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sides", "size"), [((10, 15), (4, 6)), ((3, 4), (7, 8))])
def test_bytes_are_as_accurate_as_in_eager(preprocess, sides, size, out_dtype, interpolation, antialias):
    options = {"interpolation": interpolation, "antialias": antialias, "out_dtype": out_dtype}
    check_value(preprocess, some_bytes(1, 3, *sides), size, **options)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_floats_of_any_result_are_as_accurate_as_in_eager(preprocess, dtype, out_dtype):
    check_value(preprocess, pixels(1, 3, 10, 15, dtype=dtype), (4, 17), out_dtype=out_dtype)


@pytest.mark.parametrize("patch_size", [None, 2])
def test_bytes_in_every_mode_and_layout(preprocess, patch_size):
    raw = some_bytes(2, 3, 10, 15)
    for interpolation, antialias in MODES:
        options = {"interpolation": interpolation, "antialias": antialias, "clamp": True, "patch_size": patch_size}
        for x in (raw, raw.to(memory_format=torch.channels_last)):
            check_value(preprocess, x, (4, 6), out_dtype=torch.float32, **options)


def test_bytes_become_float32(preprocess):
    assert preprocess(some_bytes(1, 3, 5, 5), 4).dtype == torch.float32


def test_bytes_have_no_gradient(preprocess):
    raw = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=DEVICE)
    assert not preprocess(raw, 4).requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        raw.requires_grad_()


def test_half_inputs_are_computed_in_float32(preprocess):
    x = pixels(1, 3, 40, 40)
    # float32 rounds a source coordinate of up to 40 by 40 * 2^-24, and the image by that times its steepest slope.
    floor = 40 * 2**-24 * 2 / min(FD.IMAGENET_STD) * 2
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        exact = preprocess(half.double(), 28)
        out = preprocess(half, 28)
        assert out.dtype == dtype
        assert_close(out, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=floor)  # one rounding, at the store
        assert_close(preprocess(half, 28, out_dtype=torch.float32).double(), exact, rtol=1e-6, atol=floor)
