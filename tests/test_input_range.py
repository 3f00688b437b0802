"""Which values a supervision takes for black and white, and what its check says of other images."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from conftest import make_supervision as make
from fused_dino import Preprocess

SIZE = 56


def test_the_images_range_stands_beside_the_teacher(teacher, batch):
    z, x = batch
    unit = (x + 1) / 2
    told, usual = make(teacher, input_range=(0, 1)), make(teacher)
    told.projector.load_state_dict(usual.projector.state_dict())
    assert_close(told(z, unit)[0], usual(z, x)[0])
    with pytest.raises(ValueError, match="^input_range belongs to preprocess"):
        make(teacher, input_range=(0, 1), preprocess=Preprocess(SIZE))
    with pytest.raises(ValueError, match="^input_range must be"):
        make(teacher, input_range=(1, 0))


@pytest.mark.parametrize(
    ("input_range", "change", "says"),
    [
        (None, lambda x: x, "from -1 to 1 and input_range is (-1, 1): 0.0% of them lie outside"),
        (None, lambda x: x * 1.001, "0.1% of them lie outside"),
        ((0, 1), lambda x: (x + 1) / 2, "input_range is (0, 1)"),
        (None, lambda x: ((x + 1) * 127.5).to(torch.uint8), "input_range is (0, 255)"),
        (None, lambda x: x[:0], "0.0% of them lie outside"),
    ],
)
def test_images_in_their_range_are_found_right(teacher, batch, input_range, change, says):
    said = make(teacher, input_range=input_range).check(change(batch[1]))
    assert says in said


@pytest.mark.parametrize(
    ("input_range", "change", "says"),
    [
        (None, lambda x: (x + 1) / 2, r"in one half of it; input_range=\(0, 1\) would fit"),
        (None, lambda x: (x + 1) * 127.5, r"% of them lie outside; input_range=\(0, 255\) would fit"),
        ((0, 1), lambda x: x, r"lie outside; input_range=\(-1, 1\) would fit"),
        ((0, 255), lambda x: (x + 1) / 2, r"in one half of it; input_range=\(0, 1\) would fit"),
        (None, lambda x: 3 * x, r"% of them lie outside$"),
        (None, lambda x: x.masked_fill(x > 0.9, float("nan")), "values must be finite"),
        (None, lambda x: x.masked_fill(x > 0.9, float("inf")), "values must be finite"),
    ],
)
def test_images_in_another_range_are_seen(teacher, batch, input_range, change, says):
    with pytest.raises(ValueError, match=says) as raised:
        make(teacher, input_range=input_range).check(change(batch[1]))
    assert str(raised.value).startswith("x_img has values from ")


def test_what_cannot_be_checked_is_refused(teacher, batch):
    with pytest.raises(TypeError, match="preprocess is Upsample"):
        make(teacher, preprocess=nn.Upsample((SIZE, SIZE))).check(batch[1])
    with pytest.raises(ValueError, match=r"^x_img must be \[B, 3, H, W\]"):
        make(teacher).check(batch[1][0])
