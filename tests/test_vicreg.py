"""vicreg_loss against the recipe, and its own properties."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import recipe
from fused_dino import VICRegLoss, distributed
from fused_dino import functional as FD
from fused_dino.ops.vicreg_tiles import padded
from proving import DEVICE, DTYPES, check_accuracy, pair
from table import VICREG

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (2, 3), (6, 1), (40, 40)])
@pytest.mark.parametrize(
    "options", [{}, {"gamma": 2.0, "eps": 0.1}, {"inv_weight": 0.1, "var_weight": 0.0, "cov_weight": 0.3}]
)
def test_is_the_recipe(shape, options):
    y, g = pair(*shape)
    names = {"inv_weight": "inv_w", "var_weight": "var_w", "cov_weight": "cov_w"}
    expected, terms = recipe.vicreg(y, g, **{names.get(k, k): v for k, v in options.items()})
    left_out = [options.get(name) == 0 for name in ("inv_weight", "var_weight", "cov_weight")]
    terms = [torch.zeros_like(x) if out else x for x, out in zip(terms, left_out, strict=True)]
    out = FD.vicreg_loss(y, g, **options)
    assert_close(tuple(out), (expected, *terms), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (5, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"cov_reduction": "sum_over_d", "unbiased": True}, {"gamma": 2.0, "eps": 0.1, "var_weight": 50.0}]
)
def test_gradients_of_both_inputs(shape, options):
    y, g = (x.requires_grad_() for x in pair(*shape))
    assert torch.autograd.gradcheck(lambda y, g: FD.vicreg_loss(y, g, **options).loss, (y, g))
    # Along random directions: each of many elements would take a backward of its own.
    check, alone = partial(torch.autograd.gradgradcheck, fast_mode=True, rtol=1e-5), g.detach()
    assert check(lambda y, g: FD.vicreg_loss(y, g, **options).loss, (y, g))
    assert check(lambda y: FD.vicreg_loss(y, alone, **options).loss, y)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(8, 40), (8, 48), (48, 16), (16, 16)])
@pytest.mark.parametrize("name", ["a large mean", "constant columns", "exact collapse"])
def test_numbers_hold_where_little_is_left(name, shape, dtype, backend):
    """The invariance, which could hide an error by its size, is left out. The unit of errors is the deviations."""
    y, g = pair(*shape)
    y = {
        "a large mean": y + 1000,
        "constant columns": torch.where(torch.arange(shape[1], device=DEVICE) % 3 == 0, 0.1, y),
        "exact collapse": (y[:1] + 100).expand(shape),
    }[name]
    check_accuracy(VICREG, (y.to(dtype), g.to(dtype)), backend, inv_weight=0.0, cov_weight=10.0)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
@pytest.mark.parametrize("route", ["auto", "gram", "covariance"])
def test_a_group_of_one_rank_is_no_group(shape, route, one_rank, monkeypatch):
    """Every bit is the same on every backend, second derivatives work, and nothing is communicated."""
    monkeypatch.setattr(distributed, "all_reduce", None)
    monkeypatch.setattr(distributed, "all_gather", None)
    y, g = (x.requires_grad_() for x in pair(*shape))
    results = []
    for group in (None, one_rank):
        out = FD.vicreg_loss(y, g, route=route, group=group)
        grads = torch.autograd.grad(out.loss, (y, g), create_graph=True)
        results.append((*out, *grads, *torch.autograd.grad(grads[0].square().sum(), (y, g))))
    assert_close(results[1], results[0], rtol=0, atol=0)
    with pytest.warns(UserWarning, match="one row"):
        FD.vicreg_loss(*pair(1, 6), group=one_rank)


def test_copies_of_a_loss_are_of_the_same_group(one_rank):
    module = VICRegLoss(group=one_rank, gamma=2.0, inv_weight=torch.tensor(3.0, device=DEVICE))
    copied = copy.deepcopy(nn.ModuleList([module, module]))
    assert copied[0] is copied[1]
    assert copied[0].group is one_rank
    assert copied[0].options["inv_weight"] is not module.options["inv_weight"]
    assert_close(copied[0](*pair(5, 4)), module(*pair(5, 4)), rtol=0, atol=0)


def test_only_the_loss_carries_a_gradient():
    y, g = pair(5, 4)
    out = FD.vicreg_loss(y.requires_grad_(), g)
    assert [x.requires_grad for x in out] == [True, False, False, False]
    assert_close(out.loss, 25 * out.invariance + 10 * out.variance + 0.5 * out.covariance, rtol=1e-12, atol=0)


def test_routes_are_one_function():
    y, g = pair(12, 9)
    results = [FD.vicreg_loss(y, g, route=route) for route in ("auto", "gram", "covariance")]
    for other in results[1:]:
        assert_close(tuple(other), tuple(results[0]), rtol=1e-12, atol=0)


def test_properties():
    y, g = pair(20, 7)
    out = FD.vicreg_loss(y, g)
    shifted = FD.vicreg_loss(y + 100, g + 100)
    assert_close(tuple(shifted), tuple(out), rtol=1e-10, atol=1e-12)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    assert_close(tuple(FD.vicreg_loss(y[:, order], g[:, order])), tuple(out), rtol=1e-12, atol=1e-12)
    assert FD.vicreg_loss(y, y).invariance == 0
    collapsed = FD.vicreg_loss(y[:1].expand(20, 7), g)
    assert_close(collapsed.variance.item(), 1 - 1e-2, rtol=1e-9, atol=0)  # the square root of eps is left
    assert collapsed.covariance < 1e-25
    spread = FD.vicreg_loss(10 * y, g)
    assert spread.variance == 0
    assert FD.vicreg_loss(y[:, :1], g[:, :1]).covariance == 0, "one column has nothing off the diagonal"


def test_one_row_is_finite_and_warns_once():
    y, g = pair(1, 6)
    for unbiased in (False, True):
        with pytest.warns(UserWarning, match="one row") as caught:
            out = FD.vicreg_loss(y.requires_grad_(), g, unbiased=unbiased)
        assert len([warning for warning in caught if "one row" in str(warning.message)]) == 1
        assert out.covariance == 0
        assert_close(out.variance.item(), 1 - 1e-2, rtol=1e-9, atol=0)
        assert torch.autograd.grad(out.loss, y)[0].isfinite().all()


def test_one_row_compiles_as_one_graph(fresh_compiler):
    y, g = pair(1, 6)
    with pytest.warns(UserWarning, match="one row"):
        expected = FD.vicreg_loss(y, g)
    compiled = torch.compile(lambda y, g: FD.vicreg_loss(y, g), fullgraph=True, backend="aot_eager")
    assert_close(tuple(compiled(y, g)), tuple(expected), rtol=1e-12, atol=0)


def test_nothing_and_nan():
    empty = torch.empty(0, 4, device=DEVICE, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for unbiased in (False, True):
            out = FD.vicreg_loss(empty, empty, unbiased=unbiased)
            assert [x.isnan().item() for x in out] == [True, True, True, False]
            assert torch.autograd.grad(out.loss, empty)[0].shape == (0, 4)
    y, g = pair(5, 4)
    y[2, 1] = float("nan")
    assert FD.vicreg_loss(y, g).loss.isnan()


@pytest.mark.parametrize("gamma", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("shape", [(4, 3), (3, 6)])
def test_a_constant_column_without_eps_has_eagers_gradient(shape, gamma):
    y, g = pair(*shape)
    y[:, 1] = 2
    y.requires_grad_()
    ours, eager = (
        FD.vicreg_loss(y, g, gamma=gamma, eps=0, **options).loss for options in ({}, {"backend": "reference"})
    )
    (grad,), (expected,) = (torch.autograd.grad(x, y) for x in (ours, eager))
    assert expected[:, 1].isnan().all()
    assert_close(grad, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_term_that_is_left_out_is_0_of_nothing_too():
    assert not any(FD.vicreg_loss(*pair(0, 4), inv_weight=0, var_weight=0, cov_weight=0))


def test_a_weights_dtype_is_not_the_losses():
    y, g = pair(5, 3, dtype=torch.float32)
    weights = {name: torch.tensor(2.0, dtype=torch.float64, device=DEVICE) for name in ("inv_weight", "cov_weight")}
    assert FD.vicreg_loss(y, g, **weights).loss.dtype == torch.float32


@pytest.mark.parametrize("input_of_grad", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_transposed_student_compiles(dtype, input_of_grad, fresh_compiler):
    y, g = pair(4, 6, dtype=dtype)
    inputs = [y.T, g.T.contiguous()]
    leaf = inputs[input_of_grad].requires_grad_()
    compiled = torch.compile(lambda y, g: FD.vicreg_loss(y, g).loss, fullgraph=True, backend="aot_eager")
    assert_close(*(torch.autograd.grad(x, leaf) for x in (compiled(*inputs), FD.vicreg_loss(*inputs).loss)))


def test_half_precision_is_float32_inside():
    y, g = pair(64, 48)
    for dtype in (torch.bfloat16, torch.float16):
        low = y.to(dtype).requires_grad_(), g.to(dtype)
        wide = low[0].detach().double().requires_grad_(), low[1].double()
        out, exact = FD.vicreg_loss(*low), FD.vicreg_loss(*wide)
        assert out.loss.dtype == torch.float32
        for a, b in zip(out, exact, strict=True):
            assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
        grad, true = torch.autograd.grad(out.loss, low[0])[0], torch.autograd.grad(exact.loss, wide[0])[0]
        assert_close(grad, true.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)  # float16's subnormal spacing
    assert FD.vicreg_loss(y, g.bfloat16()).loss.dtype == torch.float64


def test_weights_may_be_device_scalars():
    y, g = pair(9, 5)
    weights = {"inv_weight": 2.0, "var_weight": 3.0, "cov_weight": 4.0}
    tensors = {name: torch.tensor(value, device=DEVICE) for name, value in weights.items()}
    assert_close(FD.vicreg_loss(y, g, **tensors).loss, FD.vicreg_loss(y, g, **weights).loss, rtol=1e-12, atol=0)
    for name, weight in tensors.items():
        two = torch.stack([weight, 2 * weight])
        batched = torch.func.vmap(lambda x: FD.vicreg_loss(y, g, **{**weights, name: x}).loss)(two)  # noqa: B023
        expected = [FD.vicreg_loss(y, g, **{**weights, name: x}).loss for x in two.tolist()]
        assert_close(batched, torch.stack(expected), rtol=1e-12, atol=0)


def test_a_weight_that_changes_with_the_step_is_not_compiled_anew(fresh_compiler):
    counter = CompileCounterWithBackend("aot_eager")

    def run(y, g, weight):
        return FD.vicreg_loss(y, g, var_weight=weight, cov_weight=2 * weight).loss

    y, g = pair(6, 4, dtype=torch.float32)
    y.requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for weight in (1.0, 2.5, 0.75, 4.0):
        a, b = (f(y, g, weight) for f in (compiled, run))
        assert_close(a, b)
        assert_close(*(torch.autograd.grad(x, y) for x in (a, b)))
    assert counter.frame_count <= 2, "one graph for the first, and one for every other"


def test_the_backward_has_the_forwards_weights(backend):
    """A weight that was changed between forward and backward is not read again. Eager torch refuses it."""
    y, g = pair(9, 5)
    weight = torch.tensor(2.0, device=DEVICE, dtype=y.dtype)
    expected = torch.autograd.grad(FD.vicreg_loss(y.requires_grad_(), g, cov_weight=2.0).loss, y)
    loss = FD.vicreg_loss(y, g, cov_weight=weight).loss
    weight.fill_(1e3)
    if backend == "reference":
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.grad(loss, y)
    else:
        assert_close(torch.autograd.grad(loss, y), expected, rtol=1e-12, atol=0)


def test_autocast_changes_nothing():
    y, g = pair(32, 24, dtype=torch.float32)
    expected = FD.vicreg_loss(y, g)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert (y.T @ y).dtype == torch.bfloat16, "the example must be under autocast"
        out = FD.vicreg_loss(y, g)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_no_value_is_read_on_the_host():
    """Meta tensors have no values, so that reading one would raise."""
    y = torch.empty(6, 4, device="meta", requires_grad=True)
    FD.vicreg_loss(y, y.detach()).loss.backward()
    assert y.grad.shape == (6, 4)


def in_whole_tiles(rows, width):
    return padded(rows) * padded(width)


GRADIENTS = {
    "autograd": lambda f, y: torch.autograd.grad(f(y.requires_grad_()), y),
    "create_graph": lambda f, y: torch.autograd.grad(f(y.requires_grad_()), y, create_graph=True),
    "torch.func": lambda f, y: torch.func.grad(f)(y),
}


@pytest.mark.parametrize("differentiate", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("shape", [(20, 300), (300, 20)])
def test_nothing_is_larger_than_the_student(shape, differentiate, backend, monkeypatch):
    """The route by rows allocates nothing of size [D, D], in the forward or the backward. Kernels have whole tiles."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    allocate = torch.Tensor.new_empty

    def new_empty(self, *size, **options):  # what launchers allocate, which a dispatcher's mode does not see
        out = allocate(self, *size, **options)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    y, g = pair(*shape)
    with Watch():
        differentiate(lambda y: FD.vicreg_loss(y, g).loss, y)
    too_large = max(sizes) > (in_whole_tiles(*shape) if backend == "triton" else y.numel())
    assert too_large == (backend == "reference" and shape[0] < shape[1])


@pytest.mark.parametrize("shape", [(20, 300), (300, 20)])
def test_no_copy_of_the_student_waits_for_the_backward(shape, backend):
    """The tensors saved in float64 are the inputs, the product, some numbers a column, the largest column and the
    weights.

    The kernels save the product and the centred student in whole tiles, as they do of float32.
    """
    y, g = pair(*shape)
    y.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        FD.vicreg_loss(y, g)
    count = sum(x.numel() for x in saved if x is not y and x is not g)
    product, few = min(shape) ** 2, 4 * shape[1] + 4
    if backend == "triton":
        product = in_whole_tiles(min(shape), min(shape)) + in_whole_tiles(*shape)
    assert (count > product + few) == (backend == "reference")


def test_vmap_and_compile():
    y, g = pair(3, 6, 4)
    expected = torch.stack([FD.vicreg_loss(a, b).loss for a, b in zip(y, g, strict=True)])
    assert_close(torch.func.vmap(lambda y, g: FD.vicreg_loss(y, g).loss)(y, g), expected, rtol=1e-12, atol=0)
    y, g = pair(6, 4)
    y.requires_grad_()
    compiled = torch.compile(lambda y, g: FD.vicreg_loss(y, g), fullgraph=True, backend="aot_eager")
    out, expected = compiled(y, g), FD.vicreg_loss(y, g)
    assert_close(tuple(out), tuple(expected), rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(out.loss, y), torch.autograd.grad(expected.loss, y), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("zero", ["inv_weight", "var_weight", "cov_weight"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_a_weight_of_zero_leaves_its_term_out(zero, shape):
    """A NaN that only this term would read does not reach the loss. The value of a tensor weight is not read."""
    y, g = pair(*shape)
    terms = dict(zip(("inv_weight", "var_weight", "cov_weight"), ("invariance", "variance", "covariance"), strict=True))
    full, out = FD.vicreg_loss(y, g)._asdict(), FD.vicreg_loss(y, g, **{zero: 0})._asdict()
    computed = FD.vicreg_loss(y, g, **{zero: torch.tensor(0.0, device=DEVICE)})
    assert_close(computed.loss, out["loss"], rtol=1e-12, atol=0)
    assert getattr(computed, terms[zero]) > 0
    assert out.pop(terms[zero]) == 0
    assert all(torch.equal(full[term], value) for term, value in out.items() if term != "loss")
    if zero == "inv_weight":
        loss = FD.vicreg_loss(y.requires_grad_(), g * float("nan"), inv_weight=0).loss
        outer = torch.ones_like(loss).requires_grad_()
        (grad,) = torch.autograd.grad(loss, y, outer, create_graph=True)
        second = torch.autograd.grad(grad.square().sum(), (y, outer))
        assert all(x.isfinite().all() for x in (loss, grad, *second))
    nothing = FD.vicreg_loss(y.requires_grad_(), g, inv_weight=0, var_weight=0, cov_weight=0)
    assert nothing.loss == 0
    assert torch.equal(torch.autograd.grad(nothing.loss, y)[0], torch.zeros_like(y))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("student", {"student": torch.ones(2, 2, 4, 8), "target": torch.ones(2, 2, 4, 8)}),
        ("student", {"student": torch.ones(2, 0, 8), "target": torch.ones(2, 0, 8)}),
        ("target", {"target": None, "both": True}),
        ("both", {"both": 1}),
        ("per", {"per": "token"}),
        ("student", {"student": torch.ones(8), "target": torch.ones(8)}),
        ("student", {"student": torch.ones(4, 8).long()}),
        ("target", {"target": torch.ones(4, 7)}),
        ("inv_weight", {"inv_weight": torch.ones(2)}),
        ("var_weight", {"var_weight": torch.ones((), requires_grad=True)}),
        ("cov_weight", {"cov_weight": "strong"}),
        ("gamma", {"gamma": float("inf")}),
        ("eps", {"eps": -1e-4}),
        ("cov_reduction", {"cov_reduction": "sum"}),
        ("unbiased", {"unbiased": "no"}),
        ("route", {"route": "fast"}),
        ("group", {"group": "auto"}),
        ("backend", {"backend": ""}),
    ],
)
def test_bad_arguments_are_named(name, arguments):
    with pytest.raises((ValueError, TypeError), match=f"^{name} "):
        FD.vicreg_loss(**{"student": torch.ones(4, 8), "target": torch.ones(4, 8), **arguments})


def test_the_module():
    y, g = (x.requires_grad_() for x in pair(6, 4))
    out = VICRegLoss(gamma=2.0, cov_reduction="sum_over_d")(y, g)
    expected = FD.vicreg_loss(y, g, gamma=2.0, cov_reduction="sum_over_d")
    assert_close(tuple(out), tuple(expected), rtol=0, atol=0)
    assert torch.autograd.grad(out.loss, (y, g), allow_unused=True)[1] is None
    assert torch.autograd.grad(VICRegLoss(detach_teacher=False)(y, g).loss, g)[0].abs().sum() > 0
    weighty = VICRegLoss(inv_weight=torch.tensor(2.0))
    assert_close(weighty.to(DEVICE)(y, g).loss, FD.vicreg_loss(y, g, inv_weight=2.0).loss)
    assert weighty.to("meta")(y.to("meta"), g.to("meta")).loss.device.type == "meta"
    assert not weighty.state_dict()
    with pytest.raises(ValueError, match="^group "):
        VICRegLoss(group="all")
    with pytest.raises(TypeError, match="^group must be 'auto', None or a torch.distributed.ProcessGroup, got int"):
        VICRegLoss(group=3)
    with pytest.raises(ValueError, match="^route "):
        VICRegLoss(route="fast")
    with pytest.raises(TypeError, match="^detach_teacher must be True or False, got 0"):
        VICRegLoss(detach_teacher=0)
