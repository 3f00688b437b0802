"""VICReg of one branch, of both, and of positions: each against the same loss written with loops or by its package."""

import pytest
import torch
from torch.testing import assert_close

from fused_dino import VICRegLoss
from fused_dino import functional as FD
from proving import pair
from test_vicreg_definitions import PUBLISHED as PUBLISHED_LOSSES

pytestmark = pytest.mark.usefixtures("backend")
PUBLISHED = {"cov_reduction": "sum_over_d", "unbiased": True}
each_shape = pytest.mark.parametrize("shape", [(16, 6), (6, 16)])


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@each_shape
@pytest.mark.parametrize("name", ["vicreg", "lightly", "solo"])
def test_a_preset_of_both_branches_is_its_package(name, shape):
    a, b = (x.requires_grad_() for x in pair(*shape))
    published = PUBLISHED_LOSSES[name](a, b)
    loss = VICRegLoss.preset(name, both=True)(a, b).loss
    assert_close(loss, published, rtol=1e-12, atol=0)
    assert_close(gradients(loss, a, b), gradients(published, a, b), rtol=1e-11, atol=1e-14)


@each_shape
def test_both_adds_the_targets_own_terms(shape):
    a, b = pair(*shape)
    out, one, other = FD.vicreg_loss(a, b, both=True), FD.vicreg_loss(a, b), FD.vicreg_loss(b, None)
    assert_close(out.loss, one.loss + other.loss)
    assert_close(out.invariance, one.invariance)
    assert_close(out.variance, one.variance + other.variance)
    assert_close(out.covariance, one.covariance + other.covariance)


@each_shape
@pytest.mark.parametrize("coarse", [0, 1])
def test_both_branches_are_float64_as_soon_as_one_is(coarse, shape):
    """A float32 target's own terms count in a float64 loss, whose digits they must have."""
    branches = [x.float() if i == coarse else x for i, x in enumerate(pair(*shape))]
    leaves = [x.requires_grad_() for x in branches]
    wide = [x.detach().double().requires_grad_() for x in branches]
    out, exact = FD.vicreg_loss(*leaves, both=True), FD.vicreg_loss(*wide, both=True)
    assert_close(tuple(out), tuple(exact), rtol=1e-12, atol=0)
    expected = gradients(exact.loss, *wide)
    assert_close(gradients(out.loss, *leaves), tuple(g.to(x.dtype) for g, x in zip(expected, leaves, strict=True)))


@each_shape
def test_without_a_target_nothing_is_invariant(shape):
    a = pair(*shape)[0].requires_grad_()
    out = FD.vicreg_loss(a, None, inv_weight=7.0)
    expected = FD.vicreg_loss(a, torch.zeros_like(a), inv_weight=0)
    assert out.invariance == 0
    assert_close(tuple(out), tuple(expected))
    assert_close(gradients(out.loss, a), gradients(expected.loss, a))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 4), (3, 2, 9), (4, 1, 6)])
def test_all_rows_of_a_batch_count_together(shape, both):
    a, b = (x.requires_grad_() for x in pair(*shape))
    loss = FD.vicreg_loss(a, b, both=both).loss
    expected = FD.vicreg_loss(a.flatten(0, 1), b.flatten(0, 1), both=both).loss
    assert_close(loss, expected)
    assert_close(gradients(loss, a, b), gradients(expected, a, b))


@pytest.mark.parametrize("shape", [(5, 3, 4), (3, 2, 9), (4, 1, 6)])
def test_a_position_has_a_covariance_of_its_own(shape):
    a, b = (x.requires_grad_() for x in pair(*shape))
    out = FD.vicreg_loss(a, b, per="position", **PUBLISHED)
    variance = torch.relu(1 - (a.var(0) + 1e-4).sqrt()).mean()
    centred = a - a.mean(0)
    covariances = torch.einsum("bnc,bnd->ncd", centred, centred) / (shape[0] - 1)
    off_diagonal = covariances.masked_fill(torch.eye(shape[-1], dtype=torch.bool, device=a.device), 0)
    covariance = off_diagonal.square().sum((1, 2)).mean() / shape[-1]
    invariance = (a - b).square().mean()
    expected = 25 * invariance + 10 * variance + 0.5 * covariance
    assert_close(tuple(out), (expected, invariance, variance, covariance), rtol=1e-12, atol=0)
    assert_close(gradients(out.loss, a, b), gradients(expected, a, b), rtol=1e-11, atol=1e-14)


def test_positions_are_lightlys():
    lightly = pytest.importorskip("lightly.loss.vicreg_loss")
    a, b = pair(6, 3, 4)
    out = FD.vicreg_loss(a, b, per="position", **PUBLISHED)
    assert_close(out.variance, lightly.variance_loss(a, eps=1e-4), rtol=1e-12, atol=0)
    assert_close(out.covariance, lightly.covariance_loss(a), rtol=1e-12, atol=0)


def test_a_matrix_is_one_position():
    a, b = pair(6, 4)
    assert_close(tuple(FD.vicreg_loss(a, b, per="position")), tuple(FD.vicreg_loss(a, b)))


def test_only_the_loss_has_a_gradient():
    a, b = (x.requires_grad_() for x in pair(6, 3, 4))
    for out in (FD.vicreg_loss(a, b, both=True), FD.vicreg_loss(a, b, per="position"), FD.vicreg_loss(a, None)):
        assert out.loss.requires_grad
        assert not any(term.requires_grad for term in out[1:])


def test_a_batch_of_nothing_is_nan():
    nothing = torch.ones(0, 3, 4, requires_grad=True)
    for per in ("batch", "position"):
        out = FD.vicreg_loss(nothing, nothing, both=True, per=per)
        assert out.loss.isnan()
        assert gradients(out.loss, nothing)[0].shape == nothing.shape


def test_one_row_a_position_warns():
    a, b = pair(1, 3, 4)
    with pytest.warns(UserWarning, match="got one row"):
        FD.vicreg_loss(a, b, per="position")


def test_the_module_detaches_one_side_or_none():
    a, b = (x.requires_grad_() for x in pair(6, 4))
    assert not VICRegLoss(both=True).detach_teacher
    assert torch.autograd.grad(VICRegLoss()(a, b).loss, b, allow_unused=True) == (None,)
    assert torch.autograd.grad(VICRegLoss(both=True, inv_weight=0)(a, b).loss, b)[0].count_nonzero()
    assert_close(tuple(VICRegLoss()(a, None)), tuple(FD.vicreg_loss(a, None)))
    with pytest.raises(ValueError, match="^detach_teacher=True"):
        VICRegLoss(both=True, detach_teacher=True)


def test_compiles_whole(fresh_compiler):
    a, b = (x.float() for x in pair(6, 3, 4))
    for options in ({"both": True}, {"both": True, "per": "position"}):
        compiled = torch.compile(
            lambda a, b, o=options: FD.vicreg_loss(a, b, **o).loss, backend="aot_eager", fullgraph=True
        )
        assert_close(compiled(a, b), FD.vicreg_loss(a, b, **options).loss)
