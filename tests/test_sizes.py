"""The size of a teacher's input by a rule: what rules give, and what any size changes of a backbone."""

import math
import pickle
from fractions import Fraction

import pytest
import torch

from fused_dino import Area, Preprocess, Scaled
from fused_dino import functional as FD
from fused_dino.sizes import check_img_size, resolve

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

sides = st.integers(1, 4000)
patches = st.sampled_from([1, 8, 14, 16, 32])


# --- what rules give --------------------------------------------------------------------------------------------------


def test_a_16_pixel_grid_meets_a_14_pixel_teacher_token_by_token():
    for h, w in ((256, 256), (192, 320), (16, 1024)):
        assert resolve(Scaled(7 / 8), h, w, 14) == (h // 16 * 14, w // 16 * 14)


@given(sides, sides, patches, st.floats(1e-3, 10))
def test_each_side_goes_to_the_nearest_multiple_of_the_patch(h, w, patch, ratio):
    for side, found in zip((h, w), resolve(Scaled(ratio), h, w, patch), strict=True):
        assert type(found) is int
        assert found >= patch
        assert found % patch == 0
        exact = side * ratio
        assert abs(found - exact) <= patch / 2 * (1 + 1e-9) or (found == patch and exact < patch)


@given(sides, sides, patches, st.integers(1, 10**7))
def test_an_area_keeps_the_aspect(h, w, patch, pixels):
    for side, exact in zip(Area(pixels)(h, w, patch), (pixels * h / w, pixels * w / h), strict=True):
        exact = math.sqrt(exact)
        assert abs(side - exact) <= patch / 2 * (1 + 1e-9) or (side == patch and exact < patch)


def test_an_area_by_its_numbers():
    expected = {(512, 512): (224, 224), (512, 2048): (112, 448), (300, 400): (196, 252), (1, 9999): (14, 22400)}
    assert {size: resolve(Area(224 * 224), *size, 14) for size in expected} == expected


def test_a_half_goes_up():
    assert resolve(lambda h, w, patch: (h + patch / 2, w + patch), 14, 28, 14) == (28, 42)


def test_a_rule_is_asked_by_the_images_size_and_the_patch():
    asked = []
    assert resolve(lambda *x: asked.append(x) or (28, 42), 30, 50, 14) == (28, 42)
    assert asked == [(30, 50, 14)]


def test_a_fixed_size_stays():
    assert resolve(224, 30, 50, 14) == (224, 224)
    assert resolve((28, 42), 30, 50, 14) == (28, 42)


def test_rules_are_values():
    """Rules are used in configurations and pickles, and can be compared."""
    for rule in (Scaled(Fraction(7, 8)), Area(224 * 224)):
        assert pickle.loads(pickle.dumps(rule)) == eval(repr(rule)) == rule
        assert len({rule, eval(repr(rule))}) == 1
    assert repr(Scaled(7 / 8)) == "Scaled(ratio=0.875)"


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", None, True, 1j])
def test_a_factor_that_is_none_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^ratio must be a positive finite number, got "):
        Scaled(value)
    with pytest.raises(ValueError, match=r"^pixels must be a positive finite number, got "):
        Area(value)


@pytest.mark.parametrize(
    "size", [(0, 224), (224, -14), (math.nan, 224), (224, math.inf), (224,), (1, 2, 3), 224, None, ("a", "b"), "ab"]
)
def test_a_rule_that_gives_no_size_is_refused_by_name(size):
    with pytest.raises(ValueError, match=r"^img_size must give two positive .* gave .* for images of 30 x 50 at patch"):
        resolve(lambda h, w, patch: size, 30, 50, 14)


def test_what_is_no_size_is_refused_by_name():
    for wrong in (0, -14, 22.4, None, "224", (224,), (224, 224, 3), (224, 0), True):
        with pytest.raises(ValueError, match=r"^img_size must be a positive int or a pair \(h, w\) of them, or a rule"):
            check_img_size(wrong)
    with pytest.raises(TypeError, match="^img_size must be .* got the class Scaled itself"):
        check_img_size(Scaled)
    assert check_img_size(Scaled(2)) == Scaled(2)
    assert check_img_size(28) == (28, 28)


# --- preprocessing ----------------------------------------------------------------------------------------------------


def test_a_call_has_a_size_of_its_own():
    images = torch.rand(2, 3, 40, 50) * 2 - 1
    module = Preprocess(56, antialias=True)
    assert torch.equal(module(images, size=(28, 42)), FD.preprocess(images, (28, 42), antialias=True))
    assert torch.equal(
        module(images, torch.float64, 28), FD.preprocess(images, 28, antialias=True, out_dtype=torch.float64)
    )
    assert module(images).shape == (2, 3, 56, 56)
    with pytest.raises(ValueError, match="size must be"):
        module(images, size=0)
