"""Recipes are their sources' formulas, written anew here: values, gradients, constants and others' checkpoints."""

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fused_dino import TokenTerm, recipes

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(2, 3, 1, 1)


@pytest.fixture
def backbone(teacher):
    return teacher.double()


def normalised(images, mode):
    mean, std = IMAGENET
    return F.interpolate(((images + 1) / 2 - mean) / std, (224, 224), mode=mode, align_corners=False)


def batch(*shape):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 256, 256, generator=generator, dtype=torch.float64) * 2 - 1
    return images, torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_seed(backbone):
    torch.manual_seed(1)
    module = recipes.seed(12, teacher=backbone).double()
    images, z = batch(2, 12)
    out = module.loss_dict(images, {"global": z}, step=2500)
    p = module.terms["global"].projector
    student = p[3](p[2](F.gelu(p[0](z))))
    assert p[0].out_features == 4096
    target = backbone(normalised(images, "bilinear"))["global"]
    expected = 0.2 * 0.5 * (1 - F.cosine_similarity(student, target.detach(), dim=-1).mean())
    assert_close(out["loss_dino"], expected, rtol=1e-9, atol=1e-11)
    leaves = [z, *module.parameters()]
    assert_close(*(torch.autograd.grad(x, leaves) for x in (out["loss_dino"], expected)), rtol=1e-7, atol=1e-11)
    assert module.loss_dict(images, {"global": z}, step=5000)["loss_dino"] > out["loss_dino"]


def repa_loss(zs, zs_tilde):
    """A projection loss as REPA writes it, sample by sample."""
    loss = 0.0
    for z, z_tilde in zip(zs, zs_tilde, strict=True):
        for z_j, z_tilde_j in zip(z, z_tilde, strict=True):
            loss += -(F.normalize(z_tilde_j, dim=-1) * F.normalize(z_j, dim=-1)).sum(-1).mean()
    return loss / (len(zs) * len(zs[0]))


def test_repa(backbone):
    torch.manual_seed(1)
    module = recipes.repa(12, teacher=backbone).double()
    images, hidden = batch(2, 256, 12)
    out = module.loss_dict(images, {"token": hidden})
    student = module.terms["token"].projector(hidden)
    assert [type(part) for part in module.terms["token"].projector] == [
        nn.Linear,
        nn.SiLU,
        nn.Linear,
        nn.SiLU,
        nn.Linear,
    ]
    target = backbone(normalised(images, "bicubic"))["patch"].detach()
    expected = repa_loss([target], [student])
    assert_close(out["dino_token"], expected.detach(), rtol=1e-9, atol=1e-11)
    assert_close(out["loss_dino"], 0.5 * expected, rtol=1e-9, atol=1e-11)
    leaves = [hidden, *module.parameters()]
    assert_close(*(torch.autograd.grad(x, leaves) for x in (out["loss_dino"], 0.5 * expected)), rtol=1e-7, atol=1e-11)


def test_repas_own_value():
    """REPA's code gave this number for two images, of which the second is the first reversed."""
    s = torch.tensor([[1, 0], [1, 1], [0, 2], [-1, 1]], dtype=torch.float64)
    t = torch.tensor([[2, 1], [0, 1], [1, 1], [1, -1]], dtype=torch.float64)
    term = recipes.repa(12, teacher=Lone()).terms["token"]
    loss = TokenTerm(2, projector=nn.Identity(), out_dim=2, loss=term.loss)
    found = {"global": t.mean(0).expand(2, -1), "patch": torch.stack([t, t]), "grid": (2, 2)}
    assert loss(torch.stack([s, s.flip(0)]), found)[0].item() == pytest.approx(-0.462439971, abs=1e-9)


class Lone(nn.Module):
    embed_dim, patch_size = 2, 14


def test_repas_first_values_and_images_that_are_left_out():
    module = recipes.repa(12, teacher=Lone())
    for layer in list(module.terms["token"].projector)[::2]:
        assert not layer.bias.any()
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    loss = module.terms["token"].loss
    rows = torch.eye(3)
    assert loss(rows, rows) == -1
    assert loss(rows, rows, torch.tensor([1.0, 0, 2])) == -1
    assert loss(rows, rows, torch.zeros(3)) == 0


def test_repas_images_follow_the_resolution():
    for resolution, size in ((256, 224), (300, 224), (512, 448)):
        module = recipes.repa(12, teacher=Lone(), resolution=resolution)
        assert module.img_size == (size, size)
        assert module.preprocess.options["interpolation"] == "bicubic"
        assert not module.preprocess.options["antialias"]
    with pytest.raises(ValueError, match="resolution must be at least 256"):
        recipes.repa(12, teacher=Lone(), resolution=255)
    with pytest.raises(ValueError, match="token_dim|in_dim"):
        recipes.repa(0, teacher=Lone())


def test_a_named_teacher_gets_repas_size_and_positions(monkeypatch):
    """The weights are not here, and its positions are resampled as timm does."""
    given = []

    def backbone(*arguments, **options):
        given.append((arguments, options))
        return Lone()

    monkeypatch.setattr(sys.modules["fused_dino.recipes.repa"], "DINOv2Backbone", backbone)
    recipes.repa(12, resolution=512)
    assert given == [(("vitb14", 448), {"pos_embed": "timm"})]


def test_repas_checkpoints_load(backbone):
    """They load at the supervision's prefix or its parent's, with a warning. Keys that do not fit are refused."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(3, 3)
            self.dino = recipes.repa(12, teacher=backbone)

    model, other = Model(), Model()
    theirs = {f"block.{k}": v for k, v in other.block.state_dict().items()}
    own = other.dino.terms["token"].projector.state_dict()
    theirs.update({f"projectors.0.{k}": v for k, v in own.items()})
    with pytest.warns(
        UserWarning, match="loading a checkpoint of REPA: 6 tensors renamed; it holds no dino.schedule.step"
    ):
        model.load_state_dict(theirs)
    assert_close(dict(model.named_parameters()), dict(other.named_parameters()))
    with pytest.warns(UserWarning, match="of REPA"):
        other.dino.load_state_dict({f"projectors.0.{k}": v for k, v in own.items()})
    two = {**theirs, "projectors.1.0.weight": torch.zeros(2048, 12)}
    with pytest.raises(RuntimeError, match=r"projectors\.1\.0\.weight"), pytest.warns(UserWarning, match="of REPA"):
        model.load_state_dict(two)


@pytest.mark.parametrize("name", recipes.__all__)
def test_a_recipe_has_at_most_forty_lines(name):
    """Its formula, constants and source among them."""
    assert len(inspect.getsource(getattr(recipes, name)).splitlines()) <= 40


@pytest.mark.parametrize("name", recipes.__all__)
def test_a_width_that_is_none_is_refused_by_its_name_before_a_teacher_is_loaded(name, monkeypatch):
    def load(*_, **__):
        raise AssertionError("loads a teacher")

    for part in ("repa", "prx"):
        monkeypatch.setattr(sys.modules[f"fused_dino.recipes.{part}"], "make_teacher", load)
    monkeypatch.setattr(sys.modules["fused_dino.recipes.repa"], "DINOv2Backbone", load)
    width = "in_dim" if name in ("seed", "vicreg") else "token_dim"
    for wrong in (0, 1.5, True, None):
        with pytest.raises(ValueError, match=f"^{width} must be a positive int, got {wrong}"):
            getattr(recipes, name)(wrong)
