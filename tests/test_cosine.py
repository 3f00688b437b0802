"""cosine_loss and mse_loss as functions of torch: gradients, layouts, transforms, bad arguments; and their modules."""

import pytest
import torch
from torch.testing import assert_close

from fused_dino import CosineLoss, MSELoss
from fused_dino import functional as FD

LOSSES = [FD.cosine_loss, FD.mse_loss]


def rows(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(*shape, **options):
    return rows(*shape, **options), rows(*shape, seed=1, **options)


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
        ("student", {"student": torch.ones(4, 0), "target": torch.ones(4, 0)}),
        ("student", {"student": torch.tensor(1.0), "target": torch.tensor(1.0)}),
        ("student", {"student": S.int()}),
        ("student", {"student": S.to(torch.complex64)}),
        ("student", {"student": S.numpy()}),
        ("target", {"target": T[:, :4]}),
        ("target", {"target": T[:1]}),
        ("target", {"target": T.bool()}),
        ("target", {"target": T.to("meta")}),
        ("weight", {"weight": torch.ones(3)}),
        ("weight", {"weight": torch.ones(4, 8)}),
        ("weight", {"weight": torch.ones(4, requires_grad=True)}),
        ("weight", {"weight": [1.0] * 4}),
        ("weight", {"weight": torch.ones(4, device="meta")}),
        ("reduction", {"reduction": "batchmean"}),
        ("eps", {"eps": -1.0}),
        ("eps", {"eps": "small"}),
        ("eps", {"eps": 10**400}),
        ("student", {"student": S.to_sparse()}),
        ("reduction", {"reduction": ["mean"]}),
        ("backend", {"backend": "numpy"}),
    ],
)
def test_bad_arguments_are_named(loss, name, arguments):
    with pytest.raises((ValueError, TypeError), match=f"^{name} "):
        loss(**{"student": S, "target": T, **arguments})


@pytest.mark.parametrize("value", [-1.0, "small", 10**400, float("nan"), None])
def test_a_smallest_norm_that_is_no_number_is_named(value):
    for call in (lambda: FD.mse_loss(S, T, norm_eps=value), lambda: MSELoss(norm_eps=value)):
        with pytest.raises(ValueError, match="^norm_eps must be a finite number of at least 0"):
            call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_named():
    """Of torch's two kinds one says that it lies densely."""
    with pytest.raises(TypeError, match="^student must be dense, got a nested tensor"):
        FD.cosine_loss(torch.nested.nested_tensor([S]), T)


@pytest.mark.parametrize("name", ["normalize", "whiten"])
def test_flags_are_true_or_false(name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got 1"):
        FD.mse_loss(S, T, **{name: 1})


@pytest.mark.parametrize("shape", [(1, 8), (0, 8), (8,)])
def test_whitening_needs_two_rows(shape):
    with pytest.raises(ValueError, match="^whiten needs at least two rows"):
        FD.mse_loss(torch.ones(shape), torch.ones(shape), whiten=True)


def test_the_module_has_the_smallest_norm_of_the_function():
    s, t = pair(4, 8)
    assert_close(MSELoss(norm_eps=5.0)(s, t), FD.mse_loss(s, t, norm_eps=5.0), rtol=0, atol=0)
    assert not torch.equal(MSELoss(norm_eps=5.0)(s, t), MSELoss()(s, t))


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
        with pytest.raises(TypeError, match="weight"):
            module(weight=torch.ones(4))
        with pytest.raises(TypeError, match="^target must be a torch.Tensor, got list"):
            module()(s, [1.0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "scale",
    [
        *("1", float("nan"), 10**400, torch.ones(2), torch.ones((), requires_grad=True)),
        *(torch.tensor(1 + 5j), torch.tensor(True)),
    ],
)
def test_a_scale_that_is_no_number(loss, scale):
    with pytest.raises(ValueError, match="^scale must be"):
        loss(*pair(2, 3), scale=scale)
