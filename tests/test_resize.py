"""preprocess against F.interpolate, torchvision, the recipe and its own properties, in float64 where it can be."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import recipe
from fused_dino import Preprocess
from fused_dino import functional as FD

MODES = list(itertools.product(("bilinear", "bicubic"), (False, True)))
SIZES = [((9, 7), (14, 14)), ((40, 30), (14, 28)), ((17, 23), (8, 23)), ((16, 16), (16, 16)), ((1, 5), (4, 3))]


def pixels(*shape, dtype=torch.float64, seed=0):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1).to(dtype)


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
@pytest.mark.parametrize(("given", "size"), SIZES)
def test_is_interpolate_of_the_normalised_image(interpolation, antialias, given, size):
    x = pixels(2, 3, *given)
    mean, std = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (FD.IMAGENET_MEAN, FD.IMAGENET_STD))
    expected = F.interpolate(
        ((x + 1) / 2 - mean) / std, size=size, mode=interpolation, align_corners=False, antialias=antialias
    )
    assert_close(
        FD.preprocess(x, size, interpolation=interpolation, antialias=antialias), expected, rtol=1e-12, atol=1e-12
    )


def test_is_the_recipe():
    x = pixels(3, 3, 50, 40)
    assert_close(FD.preprocess(x), recipe.preprocess(x, 224), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_antialias_is_torchvisions_resize(interpolation):
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    x = pixels(2, 3, 61, 45, dtype=torch.float32)
    resized = transforms.resize(x, [28, 42], interpolation=transforms.InterpolationMode(interpolation), antialias=True)
    expected = transforms.normalize((resized + 1) / 2, list(FD.IMAGENET_MEAN), list(FD.IMAGENET_STD))
    assert_close(
        FD.preprocess(x, (28, 42), interpolation=interpolation, antialias=True), expected, rtol=1e-5, atol=1e-5
    )


def test_bytes_are_the_same_image_as_floats():
    raw = torch.randint(0, 256, (2, 3, 20, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = FD.preprocess(raw, 14)
    assert out.dtype == torch.float32
    assert_close(out.double(), FD.preprocess(raw.double() / 127.5 - 1, 14), rtol=1e-5, atol=1e-5)


def test_half_inputs_are_computed_in_float32():
    x = pixels(2, 3, 40, 40)
    # float32 rounds a source coordinate of up to 40 by 40 * 2^-24, and the image by that times its steepest slope.
    floor = 40 * 2**-24 * 2 / min(FD.IMAGENET_STD) * 2
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        exact = FD.preprocess(half.double(), 28)
        out = FD.preprocess(half, 28)
        assert out.dtype == dtype
        assert_close(out, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=floor)  # one rounding, at the store
        assert_close(FD.preprocess(half, 28, out_dtype=torch.float32).double(), exact, rtol=1e-6, atol=floor)


def test_ranges_and_statistics():
    x = pixels(1, 3, 6, 6)
    shifted = FD.preprocess((x + 1) * 5 + 3, 4, input_range=(3, 13))
    assert_close(shifted, FD.preprocess(x, 4), rtol=1e-12, atol=1e-12)
    plain = FD.preprocess(x, 6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert_close(plain, x, rtol=1e-12, atol=1e-12)


def test_clamp_acts_on_the_resized_pixels():
    x = pixels(2, 3, 30, 30).sign()
    out = FD.preprocess(x, 47, interpolation="bicubic", clamp=True, mean=(0.5,) * 3, std=(0.5,) * 3)
    resized = F.interpolate(x, (47, 47), mode="bicubic", align_corners=False)
    assert resized.abs().max() > 1.01, "the example must overshoot"
    assert_close(out, resized.clamp(-1, 1), rtol=1e-12, atol=1e-12)


def test_patches_are_what_a_convolution_reads():
    x = pixels(2, 3, 33, 50)
    weight = torch.randn(8, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    patches = FD.preprocess(x, (21, 28), patch_size=7)
    assert patches.shape == (2, 12, 147)
    expected = F.conv2d(FD.preprocess(x, (21, 28)), weight, stride=7).flatten(2).transpose(1, 2)
    assert_close(patches @ weight.flatten(1).T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
def test_gradients(interpolation, antialias):
    x = pixels(1, 3, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: FD.preprocess(x, (3, 8), interpolation=interpolation, antialias=antialias), x
    )


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
def test_properties(interpolation, antialias):
    def run(x):
        return FD.preprocess(x, (10, 12), interpolation=interpolation, antialias=antialias)

    constant = torch.tensor([-1.0, 0.25, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    assert_close(run(constant.expand(1, 3, 21, 17)), run(constant.expand(1, 3, 10, 12)), rtol=1e-9, atol=1e-9)
    x = pixels(3, 3, 21, 17)
    assert_close(run(x.flip(3)).flip(3), run(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(run(x.flip(0)).flip(0), run(x))
    changed = x.clone()
    changed[:, 1] = 0
    assert torch.equal(run(changed)[:, ::2], run(x)[:, ::2]), "channels are independent"


def test_layouts_give_the_same_numbers():
    x = pixels(4, 3, 20, 30, dtype=torch.float32)
    expected = FD.preprocess(x, 14)
    wide = torch.zeros(4, 3, 20, 61)
    wide[..., 1::2] = x
    for other in (x.to(memory_format=torch.channels_last), x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        assert_close(FD.preprocess(other, 14), expected, rtol=1e-5, atol=1e-6)
    assert_close(FD.preprocess(wide[..., 1::2], 14), expected, rtol=1e-5, atol=1e-6)
    assert_close(FD.preprocess(x[:1].expand(5, -1, -1, -1), 14), expected[:1].expand(5, -1, -1, -1), rtol=0, atol=0)


def test_nothing_gives_nothing_and_nan_stays():
    assert FD.preprocess(torch.empty(0, 3, 9, 9), 14).shape == (0, 3, 14, 14)
    assert FD.preprocess(torch.empty(0, 3, 9, 9), 14, patch_size=7).shape == (0, 4, 147)
    x = pixels(1, 3, 14, 14, dtype=torch.float32)
    x[0, 1, 0, 0] = float("nan")
    for clamp in (False, True):
        out = FD.preprocess(x, 14, clamp=clamp)
        assert out[0, 1, 0, 0].isnan()
        assert out.isnan().sum() == 1


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
        ("mean", {"mean": (0.5, 0.5)}),
        ("mean", {"mean": 0.5}),
        ("std", {"std": (0.5, 0.5, 0.0)}),
        ("interpolation", {"interpolation": "nearest"}),
        ("out_dtype", {"out_dtype": torch.int8}),
        ("patch_size", {"patch_size": 3}),
        ("patch_size", {"patch_size": 0}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_bad_arguments_are_named(name, arguments):
    arguments = {"images": GOOD, "size": 8, **arguments}
    with pytest.raises((ValueError, TypeError), match=f"^{name} "):
        FD.preprocess(**arguments)


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
