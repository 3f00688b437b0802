"""cosine_loss and mse_loss: the gradients of every option, bad arguments, and the modules."""

import pytest
import torch
from torch.testing import assert_close

from fused_dino import CosineLoss, MSELoss
from fused_dino import functional as FD
from proving import DEVICE, pair, rows

LOSSES = [FD.cosine_loss, FD.mse_loss]


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
    weight = rows(4, seed=2).abs()
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, reduction=reduction), (s, t))
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, weight=weight, reduction=reduction), (s, t))
    assert torch.autograd.gradgradcheck(lambda s, t: loss(s, t, reduction=reduction), (s, t))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_value_is_read_on_the_host(loss):
    """Meta tensors have no values, so that reading one would raise."""
    s = torch.empty(6, 4, device="meta", requires_grad=True)
    loss(s, s.detach(), weight=torch.empty(6, device="meta")).backward()
    assert s.grad.shape == (6, 4)


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
    """One of torch's two kinds of nested tensors says that its layout is dense."""
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
    weight = torch.arange(4, device=DEVICE)
    for module, loss in ((CosineLoss, FD.cosine_loss), (MSELoss, FD.mse_loss)):
        s, t = (x.requires_grad_() for x in pair(4, 8))
        out = module(reduction="sum")(s, t, weight=weight)
        assert_close(out, loss(s, t, reduction="sum", weight=weight), rtol=0, atol=0)
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
