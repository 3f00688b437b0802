"""cosine_loss and mse_loss on every implementation: torch's own functions, their symmetries, weights and scale."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import recipe
from fused_dino import functional as FD
from fused_dino.rows import rows_loss
from proving import DEVICE, DTYPES, pair, rows

LOSSES = [FD.cosine_loss, FD.mse_loss]
OPTIONS = {
    FD.cosine_loss: {"eps": 1e-12},
    FD.mse_loss: {"normalize": True, "whiten": False, "eps": 1e-5, "norm_eps": 1e-12},
}
SHAPES = [(5,), (1, 1), (7, 33), (2, 3, 16)]


pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("shape", SHAPES)
def test_cosine_is_torchs_cosine_similarity(shape):
    s, t = pair(*shape)
    expected = 1 - F.cosine_similarity(s, t, dim=-1)
    assert_close(FD.cosine_loss(s, t, reduction="none"), expected, rtol=1e-12, atol=1e-12)
    assert_close(FD.cosine_loss(s, t, reduction="sum"), expected.sum(), rtol=1e-12, atol=1e-12)
    assert_close(FD.cosine_loss(s, t), recipe.cosine(s, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_is_torchs_mse_loss(shape, reduction):
    s, t = pair(*shape)
    raw = FD.mse_loss(s, t, normalize=False, reduction=reduction)
    assert_close(raw, F.mse_loss(s, t, reduction=reduction), rtol=1e-12, atol=1e-12)
    unit = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    assert_close(FD.mse_loss(s, t, reduction=reduction), F.mse_loss(*unit, reduction=reduction), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_whitening_is_the_recipe(normalize, eps):
    s, t = pair(9, 6)
    out = FD.mse_loss(s, t, normalize=normalize, whiten=True, eps=eps)
    assert_close(out, recipe.mse(s, t, normalize, True, eps), rtol=1e-12, atol=1e-12)
    tokens = FD.mse_loss(s.view(3, 3, 6), t.view(3, 3, 6), normalize=normalize, whiten=True, eps=eps)
    assert_close(tokens, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("norm_eps", [1e-12, 3.0, 1e3])
def test_norm_eps_is_the_smallest_norm_that_divides(norm_eps, whiten):
    """The rows' norms are 2 to 4, on both sides of 3."""
    s, t = (x.requires_grad_() for x in pair(9, 8))
    s_unit, t_unit = (F.normalize(x, dim=-1, eps=norm_eps) for x in (s, t))
    out = FD.mse_loss(s, t, whiten=whiten, norm_eps=norm_eps)
    expected = recipe.mse(s_unit, t_unit, False, whiten, 1e-5)
    assert_close(out, expected, rtol=1e-12, atol=1e-15)
    for ours, theirs in zip(*(torch.autograd.grad(x, (s, t)) for x in (out, expected)), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_normalised_mse_is_cosine_over_half_the_width():
    s, t = pair(8, 50)
    assert_close(FD.mse_loss(s, t), 2 / 50 * FD.cosine_loss(s, t), rtol=1e-12, atol=1e-12)
    assert_close(FD.mse_loss(s, t, reduction="sum"), 2 * FD.cosine_loss(s, t, reduction="sum"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_normalised_by_their_sum(loss):
    s, t = pair(4, 3, 8)
    weight = rows(4, 3, seed=2).abs()
    per_row = loss(s, t, reduction="none").reshape(4, 3, -1).mean(-1)
    expected = (weight * per_row).sum() / weight.sum()
    assert_close(loss(s, t, weight=weight), expected, rtol=1e-12, atol=1e-12)
    assert_close(loss(s, t, weight=100 * weight), expected, rtol=1e-12, atol=1e-12)
    mask = weight > 0.5
    assert_close(loss(s, t, weight=mask), loss(s[mask], t[mask]), rtol=1e-12, atol=1e-12)
    per_image = weight[:, :1]
    assert_close(loss(s, t, weight=per_image), loss(s, t, weight=per_image.expand(4, 3)), rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_zero_weights_give_zero_and_masked_rows_no_gradient(loss, reduction):
    s, t = pair(4, 8)
    s.requires_grad_()
    out = loss(s, t, weight=torch.zeros(4, device=DEVICE), reduction=reduction)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(torch.autograd.grad(out.sum(), s)[0], torch.zeros_like(s))
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    (grad,) = torch.autograd.grad(loss(s, t, weight=mask, reduction=reduction).sum(), s)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    assert (grad[mask] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [200, 1024])
def test_identical_rows_have_a_loss_of_0_and_opposite_ones_of_2(width, dtype, backend):
    """The mean is right to 1e-7. A single row's cosine is rounded to float32, and may lie a few steps below 1."""
    x = rows(16, width, dtype=dtype)
    for loss, opposite in ((FD.cosine_loss, 2.0), (FD.mse_loss, 4 / width)):
        if backend != "reference":  # the reference divides first, and rounds each quotient
            assert loss(x, x).abs() <= 1e-7
        assert loss(x, x, reduction="none").abs().max() <= 5e-7
        assert_close(loss(x, -x).item(), opposite, rtol=1e-6, atol=0)


def test_orthogonal_rows_have_a_loss_of_1():
    a, b = torch.eye(8, device=DEVICE).split(4)
    assert torch.equal(FD.cosine_loss(a, b, reduction="none"), torch.ones(4, device=DEVICE))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_stays_in_its_row(loss):
    s, t = pair(3, 8, dtype=torch.float32)
    s[1, 2] = float("nan")
    rows_of_nan = loss(s, t, reduction="none").reshape(3, -1).isnan().any(-1)
    assert rows_of_nan.tolist() == [False, True, False]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permuted_rows_have_permuted_losses_and_gradients(loss, dtype):
    s, t = pair(9, 40, dtype=dtype)
    s.requires_grad_()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    plain, permuted = loss(s, t, reduction="none"), loss(s[order], t[order], reduction="none")
    assert torch.equal(permuted, plain[order])
    assert_close(loss(s[order], t[order]), loss(s, t))
    grads = (torch.autograd.grad(loss(s[o], t[o], reduction="sum"), s)[0] for o in (slice(None), order))
    assert torch.equal(*grads)


def test_scale_of_rows_does_not_matter():
    s, t = pair(6, 12)
    scale = torch.logspace(-8, 8, 6, dtype=torch.float64, device=DEVICE).view(6, 1)
    for loss in LOSSES:
        assert_close(loss(s * scale, t / scale), loss(s, t), rtol=1e-9, atol=1e-12)
    s.requires_grad_()
    (grad,) = torch.autograd.grad(FD.cosine_loss(s, t), s)
    assert_close((grad * s).sum(-1), torch.zeros_like(s[:, 0]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_float32_inside(loss):
    s, t = pair(64, 300)
    for dtype in (torch.bfloat16, torch.float16):
        low_s, low_t = s.to(dtype).requires_grad_(), t.to(dtype)
        exact_s = low_s.detach().double().requires_grad_()
        out, exact = loss(low_s, low_t), loss(exact_s, low_t.double())
        assert out.dtype == torch.float32
        assert_close(out.double(), exact, rtol=1e-5, atol=1e-7)
        grad, true = torch.autograd.grad(out, low_s)[0], torch.autograd.grad(exact, exact_s)[0]
        assert grad.dtype == dtype
        assert_close(grad, true.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)  # float16's subnormal spacing


@pytest.mark.parametrize("loss", LOSSES)
def test_mixed_dtypes(loss):
    s, t = pair(5, 20)
    low = t.to(torch.bfloat16)
    assert loss(s, low).dtype == torch.float64
    assert loss(s.float(), low).dtype == torch.float32
    assert_close(loss(s.float(), low), loss(s.float(), low.float()), rtol=0, atol=0)


def test_float16_rows_of_large_numbers_do_not_overflow():
    x = torch.full((2, 4096), 6e4, dtype=torch.float16, device=DEVICE).requires_grad_()
    out = FD.cosine_loss(x, x.detach())
    out.backward()
    assert out.abs() < 1e-5  # 4096 equal squares summed in float32 round the same way
    assert x.grad.isfinite().all()


def test_eps_tames_a_zero_row():
    zero, t = torch.zeros(1, 8, device=DEVICE, requires_grad=True), torch.ones(1, 8, device=DEVICE)
    assert FD.cosine_loss(zero, t) == 1
    grads = [torch.autograd.grad(FD.cosine_loss(zero, t, eps=eps), zero)[0].norm() for eps in (1e-12, 1e-3)]
    assert_close(grads[0].item(), 1e12, rtol=1e-5, atol=0)
    assert_close(grads[1].item(), 1e3, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(FD.mse_loss(zero, t, norm_eps=eps), zero)[0].norm() for eps in (1e-12, 1e-3)]
    assert_close(grads[0].item(), 0.25e12, rtol=1e-5, atol=0)  # 2 / D of the cosine's
    assert_close(grads[1].item(), 0.25e3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_scale_is_a_factor_of_loss_and_gradient(loss, reduction, backend, weighted):
    s, t = (x.requires_grad_() for x in pair(6, 20))
    weight = torch.linspace(0, 2, 6, dtype=s.dtype, device=DEVICE) if weighted else None
    plain = loss(s, t, reduction=reduction, weight=weight)
    for target in (t, t.detach()):  # the two passes, and the gradient written in the forward
        for scale in (0.3, torch.tensor(0.3, dtype=s.dtype, device=DEVICE), 0.0):
            scaled = loss(s, target, scale=scale, reduction=reduction, weight=weight)
            assert_close(scaled, scale * plain, rtol=1e-12, atol=1e-15)
            grads = (torch.autograd.grad(x.sum(), s, retain_graph=True)[0] for x in (scaled, scale * plain))
            assert_close(*grads, rtol=1e-10, atol=1e-14)
    value = rows_loss(loss.__name__, s, t, None, 0.0, reduction, backend, **OPTIONS[loss])[1]
    if reduction != "none":
        assert_close(value, loss(s, t, reduction=reduction, backend="reference").detach(), rtol=1e-12, atol=1e-15)
    assert not value.requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_the_forward_is_returned_once(loss, backend):
    s, t = pair(6, 20)
    s.requires_grad_()
    true = torch.autograd.grad(loss(s, t, backend="reference"), s)[0]
    out = loss(s, t)
    scales = (0.0, 1.0, 2.0, 3.0)
    actual = [torch.autograd.grad(out, s, out.new_tensor(scale), retain_graph=True)[0] for scale in scales]
    assert_close(actual, [scale * true for scale in scales], rtol=1e-10, atol=1e-14)
    actual[1].mul_(2)
    assert_close(actual[3], 3 * true, rtol=1e-10, atol=1e-14)
    if backend != "reference":
        out = loss(s, t)
        stored = out.grad_fn.saved_tensors[-1]
        assert stored.shape == s.shape
        out.backward()
        assert s.grad.data_ptr() == stored.data_ptr(), "no copy"
        out = loss(s.detach().half().requires_grad_(), t)
        assert out.grad_fn.saved_tensors[-1].numel() == 0, "float16 keeps none"


def test_a_wider_alpha_widens_no_loss():
    student, alpha = torch.randn(4, 8, device=DEVICE), torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    for op in (FD.cosine_loss, FD.mse_loss):
        loss = op(student, student.flip(0), scale=alpha)
        assert loss.dtype == torch.float32
        assert_close(loss, 0.5 * op(student, student.flip(0)))
