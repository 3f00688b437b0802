"""Rows of weight 0 are left out, whatever they hold: value and gradients are those of the other rows alone."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fused_dino import functional as FD
from proving import DEVICE, INTERPRETED, pair

LOSSES = {
    "cosine": FD.cosine_loss,
    "mse": FD.mse_loss,
    "raw": partial(FD.mse_loss, normalize=False),
    "whitened": partial(FD.mse_loss, whiten=True),
    "whitened as they are": partial(FD.mse_loss, whiten=True, normalize=False),
}
WHITENED = {name: loss for name, loss in LOSSES.items() if "whitened" in name}
REDUCTIONS = ("mean", "sum", "none")
FILLERS = (float("nan"), float("inf"), -3e38)

pytestmark = pytest.mark.usefixtures("backend")
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_whitened = pytest.mark.parametrize("loss", WHITENED.values(), ids=WHITENED)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def alone(loss, student, target, weight, reduction, grad_output=None):
    """Return value and gradients of the rows left, in float64 and without a weight in the call; 0 for the others."""
    left = weight != 0
    rows = [x[left].detach().double().requires_grad_() for x in (student, target)]
    values = loss(*rows, reduction="none", backend="reference")
    factor = weight[left].double()
    factor = factor.unsqueeze(-1) if values.ndim > 1 else factor
    values = values * factor
    if reduction == "none":
        value = values.new_zeros(left.shape + values.shape[1:])
        value[left] = values
    else:
        value = values.sum() / (factor.expand_as(values).sum() if reduction == "mean" else 1)
    grad_output = torch.ones_like(value) if grad_output is None else grad_output.double()
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (student, target)]
    for whole, grad in zip(grads, torch.autograd.grad(value, rows, grad_output), strict=True):
        whole[left] = grad
    return value.detach(), *grads


def check(loss, student, target, weight, reduction, grad_output=None, tolerance=1e-11):
    """Compare value and gradients with those of the rows left, for each choice of inputs that need a gradient."""
    expected = alone(loss, student, target, weight, reduction, grad_output)
    out_rows = weight == 0
    for both in (False, True):
        s, t = student.detach().requires_grad_(), target.detach().requires_grad_(both)
        value = loss(s, t, weight=weight, reduction=reduction)
        slopes = torch.ones_like(value) if grad_output is None else grad_output
        grads = torch.autograd.grad(value, (s, t)[: 1 + both], slopes)
        if reduction == "none":
            assert (value[out_rows] == 0).all()
        for grad in grads:
            assert (grad[out_rows] == 0).all()
        for got, true in zip((value, *grads), expected, strict=False):
            assert_close(got.double(), true, rtol=0, atol=tolerance * (1 + true.abs().max().item()))


def mask_of(*left):
    return torch.tensor(left, device=DEVICE)


MASKS = {
    "mask": mask_of(True, True, True, False, True, False),
    "first rows": mask_of(False, False, True, True, True, True),
    "weights": mask_of(0.0, 2.0, 0.5, 0.0, -0.25, 1.0),
    "zero of either sign": mask_of(0.0, 1.0, -0.0, 1.0, 1.0, 1.0),
}


@each_loss
@each_reduction
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("filler", FILLERS)
def test_rows_left_out_do_not_count(loss, reduction, name, filler):
    mask = MASKS[name]
    for holders in ((0,), (1,), (0, 1)):
        inputs = pair(6, 8)
        for i in holders:
            inputs[i][mask == 0] = filler
        check(loss, *inputs, mask, reduction)


@each_loss
@each_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_left_out_in_other_dtypes(loss, reduction, dtype):
    student, target = pair(60, 24, dtype=dtype)
    weight = MASKS["weights"].repeat(10)
    student[weight == 0] = float("inf")
    target[weight == 0] = float("nan")
    eps = torch.finfo(dtype).eps
    check(loss, student, target, weight.to(dtype), reduction, tolerance=8 * eps)


@each_loss
@pytest.mark.parametrize("shape", [(3, 4, 10), (12, 1), (70 if INTERPRETED else 300, 5), (12, 300), (4, 5000)], ids=str)
def test_shapes_and_weights_that_broadcast(loss, shape):
    student, target = pair(*shape)
    weight = torch.arange(shape[0], device=DEVICE) % 4  # of rows, or of the images of tokens
    student[weight == 0] = float("nan")
    check(loss, student, target, weight.view(-1, *(1 for _ in shape[2:])).expand(shape[:-1]), "mean")
    got = loss(student, target, weight=weight.view(-1, *(1 for _ in shape[2:])))
    assert_close(got, loss(student[weight != 0], target[weight != 0], weight=weight[weight != 0].view(
        -1, *(1 for _ in shape[2:]))), rtol=1e-9, atol=1e-11)  # fmt: skip


RUNS = {"whole runs": lambda row: row >= 330, "blocks": lambda row: row % 130 > 100, "few": lambda row: row % 300 == 7}


@each_whitened
@pytest.mark.parametrize("left", RUNS.values(), ids=RUNS)
def test_blocks_and_runs_of_rows_of_which_none_is_left(loss, left):
    student, target = pair(600, 5)  # two runs
    mask = left(torch.arange(600, device=DEVICE))
    student[~mask] = float("nan")
    target[~mask] = float("inf")
    check(loss, student, target, mask, "mean")


@each_loss
@pytest.mark.parametrize("eps", [{"eps": 0.0}, {"norm_eps": 0.0}], ids=str)
def test_no_smallest_norm_or_deviation(loss, eps):
    """A row that is not read would otherwise be divided by 0."""
    if loss is FD.cosine_loss and "norm_eps" in eps:
        eps = {"eps": 0.0}
    student, target = pair(6, 8)
    mask = MASKS["first rows"]
    student[~mask] = 0
    target[~mask] = float("nan")
    check(partial(loss, **eps), student, target, mask, "mean")


@each_loss
def test_a_gradient_that_is_not_finite_where_a_row_is_left_out(loss):
    """The slope of sqrt(value) at 0 is infinite, and reaches no input through a row that is left out."""
    student, target = pair(6, 8)
    mask = MASKS["mask"]
    student[~mask] = float("nan")
    grad_output = torch.ones_like(loss(student, target, reduction="none"))
    grad_output[~mask] = float("inf")
    check(loss, student, target, mask, "none", grad_output)


@each_loss
@each_reduction
def test_no_row_left_is_zero(loss, reduction):
    student, target = (x.fill_(float("nan")).requires_grad_() for x in pair(3, 4))
    value = loss(student, target, weight=torch.zeros(3, device=DEVICE), reduction=reduction)
    assert (value == 0).all()
    for grad in torch.autograd.grad(value.sum(), (student, target)):
        assert (grad == 0).all()


@each_loss
def test_a_weight_that_is_no_number_stays_one(loss):
    weight = mask_of(float("nan"), 1.0, 0.0)
    student, target = pair(3, 4)
    assert loss(student, target, weight=weight).isnan()
    none = loss(student, target, weight=weight, reduction="none").reshape(3, -1)
    assert none[0].isnan().all()
    assert (none[1] >= 0).all()
    assert (none[2] == 0).all()


@each_loss
def test_rows_that_are_left_keep_their_nan(loss):
    student, target = pair(6, 8)
    student[0, 3] = float("nan")
    assert loss(student, target, weight=MASKS["mask"]).isnan()


@each_whitened
@each_reduction
@pytest.mark.parametrize("filler", FILLERS)
def test_fewer_than_two_rows_left_have_no_statistics(loss, reduction, filler):
    student, target = pair(4, 6)
    mask = mask_of(False, False, True, False)
    student[~mask] = filler
    student.requires_grad_()
    value = loss(student, target, weight=mask, reduction=reduction)
    assert (value[mask] if reduction == "none" else value).isnan().all()
    assert reduction != "none" or (value[~mask] == 0).all()
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert (grad[~mask] == 0).all()
    assert grad[mask].isnan().all()


@each_whitened
def test_statistics_count_each_row_once(loss):
    student, target = pair(5, 6)
    plain = loss(student, target, reduction="none")
    weight = mask_of(0.5, 1.0, 2.0, 3.0, 100.0)
    assert_close(loss(student, target, reduction="none", weight=weight), plain * weight[:, None], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mean", [0, 1e3, -1e5])
@pytest.mark.parametrize("far", [0, 50])
def test_a_mean_takes_no_digits_of_the_rows_left(mean, far, backend):
    """The reference takes its mean in float32, and so loses digits as the mean grows."""
    student, target = (x.float() + mean for x in pair(600, 4))
    mask = torch.arange(600, device=DEVICE) % 3 != 0
    student[1] += far  # the first row left
    student[~mask] = float("nan")
    loss = WHITENED["whitened as they are"]
    expected, *_ = alone(loss, student, target, mask, "none")
    error = (loss(student, target, weight=mask, reduction="none") - expected).abs() / (1 + expected)
    assert error.max() < 3e-6 + (3e-7 * abs(mean) if backend == "reference" else 0)


@each_whitened
def test_a_constant_column_of_the_rows_left(loss):
    student, target = pair(600, 4, dtype=torch.float32)
    mask = torch.arange(600, device=DEVICE) % 300 > 3
    for x in (student, target):
        x[mask, 1] = 0 if loss is WHITENED["whitened"] else 0.1
    value = loss(student.requires_grad_(), target, weight=mask, reduction="none", eps=0.1)
    assert (value[:, 1] == 0).all()
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert grad.isfinite().all()


@each_loss
@each_reduction
def test_derivatives_of_the_rows_left(loss, reduction):
    student, target = pair(4, 3)
    weight = mask_of(0.5, 0.0, 1.0, 2.0)
    student[1] = float("nan")
    leaves = student.requires_grad_(), target.requires_grad_()
    run = partial(loss, weight=weight, reduction=reduction)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@each_loss
def test_forward_mode_of_the_rows_left(loss):
    student, target = pair(6, 5)
    tangents = pair(6, 5)[::-1]
    mask = MASKS["mask"]
    expected = torch.func.jvp(
        partial(loss, backend="reference"), (student[mask], target[mask]), tuple(x[mask] for x in tangents)
    )
    student[~mask] = float("nan")
    got = torch.func.jvp(partial(loss, weight=mask), (student, target), tangents)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-11)


@each_loss
@each_reduction
def test_mapped_over_batches(loss, reduction):
    student, target = pair(3, 5, 4)
    weights = torch.tensor([[0, 1, 2, 1, 1], [1, 1, 0, 0, 3], [1, 1, 1, 1, 1]], device=DEVICE)
    student[weights == 0] = float("nan")
    run = partial(loss, reduction=reduction)
    expected = torch.stack([run(s, t, weight=w) for s, t, w in zip(student, target, weights, strict=True)])
    assert expected.isfinite().all()
    mapped = torch.func.vmap(lambda s, t, w: run(s, t, weight=w))(student, target, weights)
    assert_close(mapped, expected, rtol=1e-9, atol=1e-11)
    shared = torch.func.vmap(lambda t: run(student[0], t, weight=weights[0]))(target)
    assert_close(shared[0], expected[0], rtol=1e-9, atol=1e-11)
    grads = torch.func.vmap(torch.func.grad(lambda s, t, w: run(s, t, weight=w).sum()))(student, target, weights)
    assert (grads[weights == 0] == 0).all()
    assert grads.isfinite().all()


@each_loss
def test_compiles_as_one_graph(loss, fresh_compiler):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (4, 7, 9):
        student, target = pair(rows, 6)
        mask = torch.arange(rows, device=DEVICE) != 1
        student[1] = float("nan")
        student.requires_grad_()
        values = [f(student, target, weight=mask) for f in (compiled, loss)]
        assert_close(*values, rtol=1e-9, atol=1e-12)
        grads = [torch.autograd.grad(x, student)[0] for x in values]
        assert_close(*grads, rtol=1e-9, atol=1e-12)
        assert (grads[0][1] == 0).all()
    assert counter.frame_count <= 2


@each_loss
@each_reduction
def test_bits_repeat(loss, reduction):
    student, target = pair(100, 7, dtype=torch.float32)
    mask = torch.arange(100, device=DEVICE) % 5 > 1
    first, *others = (loss(student, target, weight=mask, reduction=reduction) for _ in range(3))
    assert all(torch.equal(first, x) for x in others)


def test_no_value_is_read_on_the_host():
    """Meta tensors have none: a read would raise."""
    for loss in LOSSES.values():
        student = torch.empty(6, 4, device="meta", requires_grad=True)
        loss(student, student.detach(), weight=torch.empty(6, device="meta"), backend="torch").backward()
        assert student.grad.shape == (6, 4)
