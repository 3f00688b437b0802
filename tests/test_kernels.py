"""What only device code can get wrong: addresses out of bounds, offsets past 2**31, and what the dispatcher is told.

These tests are collected where a kernel runs: in the interpreter (TRITON_INTERPRET=1), or on a GPU.
"""

import ctypes
import itertools
import operator
from dataclasses import replace
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fused_dino
import proving
from fused_dino import functional as FD
from fused_dino.ops import columns, cosine_triton, standardize, tickets, vicreg_triton
from fused_dino.ops.vicreg_plan import make_plan
from guard import guarded, survives
from proving import DEVICE, DTYPES, INTERPRETED, grad_output_of, results
from table import MSE, PREPROCESS, STANDARDIZE, VICREG
from table import OPS as ALL

OPS = [op for op in ALL if op.forward is not None]

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
rowwise_op = pytest.mark.parametrize("op", [op for op in OPS if op.rowwise], ids=lambda op: op.name)
interpreted_only = pytest.mark.skipif(
    not INTERPRETED, reason="a GPU has no guard pages: compute-sanitizer serves there"
)


def test_the_kernel_is_what_runs():
    for op in OPS:
        explained = fused_dino.explain_backend(op.part_of or op.name, op.draw(op.shape(2, 3))[0], backend="triton")
        assert explained.startswith("triton: ")


def results_between_pages(op, inputs, side, monkeypatch, **options):
    """Run the op in a child process. All that it allocates, and grad_output, lies against guard pages, too."""
    new_empty = torch.Tensor.new_empty

    def guarded_empty(self, *size, **options):
        out = new_empty(self, *size, **options)
        return guarded(out, side) if out.numel() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_empty)
    monkeypatch.setattr(proving, "grad_output_of", lambda out: guarded(grad_output_of(out), side))
    if inputs[0].is_floating_point():
        results(op, inputs, "triton", **options)
    else:
        op.run(*inputs, backend="triton", **options)


@interpreted_only
@each_op
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("shape", [(3, 37), (1, 1), (2, 256), (2, 1025), (2, 4097)], ids=str)
def test_nothing_out_of_bounds_is_touched(op, side, shape, monkeypatch):
    """Inputs, saved tensors, gradients and results lie against guard pages, which kill a process that touches them."""
    inputs = tuple(guarded(x, side) for x in op.draw(op.shape(*shape)))
    assert survives(lambda: results_between_pages(op, inputs, side, monkeypatch))


@interpreted_only
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("shape", [(20, 64), (64, 24)], ids=str)
def test_aligned_rows_of_16_bits_stay_within_their_pages(side, shape, monkeypatch):
    """VICReg multiplies such rows as they are, by rows and by columns."""
    inputs = tuple(guarded(x, side) for x in VICREG.draw(shape, torch.bfloat16))
    assert survives(lambda: results_between_pages(VICREG, inputs, side, monkeypatch))


def pixels_last(x):
    """Return the dense [B, H, W, 3] of an image x [B, 3, H, W], the layout of decoded bytes."""
    return x.permute(0, 2, 3, 1).contiguous()


@interpreted_only
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(
    ("options", "layout", "dtype"),
    [
        ({}, "channels last", torch.float32),
        ({}, "channels last", torch.uint8),
        ({"clamp": True, "patch_size": 2}, "contiguous", torch.uint8),
        ({"clamp": True, "patch_size": 2, "antialias": True}, "channels last", torch.float32),
        ({"interpolation": "bicubic", "clamp": True}, "channels last", torch.bfloat16),
        ({"interpolation": "bicubic", "antialias": True}, "contiguous", torch.float32),
        ({"interpolation": "bicubic", "antialias": True}, "channels last", torch.uint8),
    ],
    ids=str,
)
def test_no_option_or_layout_of_pixels_reaches_out_of_bounds(options, layout, dtype, side, monkeypatch):
    cases = [((1, 3, 5, 7), (2, 4)), ((1, 3, 2, 3), (4, 6))]
    if not options:
        cases.append(((1, 3, 1, 1030), (1, 3)))  # several segments

    def run():
        for shape, size in cases:
            x = (PREPROCESS.draw(shape)[0] * 60 + 128).to(dtype)
            x = guarded(x, side) if layout == "contiguous" else guarded(pixels_last(x), side).permute(0, 3, 1, 2)
            results_between_pages(PREPROCESS, (x,), side, monkeypatch, size=size, **options)

    assert survives(run)


@interpreted_only
def test_a_guard_page_kills():
    for side, outside in (("before", -1), ("after", 20)):
        x = guarded(torch.ones(5), side)
        assert survives(x.sum)
        assert survives(lambda x=x: ctypes.string_at(x.data_ptr(), 20))
        assert not survives(lambda x=x, outside=outside: ctypes.string_at(x.data_ptr() + outside, 1))


@pytest.mark.parametrize(
    ("op", "which"),
    [pytest.param(op, which, id=f"{op.name}-{which}") for op in OPS for which in (*op.inputs, "all")],
)
def test_offsets_past_two_to_the_31st(op, which):
    """The starts of three examples lie 2**30 elements from each other; only the pages that are touched exist."""
    shape, stride = op.shape(3, 40), 2**30 + 16
    near = op.draw(shape, torch.bfloat16)
    far = []
    for x in near:
        wide = torch.empty(2 * stride + x[0].numel(), dtype=torch.bfloat16, device=DEVICE)
        far.append(wide.as_strided(shape, (stride, *x.stride()[1:])).copy_(x))
    inputs = tuple(f if which in (name, "all") else n for name, f, n in zip(op.inputs, far, near, strict=True))
    expected = results(op, near, "triton")

    def run():
        assert all(map(torch.equal, results(op, inputs, "triton"), expected))

    if INTERPRETED:
        assert survives(run), "a wrong address, or a wrong number"
    else:
        run()


@pytest.mark.parametrize("axis", [0, 1], ids=["images", "rows"])
def test_offsets_of_bytes_past_two_to_the_31st(axis):
    """The starts of channels-last images, or those of their rows, lie 2**30 bytes from each other."""
    near = pixels_last((PREPROCESS.draw((3, 3, 3, 5))[0] * 60 + 128).to(torch.uint8))
    stride = list(near.stride())
    stride[axis] = 2**30 + 16
    wide = torch.empty(2 * stride[axis] + near.numel(), dtype=torch.uint8, device=DEVICE)
    far = wide.as_strided(near.shape, stride).copy_(near)

    def run():
        out, expected = (FD.preprocess(x.permute(0, 3, 1, 2), (4, 6), backend="triton") for x in (far, near))
        assert torch.equal(out, expected)

    if INTERPRETED:
        assert survives(run), "a wrong address, or a wrong number"
    else:
        run()


@pytest.fixture
def full_of_nan(monkeypatch):
    """New memory is full of NaN, so that an element which a kernel leaves unwritten shows."""
    new_empty = torch.Tensor.new_empty

    def filled(*size, **options):
        out = new_empty(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written(op, dtype, full_of_nan):
    for size in ((4, 33), (2, 5000), (9, 90), *op.more_sizes):
        inputs = op.draw(op.shape(*size), dtype)
        for options in op.reductions:
            assert not any(x.isnan().any() for x in results(op, inputs, "triton", **options))


@rowwise_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_rows_of_weight_0_are_written(op, reduction, dtype, full_of_nan):
    weight = torch.tensor([0.0, 1.0, 0.0], device=DEVICE)
    for width in (33, 5000):
        found = results(op, op.draw((3, width), dtype), "triton", weight=weight, reduction=reduction)
        for rows in (x for x in found if x.ndim):
            assert (rows[weight == 0] == 0).all()
            assert not rows.isnan().any()


def outputs_of(op, inputs):
    """Return the results of the op's forward as a tuple, also where there is one."""
    outputs = op.forward(*op.forward_arguments(*inputs))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def dtypes_of_inputs():
    for op in OPS:
        for dtypes in itertools.product(DTYPES[:3], repeat=len(op.inputs)):
            yield pytest.param(op, dtypes[0], dtypes[-1], id="-".join([op.name, *map(str, dtypes)]))


@pytest.mark.parametrize(("op", "first", "second"), list(dtypes_of_inputs()))
def test_opcheck(op, first, second):
    for size in ((3, 33), (7, 3)):  # by rows, and by columns
        inputs = list(op.draw(op.shape(*size), first))
        inputs[-1] = inputs[-1].to(second)
        arguments = op.forward_arguments(*inputs)
        torch.library.opcheck(op.forward, arguments)
        torch.library.opcheck(op.backward, op.backward_arguments(*inputs, *outputs_of(op, inputs)))


@pytest.mark.parametrize("normalize", [True, False])
def test_opcheck_of_standardize_with_a_weight(normalize):
    """Every element is written."""
    (x,) = STANDARDIZE.draw((5, 6))
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0], device=DEVICE)
    rows, how = (weight, standardize.count_rows(weight)), (normalize, 1e-5, 1e-12, x.dtype)
    torch.library.opcheck(STANDARDIZE.forward, (x, *rows, *how))
    first, second = (STANDARDIZE.forward(x, *rows, *how) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    torch.library.opcheck(STANDARDIZE.backward, (x, x, *rows, *first, *how))


@interpreted_only
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_weight_is_read_within_its_bounds(side, monkeypatch):
    whitened = replace(MSE, run=partial(FD.mse_loss, whiten=True))
    weight = guarded(torch.arange(37) % 3.0, side)
    inputs = tuple(guarded(x, side) for x in MSE.draw((37, 20)))
    for op in (MSE, whitened):
        assert survives(lambda op=op: results_between_pages(op, inputs, side, monkeypatch, weight=weight))


@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (4, 3), (3, 1)])
@pytest.mark.parametrize("cov_weight", [0, 1])
def test_opcheck_of_vicreg_where_little_is_computed(shape, cov_weight):
    """Every element is written. A result that is not needed is empty or 0."""
    plan = make_plan(
        *shape, inv_weight=1, var_weight=1, cov_weight=cov_weight, gamma=1.0, eps=1e-4, cov_reduction="mean",
        unbiased=False, route="auto",
    )  # fmt: skip
    inputs = VICREG.draw(shape)
    if shape[0]:
        torch.library.opcheck(VICREG.forward, (*inputs, None, *plan))
    first, second = (VICREG.forward(*inputs, None, *plan) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def test_sizes_that_float32_cannot_count_are_refused():
    with pytest.raises(ValueError, match="^size must be at most 262144 a side"):
        FD.preprocess(torch.zeros(1, 3, 1, 1, device=DEVICE), (1, 2**18 + 1), backend="triton")


@each_op
def test_the_ops_own_gradient_is_refused(op):
    first, *others = op.draw(op.shape(5, 33))
    loss, *_ = outputs_of(op, (first.requires_grad_(), *others))
    with pytest.raises(NotImplementedError, match="no gradient of its own"):
        loss.sum().backward()


def traced(op):
    """Return the op as one compiled function, and its graphs, each the nodes of its calls, as they are compiled."""
    graphs = []

    def keep(graph, _):
        graphs.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    def run(*inputs):
        return op.run(*inputs, backend="triton")

    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=keep)), graphs


@each_op
def test_one_launch_forward_one_backward_and_nothing_else_of_full_size(op):
    first, *others = op.draw(op.shape(8, 24))
    run, graphs = traced(op)
    out = run(first.requires_grad_(), *others)
    out.backward(grad_output_of(out))
    assert len(graphs) == 2
    free = ("view", "reshape", "detach", "alias", "expand", "t")
    for nodes, ours in zip(graphs, (op.forward, op.backward), strict=True):
        assert [node.target for node in nodes].count(ours) == 1
        for node in nodes:
            value = node.meta.get("val")
            full_size = isinstance(value, torch.Tensor) and value.numel() >= first.numel()
            name = str(node.target).removeprefix("aten.").partition(".")[0]
            assert not full_size or name in free or node.target in (ours, operator.getitem), node


class Launches(TorchDispatchMode):
    """Notes the calls that reach the dispatcher, but for views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or "empty" in func.name() or "detach" in func.name()):
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@rowwise_op
def test_two_launches_take_256_rows_forward_and_backward(op):
    """Eager code writes the gradient in the forward, and its backward scales it; compiled code takes two passes."""
    student, target = op.draw((256, 1024))
    student.requires_grad_()
    grad_output = torch.ones((), device=DEVICE)
    with Launches() as launches:
        torch.autograd.grad(op.run(student, target, backend="triton"), student, grad_output)
    assert launches.seen == ["fused_dino::cosine_rows", "fused_dino::cosine_rescale_"]
    run, graphs = traced(op)
    torch.autograd.grad(run(student, target), student, grad_output)
    calls = [node.target for nodes in graphs for node in nodes if node.target is not operator.getitem]
    assert [call for call in calls if not call.is_view] == [cosine_triton.cosine_rows.overload] * 2


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_vicreg_launches_its_two_kernels_alone(shape):
    """The kernels weigh the terms and take the loss's gradient as it comes."""
    student, target = VICREG.draw(shape)
    student.requires_grad_()
    grad_output = torch.ones((), device=DEVICE)
    with Launches() as launches:
        torch.autograd.grad(FD.vicreg_loss(student, target, backend="triton").loss, student, grad_output)
    assert launches.seen == ["fused_dino::vicreg_fwd", "fused_dino::vicreg_bwd"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (600, 700), (700, 600)])
def test_vicreg_takes_four_launches_forward_and_one_backward(shape, dtype, monkeypatch):
    launched = []
    for module in (vicreg_triton, columns):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    student, target = (x.requires_grad_(i == 0) for i, x in enumerate(VICREG.draw(shape, dtype)))
    loss = FD.vicreg_loss(student, target, backend="triton").loss
    names = ["statistics", "planes", "product", "finish"]
    assert launched == [f"vicreg_{name}_kernel" for name in names]
    loss.backward()
    assert launched[len(names) :] == ["vicreg_bwd_kernel"]


def test_a_ticket_is_left_zero(monkeypatch):
    """A launch counts its programs with a ticket, and the next launch of the same slot starts from zero."""
    used = []
    ticket = tickets.ticket

    def keep(x):
        used.append(ticket(x))
        return used[-1]

    monkeypatch.setattr(cosine_triton, "ticket", keep)
    for rows in (1, 5, cosine_triton.MANY_ROWS + 1):
        FD.cosine_loss(*(torch.randn(rows, 3, device=DEVICE) for _ in range(2)), backend="triton")
    assert len(used) == 3
    assert all(x == 0 for x in used)


def layouts(x):
    """Yield the same images as they may lie in memory."""
    dense = pixels_last(x)
    yield "contiguous", x
    yield "rows of wider images", torch.cat([x, x], 3)[..., : x.shape[3]]
    yield "channels last", dense.permute(0, 3, 1, 2)
    yield "channels last, rows of wider images", torch.cat([dense, dense], 2)[:, :, : x.shape[3]].permute(0, 3, 1, 2)
    yield "channels last, three of six", torch.cat([dense, dense], 3)[..., :3].permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_pixels_are_read_in_place(dtype, monkeypatch):
    x = (PREPROCESS.draw((2, 3, 9, 9))[0] * 60 + 128).to(dtype)
    expected = FD.preprocess(x, (4, 6), backend="triton", patch_size=2)
    images, outputs = dict(layouts(x)), {}
    for name in ("to", "contiguous", "clone", "float", "bfloat16", "double", "reshape", "copy_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, **__: pytest.fail("a copy of the images"))
    for name, image in images.items():
        outputs[name] = FD.preprocess(image, (4, 6), backend="triton", patch_size=2)
    monkeypatch.undo()
    for name, out in outputs.items():
        assert_close(out, expected, msg=name)
