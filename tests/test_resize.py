"""preprocess against F.interpolate, torchvision and the recipe, in float64 where it can be, and what it refuses."""

import warnings
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import recipe
from fused_dino import Preprocess
from fused_dino import functional as FD
from proving import DEVICE, INTERPRETED
from table.resize import MODES, pixels

SIZES = [((9, 7), (14, 14)), ((40, 30), (14, 28)), ((17, 23), (8, 23)), ((16, 16), (16, 16)), ((1, 5), (4, 3))]


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
@pytest.mark.parametrize(("sides", "size"), SIZES)
def test_is_interpolate_of_the_normalised_image(preprocess, interpolation, antialias, sides, size):
    x = pixels(2, 3, *sides)
    mean, std = (
        torch.tensor(v, dtype=x.dtype, device=DEVICE).view(3, 1, 1) for v in (FD.IMAGENET_MEAN, FD.IMAGENET_STD)
    )
    normalised = ((x + 1) / 2 - mean) / std
    expected = F.interpolate(normalised, size, mode=interpolation, align_corners=False, antialias=antialias)
    actual = preprocess(x, size, interpolation=interpolation, antialias=antialias)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_is_the_recipe(preprocess):
    x = pixels(1, 3, 50, 40)
    assert_close(preprocess(x), recipe.preprocess(x, 224), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_antialias_is_torchvisions_resize(preprocess, interpolation):
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    x = pixels(2, 3, 61, 45, dtype=torch.float32)
    resized = transforms.resize(x, [28, 42], interpolation=transforms.InterpolationMode(interpolation), antialias=True)
    expected = transforms.normalize((resized + 1) / 2, list(FD.IMAGENET_MEAN), list(FD.IMAGENET_STD))
    assert_close(preprocess(x, (28, 42), interpolation=interpolation, antialias=True), expected, rtol=1e-5, atol=1e-5)


def test_ranges_and_statistics(preprocess):
    x = pixels(1, 3, 6, 6)
    shifted = preprocess((x + 1) * 5 + 3, 4, input_range=(3, 13))
    assert_close(shifted, preprocess(x, 4), rtol=1e-12, atol=1e-12)
    plain = preprocess(x, 6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert_close(plain, x, rtol=1e-12, atol=1e-12)


def test_clamp_acts_on_the_resized_pixels(preprocess):
    x = pixels(2, 3, 30, 30).sign()
    out = preprocess(x, 47, interpolation="bicubic", clamp=True, mean=(0.5,) * 3, std=(0.5,) * 3)
    resized = F.interpolate(x, (47, 47), mode="bicubic", align_corners=False)
    assert resized.abs().max() > 1.01, "the example must overshoot"
    assert_close(out, resized.clamp(-1, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patches_are_contiguous(preprocess, patch_size):
    assert preprocess(pixels(2, 3, 8, 9), (4, 6), patch_size=patch_size).is_contiguous()


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
def test_gradients(preprocess, interpolation, antialias):
    x = pixels(1, 3, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: preprocess(x, (3, 8), interpolation=interpolation, antialias=antialias),
        x,
        fast_mode=INTERPRETED,  # one direction: a whole Jacobian takes two calls an element
    )


def test_nothing_gives_nothing_and_nan_stays(preprocess):
    assert preprocess(torch.empty(0, 3, 9, 9, device=DEVICE), 14).shape == (0, 3, 14, 14)
    assert preprocess(torch.empty(0, 3, 9, 9, device=DEVICE), 14, patch_size=7).shape == (0, 4, 147)
    x = pixels(1, 3, 14, 14, dtype=torch.float32)
    x[0, 1, 0, 0] = float("nan")
    for clamp in (False, True):
        out = preprocess(x, 14, clamp=clamp)
        assert out[0, 1, 0, 0].isnan()
        assert out.isnan().sum() == 1


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
@pytest.mark.parametrize(("length", "size"), [(5, 3), (9, 5), (14, 10), (3, 8)])
def test_a_pixel_that_is_not_finite_reaches_the_same_outputs_as_in_eager(
    preprocess, interpolation, antialias, length, size
):
    """Each pixel in turn is not finite. Where rounding decides whether its weight is 0 it may be infinite or NaN."""
    options = {"interpolation": interpolation, "antialias": antialias, "mean": (0,) * 3, "std": (1,) * 3}
    one = torch.eye(length, device=DEVICE).view(length, 1, 1, length).expand(-1, 3, -1, -1)
    value = torch.tensor([float("inf"), float("nan"), -float("inf")], device=DEVICE).view(1, 3, 1, 1)
    x = torch.where(one == 1, value, 0)
    out, plain = (run(x, (1, size), **options) for run in (preprocess, partial(FD.preprocess, backend="reference")))
    assert torch.equal(out.isfinite(), plain.isfinite())
    black = FD.preprocess(torch.zeros_like(one), (1, size), **options, backend="reference")
    weight = FD.preprocess(one, (1, size), **options, backend="reference") - black
    either = weight.abs() < 4 * torch.finfo(torch.float32).eps
    assert torch.equal(out[~either].nan_to_num(7.0), plain[~either].nan_to_num(7.0))
    assert not (either & out.isfinite().logical_not()).all()


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
@pytest.mark.parametrize("size", [(4, 6), (9, 9), (6, 17), (9, 17), (20, 30)])
def test_nan_and_infinity_spread_as_in_eager(preprocess, interpolation, antialias, size):
    """Taps of weight 0 spread them, too. Rounding decides no weight here."""
    x = pixels(1, 3, 9, 17, dtype=torch.float32)
    x[0, 0, 0, 0], x[0, 1, 4, 6], x[0, 2, 8, 16] = float("nan"), float("inf"), -float("inf")
    options = {"interpolation": interpolation, "antialias": antialias}
    out, plain = preprocess(x, size, **options), FD.preprocess(x, size, **options, backend="reference")
    assert torch.equal(out.isnan(), plain.isnan())
    assert torch.equal(out[out.isinf()], plain[plain.isinf()])
    assert not plain.isfinite().all()


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
@pytest.mark.parametrize("size", [(4, 6), (9, 9), (9, 17), (20, 30)])
def test_a_gradient_that_is_not_finite_spreads_no_further_than_in_eager(preprocess, interpolation, antialias, size):
    """The gradient reaches every pixel that has a weight, and no pixel that eager's does not reach."""
    x = pixels(1, 3, 9, 17, dtype=torch.float32).requires_grad_()
    options = {"interpolation": interpolation, "antialias": antialias}
    outputs = [run(x, size, **options) for run in (preprocess, partial(FD.preprocess, backend="reference"))]

    def gradients(place, value):
        grad = torch.zeros(1, 3, *size, device=DEVICE)
        grad[0, 1][place] = value
        return (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in outputs)

    for place in ((0, 0), (size[0] // 2, size[1] // 2), (-1, -1)):
        weighted = next(gradients(place, 1.0)).abs() > 1e-5
        for value in (float("nan"), float("inf")):
            found, plain = gradients(place, value)
            assert not found[weighted].isfinite().any()
            assert found[plain.isfinite()].isfinite().all()


@pytest.mark.parametrize("antialias", [False, True])
def test_what_is_not_read_does_not_count(preprocess, antialias):
    """Infinities lie outside an output's taps, and outside the segment of a row that a kernel holds at a time."""
    x = pixels(1, 3, 4, 600 if antialias else 1400, dtype=torch.float32)
    plain = x.clone().requires_grad_()
    (read,) = torch.autograd.grad(FD.preprocess(plain, (2, 3), antialias=antialias, backend="reference").sum(), plain)
    unread = x.masked_fill(read == 0, float("inf"))
    out = preprocess(unread, (2, 3), antialias=antialias)
    expected = FD.preprocess(unread, (2, 3), antialias=antialias, backend="reference")
    assert torch.equal(out.isfinite(), expected.isfinite())
    if not antialias:  # its widest taps have a weight of 0, but are read
        assert out.isfinite().all()
        assert_close(out, preprocess(x, (2, 3)))


@pytest.mark.parametrize("value", [0.99, 0.0, float("nan")])
def test_gradient_of_a_clamp(preprocess, value):
    """No gradient passes beyond the bounds or through a NaN. At the bounds themselves versions of torch differ."""
    x = torch.tensor([-1.5, -0.99, value, 0.99, 1.5], device=DEVICE).expand(1, 3, 1, 5).clone().requires_grad_()
    plain = x.detach().requires_grad_()
    out = preprocess(x, (1, 5), clamp=True)
    true = FD.preprocess(plain, (1, 5), clamp=True, backend="reference")
    assert_close(out, true, equal_nan=True)
    grads = [torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in ((out, x), (true, plain))]
    assert_close(*grads)


def test_patches_are_the_image_cut(preprocess):
    x = pixels(2, 3, 30, 20).requires_grad_()
    whole = preprocess(x, (6, 9), antialias=True)
    cut = preprocess(x, (6, 9), antialias=True, patch_size=3)
    assert torch.equal(cut, F.unfold(whole, 3, stride=3).mT)
    weight = pixels(*cut.shape, seed=3)
    folded = F.fold(weight.mT, (6, 9), 3, stride=3)
    assert_close(torch.autograd.grad(cut, x, weight)[0], torch.autograd.grad(whole, x, folded)[0])


GOOD = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("images", {"images": torch.zeros(3, 8, 8)}),
        ("images", {"images": torch.zeros(1, 4, 8, 8)}),
        ("images", {"images": torch.zeros(1, 3, 0, 8)}),
        ("images", {"images": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}),
        ("images", {"images": torch.zeros(1, 3, 8, 8, dtype=torch.complex64)}),
        ("images", {"images": [[0.0]]}),
        ("size", {"size": 0}),
        ("size", {"size": (8, -1)}),
        ("size", {"size": (8, 8, 8)}),
        ("size", {"size": 8.0}),
        ("size", {"size": True}),
        ("input_range", {"input_range": (1, 1)}),
        ("input_range", {"input_range": (0, float("nan"))}),
        ("input_range", {"input_range": (-1e308, 1e308)}),
        ("std", {"input_range": (0, 1e-320)}),
        ("std", {"std": (1e-40, 1, 1)}),
        ("std", {"std": (1, 1, 1e40)}),
        ("size", {"size": b"44"}),
        ("mean", {"mean": (0.5, 0.5)}),
        ("mean", {"mean": 0.5}),
        ("mean", {"mean": (Fraction(10**400), 0, 0)}),
        ("mean", {"mean": (Fraction(-(10**400)), 0, 0)}),
        ("std", {"std": (0.5, 0.5, 0.0)}),
        ("interpolation", {"interpolation": "nearest"}),
        ("out_dtype", {"out_dtype": torch.int8}),
        ("antialias", {"antialias": "no"}),
        ("antialias", {"antialias": 1}),
        ("clamp", {"clamp": "yes"}),
        ("clamp", {"clamp": None}),
        ("patch_size", {"patch_size": 3}),
        ("patch_size", {"patch_size": 0}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_bad_arguments_are_named(name, arguments):
    arguments = {"images": GOOD, "size": 8, **arguments}
    with pytest.raises((ValueError, TypeError), match=f"^{name} "):
        FD.preprocess(**arguments)


def test_the_default_device_is_not_asked(preprocess):
    x = pixels(2, 3, 9, 7)
    expected = preprocess(x, 4)
    with torch.device("meta"):
        assert torch.equal(preprocess(x, 4), expected)


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy(number):
    images = torch.zeros(1, 3, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FD.preprocess(images, 2, mean=tuple(map(number, (0.5, 0.25, 0.75))))
    with pytest.raises(ValueError, match="^mean must be 3 finite numbers"):
        FD.preprocess(images, 2, mean=(number("inf"), 0, 0))


def test_the_module_is_the_function_and_checks_at_construction():
    x = pixels(2, 3, 30, 20, dtype=torch.float32)
    module = Preprocess((14, 28), antialias=True, interpolation="bicubic", clamp=True)
    expected = FD.preprocess(x, (14, 28), antialias=True, interpolation="bicubic", clamp=True)
    assert torch.equal(module(x), expected)
    assert module(x, torch.bfloat16).dtype == torch.bfloat16
    assert Preprocess(14, out_dtype=torch.float64)(x, torch.bfloat16).dtype == torch.float64
    with pytest.raises(ValueError, match="^std "):
        Preprocess(14, std=(1, 1))
    with pytest.raises(TypeError, match="antialiasing"):
        Preprocess(14, antialiasing=True)
    with pytest.raises(ValueError, match="^backend "):
        Preprocess(14, backend="cuda")
