"""VICReg as it was published and as others define it: the terms, and the presets of VICRegLoss by their names."""

import pytest
import torch
from torch.testing import assert_close

import recipe
from fused_dino import VICRegLoss
from fused_dino import functional as FD
from proving import DEVICE, pair

pytestmark = pytest.mark.usefixtures("backend")


def test_is_vicreg_as_published():
    """arXiv 2105.04906, equations 1, 3 and 4, written with loops."""
    y, g = pair(7, 4)
    n, d = y.shape
    c = torch.zeros(d, d, dtype=y.dtype, device=DEVICE)
    for row in y - y.mean(0):
        c += torch.outer(row, row) / (n - 1)
    variance = sum(max(0, 1 - float(c[j, j] + 1e-4) ** 0.5) for j in range(d)) / d
    covariance = sum(float(c[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) / d
    out = FD.vicreg_loss(y, g, cov_reduction="sum_over_d", unbiased=True)
    assert_close(out.variance.item(), variance, rtol=1e-12, atol=0)
    assert_close(out.covariance.item(), covariance, rtol=1e-12, atol=0)


def test_is_lightlys_terms():
    lightly = pytest.importorskip("lightly.loss.vicreg_loss")
    for shape in ((16, 6), (6, 16)):
        y, g = pair(*shape)
        out = FD.vicreg_loss(y, g, cov_reduction="sum_over_d", unbiased=True)
        assert_close(out.invariance, lightly.invariance_loss(y, g), rtol=1e-12, atol=0)
        assert_close(out.variance, lightly.variance_loss(y, eps=1e-4), rtol=1e-12, atol=0)
        assert_close(out.covariance, lightly.covariance_loss(y), rtol=1e-12, atol=0)


def two_sided(y, g, var_weight):
    """Return the loss of main_vicreg.py in facebookresearch/vicreg, and of losses/vicreg.py in solo-learn."""

    def variance(x):
        return torch.relu(1 - (x.var(0) + 1e-4).sqrt()).mean()

    def covariance(x):
        c = torch.cov(x.T)
        return (c - c.diag().diag()).square().sum() / x.shape[1]

    terms = var_weight * (variance(y) + variance(g)) + covariance(y) + covariance(g)
    return 25 * torch.nn.functional.mse_loss(y, g) + terms


PUBLISHED = {
    "seed": lambda y, g: recipe.vicreg(y, g)[0],
    "vicreg": lambda y, g: two_sided(y, g, 12.5),
    "lightly": lambda y, g: pytest.importorskip("lightly.loss.vicreg_loss").VICRegLoss()(y, g),
    "solo": lambda y, g: two_sided(y, g, 25.0),
}


@pytest.mark.parametrize("shape", [(16, 6), (6, 16)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_gradient_of_the_student(name, shape):
    y, g = (0.5 * x for x in pair(*shape))
    y.requires_grad_()
    losses = VICRegLoss.preset(name)(y, g).loss, PUBLISHED[name](y, g)
    assert_close(*(torch.autograd.grad(loss, y) for loss in losses), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", [(16, 6), (6, 16)])
@pytest.mark.parametrize("name", ["vicreg", "lightly", "solo"])
def test_published_losses_add_the_targets_own_terms(name, shape):
    y, g = (0.5 * x for x in pair(*shape))
    loss = VICRegLoss.preset(name)(y, g).loss + VICRegLoss.preset(name, inv_weight=0)(g, g).loss
    assert_close(loss, PUBLISHED[name](y, g), rtol=1e-12, atol=0)


def test_presets_are_overridden_and_their_names_checked():
    assert VICRegLoss.preset("solo", gamma=2.0).options["gamma"] == 2.0
    assert VICRegLoss.preset("solo", group=None).group is None
    with pytest.raises(ValueError, match="^name is 'vic'; use one of seed, vicreg, lightly, solo"):
        VICRegLoss.preset("vic")
