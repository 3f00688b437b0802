"""Every op of the table on every implementation: one suite, so that none has a test that another lacks."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fused_dino.ops import plain
from proving import (
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    INTERPRETED,
    check_accuracy,
    grad_output_of,
    results,
)
from table import OPS

pytestmark = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
rowwise_op = pytest.mark.parametrize("op", [op for op in OPS if op.rowwise], ids=lambda op: op.name)
op_of_two = pytest.mark.parametrize("op", [op for op in OPS if len(op.inputs) == 2], ids=lambda op: op.name)


def cases():
    """Yield every case in every dtype; in the interpreter, which is slow, in float32 and in one other, by turns."""
    others = itertools.cycle(dtype for dtype in DTYPES if dtype != torch.float32)
    for op in OPS:
        for case in op.cases:
            if not (INTERPRETED and case.closed_form):
                for dtype in (torch.float32, next(others)) if INTERPRETED else DTYPES:
                    yield pytest.param(op, case, dtype, id=f"{op.name}-{case}-{dtype}")


@pytest.mark.parametrize(("op", "case", "dtype"), list(cases()))
def test_is_as_accurate_as_eager(op, case, backend, dtype):
    inputs = op.draw(case.shape, dtype)
    check_accuracy(op, inputs, backend, **case.options)
    if op.rowwise:
        check_accuracy(op, inputs, backend, **case.options, **op.weight(case.shape))


@op_of_two
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(DTYPES, 2)), ids=str)
def test_mixed_dtypes(op, backend, first, second):
    shape = op.shape(5, 33)
    check_accuracy(op, (op.draw(shape, first)[0], op.draw(shape, second)[1]), backend)


def extremes():
    """Yield inputs on which careless arithmetic fails: a name, and a change in place of six flattened examples."""

    def rows(value):
        return lambda s: s[1:3].fill_(value)

    yield "zero rows", rows(0)
    yield "NaN in one element", lambda s: s[2, 7:8].fill_(float("nan"))
    yield "infinity in one element", lambda s: s[2, 7:8].fill_(float("inf"))
    yield "two infinities", lambda s: s[3, :2].copy_(torch.tensor([float("inf"), -float("inf")]))
    yield "the largest finite number", lambda s: s[1].fill_(torch.finfo(s.dtype).max)
    yield "the smallest normal number", lambda s: s[1].fill_(torch.finfo(s.dtype).smallest_normal)
    yield "subnormal numbers", lambda s: s[1].fill_(torch.finfo(s.dtype).smallest_normal / 4)
    yield "rows of very different size", lambda s: s.mul_(torch.logspace(-3, 3, 6).to(s)[:, None])
    yield "all equal", lambda s: s.fill_(1)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, _ in extremes()])
def test_extremes(op, backend, name, dtype):
    inputs = op.draw(op.shape(6, 40), dtype)
    dict(extremes())[name](inputs[0].view(6, -1))
    check_accuracy(op, inputs, backend, **op.unreduced)
    if len(inputs) == 2:
        check_accuracy(op, inputs[::-1], backend, **op.unreduced)


@rowwise_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_input_twice(op, backend, dtype):
    """The loss of identical rows is 0 to two units in the last place of 2 in float32, whatever the dtype."""
    student, _ = op.draw((40, 300), dtype)
    assert op.run(student, student, backend=backend, reduction="none").abs().max() <= 4 * 2**-23


@rowwise_op
def test_no_rows(op, backend):
    empty = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    assert op.run(empty, empty.detach(), backend=backend).isnan()
    total = op.run(empty, empty.detach(), backend=backend, reduction="sum")
    assert total == 0
    assert torch.autograd.grad(total, empty)[0].shape == (0, 8)
    assert op.run(empty, empty.detach(), backend=backend, reduction="none").shape[:1] == (0,)


def layouts(x):
    """Yield tensors equal to x that lie differently in memory."""
    yield "transposed", x.movedim(-1, 0).contiguous().movedim(0, -1)
    yield "every second column", torch.stack([x, x], -1).flatten(-2)[..., ::2]
    yield "a slice of wider rows", torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield "misaligned by one element", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    yield "reversed by a copy of strides", x.flip(0).flip(0)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(op, backend, dtype):
    inputs = op.draw(op.shape(6, 33), dtype)
    expected = results(op, inputs, backend)
    for lying in itertools.product(*map(layouts, inputs)):
        names, moved = zip(*lying, strict=True)
        assert all(map(torch.equal, moved, inputs))
        got = results(op, moved, backend)
        tolerance = 4 * torch.finfo(dtype).eps  # another layout may be summed in another order
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item(), msg=", ".join(names))
    for i, x in enumerate(inputs):
        expanded = (*inputs[:i], x[:1].expand_as(x), *inputs[i + 1 :])
        check_accuracy(op, expanded, backend)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_repeat(op, backend, dtype):
    first, *others = (results(op, op.draw(op.shape(3, 1100), dtype), backend) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@each_op
def test_autocast_changes_nothing(op, backend):
    first, *others = op.draw(op.shape(16, 48))

    def run(forward, backward):
        leaf = first.detach().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=forward):
            out = op.run(leaf, *others, backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=backward):
            return out, torch.autograd.grad(out, leaf, grad_output_of(out))[0]

    expected = run(forward=False, backward=False)
    assert all(map(torch.equal, run(forward=True, backward=False), expected))
    if backend != "reference":  # its backward is torch's own, whose matrix products autocast does reach
        assert all(map(torch.equal, run(forward=False, backward=True), expected))
        assert all(map(torch.equal, run(forward=True, backward=True), expected))


@pytest.mark.parametrize(
    ("op", "reduction"),
    [pytest.param(op, options, id=f"{op.name}-{options}") for op in OPS for options in op.reductions],
)
def test_derivatives(op, backend, reduction):
    shape = op.shape(3, 5)
    drawn = zip(op.inputs, op.draw(shape, torch.float64), strict=True)
    inputs = tuple(x.requires_grad_(name not in op.frozen) for name, x in drawn)

    def run(*leaves):
        return op.run(*leaves, backend=backend, **op.weight(shape), **reduction)

    # A whole Jacobian takes two calls an element; one random direction of it, where that is too many.
    fast = {"fast_mode": inputs[0].numel() > 100}
    assert torch.autograd.gradcheck(run, inputs, **fast)
    assert torch.autograd.gradgradcheck(run, inputs, **fast)
    for i in (i for i, x in enumerate(inputs) if x.requires_grad):
        fixed = [x.detach() for x in inputs]
        assert torch.autograd.gradcheck(lambda x, f=fixed, i=i: run(*f[:i], x, *f[i + 1 :]), inputs[i], **fast)


@each_op
def test_functional_transforms(op, backend):
    batch = op.draw((4, *op.shape(3, 7)), torch.float64)

    def ours(*inputs):
        return op.run(*inputs, backend=backend)

    def plain(*inputs):
        return op.run(*inputs, backend="reference")

    def square(f):
        return lambda *inputs: f(*inputs).square().sum()

    func = torch.func
    for wrap in (
        lambda f: f,
        func.jacrev,
        lambda f: func.grad(square(f)),
        lambda f: func.jacrev(func.grad(square(f))),
    ):
        assert_close(func.vmap(wrap(ours))(*batch), func.vmap(wrap(plain))(*batch))
    first, *others = (x[0] for x in batch)
    shared = func.vmap(ours, in_dims=(0, *(None for _ in others)))(batch[0], *others)
    assert_close(shared, torch.stack([plain(x, *others) for x in batch[0]]))
    leaf = first.requires_grad_()
    grad_output = grad_output_of(plain(leaf, *others))
    scales = torch.stack([grad_output, 3 * grad_output])
    batched, true = (
        torch.autograd.grad(f(leaf, *others), leaf, scales, is_grads_batched=True)[0] for f in (ours, plain)
    )
    assert_close(batched, true)


@each_op
def test_compiles_as_one_graph_without_recompiling(op, backend):
    """The reference is torch's own formulas: how inductor compiles them is torch's to test."""

    def run(inputs, weight):
        return op.run(*inputs, backend=backend, **weight)

    for compiler in ["aot_eager"] if backend == "reference" else ["aot_eager", "inductor"]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(compiler)
        compiled = torch.compile(run, fullgraph=True, backend=counter)
        for rows in (3, 8, 5, 6):
            shape = op.shape(rows, 17)
            inputs = op.draw(shape, seed=rows)
            leaf = inputs[0].requires_grad_()
            a, b = (f(inputs, op.weight(shape)) for f in (compiled, run))
            assert_close(a, b)
            assert_close(*(torch.autograd.grad(x, leaf, grad_output_of(x)) for x in (a, b)))
        assert counter.frame_count <= 2, "one graph for the first batch size, and one for every other"


@each_op
def test_exports(op, backend):
    module = torch.nn.Module()
    module.forward = lambda *inputs: op.run(*inputs, backend=backend)
    inputs = op.draw(op.shape(4, 9))
    batch = {0: torch.export.Dim("batch", min=2, max=8)}  # VICReg's route would change at 9
    exported = torch.export.export(module, inputs, dynamic_shapes=((batch,) * len(inputs),)).module()
    for rows in (4, 7):
        inputs = op.draw(op.shape(rows, 9))
        assert_close(exported(*inputs), module.forward(*inputs))


@op_of_two
def test_a_gradient_that_nobody_needs_is_not_computed(op, backend):
    student, target = op.draw(op.shape(4, 9))
    out = op.run(student.requires_grad_(), target, backend=backend)
    grads = torch.autograd.grad(out.sum(), (student, target.requires_grad_()), allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is None
    assert not op.run(student.detach(), target.detach(), backend=backend).requires_grad


@each_op
def test_repeated_backwards_accumulate(op, backend):
    first, *others = op.draw(op.shape(4, 9))
    leaf = first.requires_grad_()
    out = op.run(leaf, *others, backend=backend)
    grad_output = grad_output_of(out)
    for scale in (1.0, 3.0, 0.5):
        out.backward(scale * grad_output, retain_graph=True)
    true = results(op, tuple(x.detach().double() for x in (first, *others)), "reference")[1]
    assert_close(leaf.grad.double(), 4.5 * true, rtol=1e-5, atol=1e-5 * true.abs().max().item())


@each_op
def test_the_plain_route_has_the_bits_of_the_general_one(op, backend, monkeypatch):
    inputs = op.draw(op.shape(9, 40))
    short = results(op, inputs, backend)
    monkeypatch.setattr(plain, "watched", lambda: True)
    assert not plain.is_plain(inputs)
    assert all(map(torch.equal, short, results(op, inputs, backend)))


@each_op
def test_checkpointing(op, backend):
    first, *others = op.draw(op.shape(4, 9))
    leaf = first.requires_grad_()
    out = torch.utils.checkpoint.checkpoint(
        lambda x: op.run(x.sin(), *others, backend=backend), leaf, use_reentrant=False
    )
    plain = op.run(leaf.sin(), *others, backend="reference")
    assert_close(*(torch.autograd.grad(x, leaf, grad_output_of(x)) for x in (out, plain)))


@each_op
def test_the_yardstick_can_fail(op, backend):
    """A result that is wrong by a few of its last digits is refused."""

    def off(*inputs, backend, **options):
        out = op.run(*inputs, backend="reference", **options)
        return out if backend == "reference" else out * (1 + 1e-5)

    wrong = replace(op, run=off)
    with pytest.raises(AssertionError, match="value: error"):
        check_accuracy(wrong, op.draw(op.shape(5, 37)), backend if backend != "reference" else "torch")
