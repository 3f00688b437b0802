"""A supervision takes any module that says its width as a teacher, reads its attributes and checks its results."""

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TinyTeacher
from conftest import make_supervision as make
from fused_dino import Preprocess


@pytest.mark.parametrize("size", [56, (56, 56), [56, 56], None])
def test_a_teacher_may_say_its_size_in_any_way(teacher, batch, size):
    teacher.img_size = size
    make(teacher)(*batch)


@pytest.mark.parametrize(
    "mean",
    [torch.tensor([0.5, 0.25, 0.75]), torch.tensor([0.5, 0.25, 0.75]).view(1, 3, 1, 1), np.array([0.5, 0.25, 0.75])],
)
def test_statistics_may_be_tensors(teacher, batch, mean):
    told = make(teacher, preprocess=Preprocess(56, mean=(0.5, 0.25, 0.75))).encode(batch[1])
    teacher.mean, teacher.std = mean, None
    assert torch.equal(make(teacher).encode(batch[1])["global"], told["global"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", (0.5, 0.5), "mean of TinyTeacher must be 3 finite numbers"),
        ("std", (0.5, 0.5, 0.0), "std of TinyTeacher must be positive"),
        ("patch_size", "7", "TinyTeacher must have a patch_size of a positive int"),
        ("patch_size", (7, 14), "TinyTeacher must have a patch_size of a positive int"),
        ("patch_size", -7, "TinyTeacher must have a patch_size of a positive int"),
        ("img_size", "large", "the teacher's img_size must be a positive int"),
    ],
)
def test_what_it_says_has_to_make_sense(teacher, name, value, message):
    setattr(teacher, name, value)
    with pytest.raises(ValueError, match=f"^{message}"):
        make(teacher)


def test_a_square_of_two_equal_sides_is_a_patch_size(teacher):
    teacher.patch_size = (14, 14)
    assert make(teacher).teacher_grid == (4, 4)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("teacher_dtype must be", {"teacher_dtype": "meta"}),
        ("teacher_dtype must be", {"teacher_dtype": torch.int8}),
        ("teacher_dtype must be", {"teacher_dtype": torch.complex64}),
        ("pretrained must be True or False", {"pretrained": "no"}),
        ("latent_shape must be three positive ints", {"latent_shape": None}),
        ("latent_shape must be three positive ints", {"latent_shape": (True, 8, 8), "use_patch": True}),
    ],
)
def test_options_of_teachers_and_maps_are_checked_where_they_are_not_used(teacher, message, options):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make(teacher, **options)


def test_a_parent_that_holds_the_teacher_too_cannot_put_it_in_training_mode(teacher, batch):
    parent = nn.Module()
    parent.teacher, parent.dino = teacher, make(teacher)
    parent.train()
    x = batch[1]
    assert torch.equal(parent.dino.encode(x)["global"], parent.dino.encode(x)["global"])


class Few(TinyTeacher):
    def forward(self, x):
        return super().forward(x[:1])


def test_a_teacher_that_loses_images_is_named(batch):
    with pytest.raises(
        ValueError, match=r"^teacher's result must be .* with B = 6, got shapes \[\[1, 24\], \[1, 16, 24\]\]"
    ):
        make(Few())(*batch)


def test_no_gradient_reaches_features_through_any_loss(teacher, batch):
    class Product(nn.Module):
        def forward(self, student, teacher):
            return (student * teacher).mean()

    z, x = batch
    features = make(teacher).encode(x)
    features["global"].requires_grad_()
    module = make(teacher, loss_type=Product())
    loss = module(z, features=features)[0]
    assert torch.autograd.grad(loss, features["global"], allow_unused=True)[0] is None


@pytest.mark.parametrize(
    "arguments", [{}, {"x_img": torch.zeros(6, 1, 56, 56)}, {"features": {"global": torch.zeros(6, 2)}}]
)
def test_a_refused_call_is_no_step(teacher, batch, arguments):
    module = make(teacher)
    with pytest.raises(ValueError, match="x_img|features"):
        module.loss_dict(batch[0], **arguments)
    assert module.schedule.step == 0
