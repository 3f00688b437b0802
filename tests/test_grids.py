"""Averages and bilinear samples on grids of tokens: torch's own pooling and interpolation are the truth."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.testing import assert_close

from fused_dino.terms.grids import Regrid, average, bilinear, product, regrid

GRIDS = [
    ((4, 4), (2, 2)),
    ((16, 16), (3, 5)),
    ((7, 5), (3, 2)),
    ((2, 3), (5, 7)),
    ((1, 9), (4, 4)),
    ((6, 6), (6, 6)),
    ((8, 3), (3, 8)),
]
TRUTHS = {
    average: F.adaptive_avg_pool2d,
    bilinear: lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=False),
}


def tokens(grid, dtype=torch.float64, batch=2, width=3):
    return torch.randn(batch, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(0)).to(dtype)


def truth(how, x, grid, onto):
    return rearrange(TRUTHS[how](rearrange(x, "b (h w) d -> b d h w", h=grid[0]), onto), "b d h w -> b (h w) d")


@pytest.mark.parametrize(("grid", "onto"), GRIDS)
@pytest.mark.parametrize("how", [average, bilinear])
def test_is_torchs_own_in_value_and_gradient(how, grid, onto):
    x = tokens(grid).requires_grad_()
    ours, theirs = Regrid(how, grid, onto)(x), truth(how, x, grid, onto)
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    assert_close(*(torch.autograd.grad(y, x, grad) for y in (ours, theirs)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", [average, bilinear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_float32_inside_whatever_autocast_and_casts_say(how, dtype):
    """The result is rounded once, also if the module itself was cast, and in a backward under autocast."""
    x = tokens((7, 5), dtype, width=40).requires_grad_()
    regrid = Regrid(how, (7, 5), (3, 6)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = regrid(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.dtype == dtype
    exact = truth(how, x.double(), (7, 5), (3, 6))
    assert_close(y, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    (exact_grad,) = torch.autograd.grad(exact.sum(), x)
    assert_close(grad, exact_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_carries_its_weights_along_and_saves_none():
    module = Regrid(average, (4, 4), (3, 3))
    assert not module.state_dict()
    twin = copy.deepcopy(module).half().double()
    assert torch.equal(twin(tokens((4, 4))), module(tokens((4, 4))))
    assert module.to_empty(device="cpu")(tokens((4, 4))).equal(twin(tokens((4, 4))))
    assert module(tokens((4, 4)).to("meta")).device.type == "meta"


def test_products_have_second_derivatives_and_vmap():
    a = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(product, (a, b))
    assert torch.autograd.gradgradcheck(product, (a, b))
    stack = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    assert_close(torch.func.vmap(product, (None, 0))(a, stack), a @ stack)


def test_empty_batches_are_empty():
    x = tokens((4, 4), batch=0).requires_grad_()
    y = regrid(x, average(4, 2), average(4, 2))
    assert y.shape == (0, 4, 3)
    y.sum().backward()
