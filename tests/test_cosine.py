"""cosine_loss and mse_loss against torch's own functions, the recipe, and their own properties."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import recipe
from fused_dino import CosineLoss, MSELoss
from fused_dino import functional as FD
from proving import DEVICE, IMPLEMENTATIONS

LOSSES = [FD.cosine_loss, FD.mse_loss]
OPTIONS = {FD.cosine_loss: {"eps": 1e-12}, FD.mse_loss: {"normalize": True, "whiten": False, "eps": 1e-5}}
SHAPES = [(5,), (1, 1), (7, 33), (2, 3, 16)]


def rows(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(*shape, **options):
    return rows(*shape, **options), rows(*shape, seed=1, **options)


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


def test_normalised_mse_is_cosine_over_half_the_width():
    s, t = pair(8, 50)
    assert_close(FD.mse_loss(s, t), 2 / 50 * FD.cosine_loss(s, t), rtol=1e-12, atol=1e-12)
    assert_close(FD.mse_loss(s, t, reduction="sum"), 2 * FD.cosine_loss(s, t, reduction="sum"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_normalised_by_their_sum(loss):
    s, t = pair(4, 3, 8)
    weight = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
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
    out = loss(s, t, weight=torch.zeros(4), reduction=reduction)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(torch.autograd.grad(out.sum(), s)[0], torch.zeros_like(s))
    mask = torch.tensor([True, False, True, False])
    (grad,) = torch.autograd.grad(loss(s, t, weight=mask, reduction=reduction).sum(), s)
    assert torch.equal(grad[~mask], torch.zeros(2, 8, dtype=s.dtype))
    assert (grad[mask] != 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "loss",
    [
        FD.cosine_loss,
        FD.mse_loss,
        lambda *x, **k: FD.mse_loss(*x, normalize=False, **k),
        lambda *x, **k: FD.mse_loss(*x, whiten=True, **k),
    ],
)
def test_gradients_of_both_inputs(loss, reduction):
    s, t = (x.requires_grad_() for x in pair(4, 5))
    weight = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for given in (None, weight):
        assert torch.autograd.gradcheck(lambda s, t: loss(s, t, weight=given, reduction=reduction), (s, t))  # noqa: B023
    assert torch.autograd.gradgradcheck(lambda s, t: loss(s, t, reduction=reduction), (s, t))


def test_directions():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = rows(16, 200, dtype=dtype)
        assert FD.cosine_loss(x, x, reduction="none").abs().max() < 3e-7, dtype
        assert_close(FD.cosine_loss(x, -x, reduction="none").double(), torch.full((16,), 2.0).double())
    a, b = torch.eye(8)[:4], torch.eye(8)[4:]
    assert torch.equal(FD.cosine_loss(a, b, reduction="none"), torch.ones(4))


def test_scale_of_rows_does_not_matter():
    s, t = pair(6, 12)
    scale = torch.logspace(-8, 8, 6, dtype=torch.float64).view(6, 1)
    for loss in LOSSES:
        assert_close(loss(s * scale, t / scale), loss(s, t), rtol=1e-9, atol=1e-12)
    s.requires_grad_()
    (grad,) = torch.autograd.grad(FD.cosine_loss(s, t), s)
    assert_close((grad * s).sum(-1), torch.zeros(6, dtype=s.dtype), rtol=0, atol=1e-15)


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
    x = torch.full((2, 4096), 6e4, dtype=torch.float16).requires_grad_()
    out = FD.cosine_loss(x, x.detach())
    out.backward()
    assert out.abs() < 1e-5  # 4096 equal squares summed in float32 round the same way
    assert x.grad.isfinite().all()


def test_eps_tames_a_zero_row():
    zero, t = torch.zeros(1, 8, requires_grad=True), torch.ones(1, 8)
    assert FD.cosine_loss(zero, t) == 1
    grads = [torch.autograd.grad(FD.cosine_loss(zero, t, eps=eps), zero)[0].norm() for eps in (1e-12, 1e-3)]
    assert_close(grads[0], torch.tensor(1e12), rtol=1e-5, atol=0)
    assert_close(grads[1], torch.tensor(1e3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_and_nan(loss):
    empty = torch.empty(0, 8)
    assert loss(empty, empty).isnan()
    assert loss(empty, empty, reduction="sum") == 0
    assert loss(empty, empty, reduction="none").shape[0] == 0
    s, t = pair(3, 8, dtype=torch.float32)
    s[1, 2] = float("nan")
    bad = loss(s, t, reduction="none").reshape(3, -1).isnan().any(-1)
    assert bad.tolist() == [False, True, False]


@pytest.mark.parametrize("loss", LOSSES)
def test_layouts_give_the_same_numbers(loss):
    s, t = pair(6, 10)
    expected = loss(s, t)
    assert_close(loss(s.T.contiguous().T, t), expected, rtol=1e-14, atol=0)
    wide = torch.zeros(6, 21, dtype=s.dtype)
    wide[:, 1::2] = s
    assert_close(loss(wide[:, 1::2], t), expected, rtol=1e-14, atol=0)
    assert_close(loss(s[:1].expand(6, 10), t), loss(s[:1].repeat(6, 1), t), rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss):
    s, t = pair(32, 64, dtype=torch.float32)
    expected = loss(s, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(s, t), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_value_is_read_on_the_host(loss):
    """Meta tensors have none: a read would raise."""
    s = torch.empty(6, 4, device="meta", requires_grad=True)
    loss(s, s.detach(), weight=torch.empty(6, device="meta")).backward()
    assert s.grad.shape == (6, 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_vmap_and_compile(loss):
    s, t = pair(3, 4, 8)
    expected = torch.stack([loss(a, b) for a, b in zip(s, t, strict=True)])
    assert_close(torch.func.vmap(loss)(s, t), expected, rtol=1e-12, atol=0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    s.requires_grad_()
    assert_close(compiled(s, t), loss(s, t), rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(compiled(s, t), s), torch.autograd.grad(loss(s, t), s), rtol=1e-10, atol=1e-14)


S, T = torch.ones(4, 8), torch.ones(4, 8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("student", {"student": torch.ones(4, 0), "teacher": torch.ones(4, 0)}),
        ("student", {"student": torch.tensor(1.0), "teacher": torch.tensor(1.0)}),
        ("student", {"student": S.int()}),
        ("student", {"student": S.to(torch.complex64)}),
        ("student", {"student": S.numpy()}),
        ("teacher", {"teacher": T[:, :4]}),
        ("teacher", {"teacher": T[:1]}),
        ("teacher", {"teacher": T.bool()}),
        ("teacher", {"teacher": T.to("meta")}),
        ("weight", {"weight": torch.ones(3)}),
        ("weight", {"weight": torch.ones(4, 8)}),
        ("weight", {"weight": torch.ones(4, requires_grad=True)}),
        ("weight", {"weight": [1.0] * 4}),
        ("weight", {"weight": torch.ones(4, device="meta")}),
        ("reduction", {"reduction": "batchmean"}),
        ("eps", {"eps": -1.0}),
        ("eps", {"eps": "small"}),
        ("backend", {"backend": "numpy"}),
    ],
)
def test_bad_arguments_are_named(loss, name, arguments):
    with pytest.raises((ValueError, TypeError), match=f"^{name} "):
        loss(**{"student": S, "teacher": T, **arguments})


@pytest.mark.parametrize("shape", [(1, 8), (0, 8), (8,)])
def test_whitening_needs_two_rows(shape):
    with pytest.raises(ValueError, match="^whiten needs at least two rows"):
        FD.mse_loss(torch.ones(shape), torch.ones(shape), whiten=True)


def test_modules_detach_the_teacher_unless_told_otherwise():
    for module, loss in ((CosineLoss, FD.cosine_loss), (MSELoss, FD.mse_loss)):
        s, t = (x.requires_grad_() for x in pair(4, 8))
        out = module(reduction="sum")(s, t, weight=torch.arange(4))
        assert_close(out, loss(s, t, reduction="sum", weight=torch.arange(4)), rtol=0, atol=0)
        assert torch.autograd.grad(out, (s, t), allow_unused=True)[1] is None
        assert torch.autograd.grad(module(detach_teacher=False)(s, t), t)[0].abs().sum() > 0
        with pytest.raises(ValueError, match="^reduction "):
            module(reduction="avg")
        with pytest.raises(TypeError, match="margin"):
            module(margin=1)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_alpha_is_a_factor_of_loss_and_gradient(loss, reduction, backend, weighted):
    s, t = (x.to(DEVICE).requires_grad_() for x in pair(6, 20))
    weight = torch.linspace(0, 2, 6, dtype=s.dtype, device=DEVICE) if weighted else None
    plain = loss(s, t, reduction=reduction, weight=weight, backend=backend)
    for teacher in (t, t.detach()):  # the two passes, and the gradient written in the forward
        for alpha in (0.3, torch.tensor(0.3, dtype=s.dtype, device=DEVICE), 0.0):
            scaled = loss(s, teacher, alpha=alpha, reduction=reduction, weight=weight, backend=backend)
            assert_close(scaled, alpha * plain, rtol=1e-12, atol=1e-15)
            grads = (torch.autograd.grad(x.sum(), s, retain_graph=True)[0] for x in (scaled, alpha * plain))
            assert_close(*grads, rtol=1e-10, atol=1e-14)
    value = FD.rows_loss(loss.__name__, s, t, None, 0.0, reduction, backend, **OPTIONS[loss])[1]
    if reduction != "none":
        assert_close(value, loss(s, t, reduction=reduction, backend="reference").detach(), rtol=1e-12, atol=1e-15)
    assert not value.requires_grad


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_the_forward_is_given_away_once(loss, backend):
    s, t = (x.to(DEVICE) for x in pair(6, 20))
    s.requires_grad_()
    true = torch.autograd.grad(loss(s, t, backend="reference"), s)[0]
    out = loss(s, t, backend=backend)
    scales = (0.0, 1.0, 2.0, 3.0)
    found = [torch.autograd.grad(out, s, out.new_tensor(scale), retain_graph=True)[0] for scale in scales]
    for got, scale in zip(found, scales, strict=True):
        assert_close(got, scale * true, rtol=1e-10, atol=1e-14)
    found[1].mul_(2)
    assert_close(found[3], 3 * true, rtol=1e-10, atol=1e-14)
    if backend != "reference":
        out = loss(s, t, backend=backend)
        stored = out.grad_fn.saved_tensors[-1]
        assert stored.shape == s.shape
        out.backward()
        assert s.grad.data_ptr() == stored.data_ptr(), "no copy"
        assert loss(s.detach().half().requires_grad_(), t, backend=backend).grad_fn.saved_tensors[-1].numel() == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("alpha", ["1", float("nan"), torch.ones(2), torch.ones((), requires_grad=True)])
def test_alpha_that_is_no_number(loss, alpha):
    with pytest.raises(ValueError, match="^alpha must be"):
        loss(*pair(2, 3), alpha=alpha)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_a_wider_alpha_widens_no_loss(backend):
    student, alpha = torch.randn(4, 8, device=DEVICE), torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    for op in (FD.cosine_loss, FD.mse_loss):
        loss = op(student, student.flip(0), alpha=alpha, backend=backend)
        assert loss.dtype == torch.float32
        assert_close(loss, 0.5 * op(student, student.flip(0), backend=backend))
