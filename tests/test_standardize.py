"""Standardised columns, the first step of mse_loss(whiten=True): against torch's own std, and in the loss."""

import pytest
import torch
from torch.testing import assert_close

from fused_dino import functional as FD
from proving import DEVICE, DTYPES, IMPLEMENTATIONS, check_accuracy, grad_output_of, pair, results
from table import STANDARDIZE
from table.standardize import AS_THEY_ARE

pytestmark = pytest.mark.parametrize("backend", IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, AS_THEY_ARE], ids=str)
@pytest.mark.parametrize("rows", [2, 40, 700])
def test_a_mean_1000_times_the_deviation(rows, options, dtype, backend):
    x = pair(rows, 6)[0] + 1000
    check_accuracy(STANDARDIZE, (x.to(dtype),), backend, **options)


@pytest.mark.parametrize("rows", [40, 700])
@pytest.mark.parametrize("first", [0, 50], ids=["first row as any", "first row far away"])
@pytest.mark.parametrize("mean", [0, 1e3, -1e5])
def test_a_mean_takes_no_digits(rows, first, mean, backend):
    """The table's unit includes the mean. Here the unit is the deviation alone, and digits that eager loses count."""
    x = pair(rows, 6)[0] + mean
    x[0] += first
    x = x.float()
    truth, _ = results(STANDARDIZE, (x.double(),), "reference", **AS_THEY_ARE)
    actual, _ = results(STANDARDIZE, (x,), backend, **AS_THEY_ARE)
    lost = 1 + abs(mean) if backend == "reference" else 1  # eager rounds the mean
    assert ((actual - truth) / (1 + truth.abs())).abs().max() <= 6 * lost * torch.finfo(torch.float32).eps


def test_rows_about_the_smallest_norm(backend):
    """A norm below 1e-12 is clamped, and no part of the gradient."""
    x = pair(6, 5)[0]
    x = x / x.norm(dim=1, keepdim=True) * torch.tensor([0.5, 0.9, 2, 1.1, 1e6, 1e12], device=DEVICE)[:, None] * 1e-12
    for dtype in DTYPES[:3]:
        check_accuracy(STANDARDIZE, (x.to(dtype),), backend)


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("value", [0.0, 1.0, 2.0**100])
def test_a_constant_column_is_as_in_eager(value, eps, backend):
    """torch's deviation has a gradient of 0 there, and a closed form would divide 0 by 0."""
    x = pair(5, 4)[0]
    x[:, 1] = value
    actual, expected = (results(STANDARDIZE, (x,), name, eps=eps, **AS_THEY_ARE) for name in (backend, "reference"))
    assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)  # gradients are up to 1 / eps
    constant = torch.full((5,), float("nan") if eps == 0 else 0.0, dtype=x.dtype, device=DEVICE)
    assert_close(actual[0][:, 1], constant, rtol=0, atol=0, equal_nan=True)
    assert actual[0][:, 2].isfinite().all()


@pytest.mark.parametrize("place", [(0, 0), (3, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, AS_THEY_ARE], ids=str)
def test_nan_and_infinity_spread_as_in_eager(options, value, place, backend):
    x = pair(5, 4)[0]
    x[place] = value
    check_accuracy(STANDARDIZE, (x.float(),), backend, **options)


@pytest.mark.parametrize("options", [{}, AS_THEY_ARE], ids=str)
def test_a_gradient_that_lies_otherwise_in_memory(options, backend):
    leaf = pair(6, 40)[0].requires_grad_()
    out = STANDARDIZE.run(leaf, backend=backend, **options)
    for grad in (grad_output_of(out), grad_output_of(out).T.contiguous().T, torch.ones_like(out[:1]).expand_as(out)):
        got = torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]
        assert torch.equal(got, torch.autograd.grad(out, leaf, grad.clone(), retain_graph=True)[0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, AS_THEY_ARE], ids=str)
def test_the_whitened_loss(options, reduction, backend):
    """Tokens, weights and a scale are right together, as are the gradients of both inputs."""
    leaves = [x.requires_grad_() for x in pair(3, 4, 10)]
    weight = torch.linspace(0.5, 2, 12, device=DEVICE).view(3, 4)

    def run(backend):
        return FD.mse_loss(
            *leaves, whiten=True, weight=weight, scale=0.3, reduction=reduction, backend=backend, **options
        )

    actual, expected = (run(name) for name in (backend, "reference"))
    assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    grads = (torch.autograd.grad(x, leaves, grad_output_of(x)) for x in (actual, expected))
    assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_the_whitened_loss_of_mixed_dtypes(first, second, backend):
    student, target = (x.to(dtype) for x, dtype in zip(pair(8, 12), (first, second), strict=True))
    student.requires_grad_()
    actual, expected = (FD.mse_loss(student, target, whiten=True, backend=name) for name in (backend, "reference"))
    assert_close(actual, expected, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(x, student)[0] for x in (actual, expected)]
    assert grads[0].dtype == first
    assert_close(*grads, rtol=2 * torch.finfo(first).eps, atol=1e-5 * grads[1].abs().max().item())


def test_no_formula_of_eager_runs_in_the_whitened_loss(backend, monkeypatch):
    """A backend computes the whole loss itself, without a gradient of the target, which is not needed."""
    ran, std = [], torch.Tensor.std
    monkeypatch.setattr(torch.Tensor, "std", lambda *x, **options: ran.append(x) or std(*x, **options))
    student, target = pair(6, 20)
    out = FD.mse_loss(student.requires_grad_(), target, whiten=True, backend=backend)
    nodes, queue = [], [out.grad_fn]
    while queue:
        nodes.append(queue.pop())
        queue += [node for node, _ in nodes[-1].next_functions if node is not None]
    out.backward()
    names = [type(node).__name__ for node in nodes if not type(node).__name__.startswith("View")]
    if backend == "reference":
        assert ran
        assert "StandardizeFunctionBackward" not in names
    else:
        assert not ran
        assert names == ["CosineFunctionBackward", "StandardizeFunctionBackward", "AccumulateGrad"]


def test_the_whitened_loss_compiles_and_maps(backend):
    student, target = (x.requires_grad_() for x in pair(4, 5))

    def run(student, target):
        return FD.mse_loss(student, target, whiten=True, backend=backend)

    expected = run(student, target)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(student, target)
    assert_close(compiled, expected)
    batch = torch.stack([student, target]), torch.stack([target, student])
    assert_close(torch.func.vmap(run)(*batch), expected.expand(2))
    assert_close(*(torch.autograd.grad(x, student) for x in (compiled, expected)), rtol=1e-9, atol=1e-12)
