"""Every op of the table on every implementation: one suite, so that none has a test that another lacks."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from proving import (
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    OPS,
    check_accuracy,
    draw,
    grad_output_of,
    results,
    row_weight,
)

pytestmark = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
CASES = [pytest.param(op, case, id=f"{op.name}-{case}") for op in OPS for case in op.cases]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_is_as_accurate_as_eager(op, case, backend, dtype):
    inputs = draw(case.shape, dtype)
    check_accuracy(op, inputs, backend, **case.options)
    check_accuracy(op, inputs, backend, **case.options, **row_weight(op, case.shape))


@each_op
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(DTYPES, 2)), ids=str)
def test_mixed_dtypes(op, backend, first, second):
    check_accuracy(op, (draw((5, 33), first)[0], draw((5, 33), second)[1]), backend)


def extremes():
    """Inputs on which careless arithmetic fails: name -> a change of student [6, 40] in place."""

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
    student, teacher = draw((6, 40), dtype)
    dict(extremes())[name](student)
    check_accuracy(op, (student, teacher), backend, reduction="none")
    check_accuracy(op, (teacher, student), backend, reduction="none")


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_input_twice(op, backend, dtype):
    """Identical rows: 0 to two units in the last place of 2 in float32, whatever the dtype."""
    student, _ = draw((40, 300), dtype)
    assert op.run(student, student, backend=backend, reduction="none").abs().max() <= 4 * 2**-23


@each_op
def test_no_rows(op, backend):
    empty = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    assert op.run(empty, empty.detach(), backend=backend).isnan()
    total = op.run(empty, empty.detach(), backend=backend, reduction="sum")
    assert total == 0
    assert torch.autograd.grad(total, empty)[0].shape == (0, 8)
    assert op.run(empty, empty.detach(), backend=backend, reduction="none").shape[:1] == (0,)


def layouts(x):
    """Tensors equal to x [N, D] that lie differently in memory."""
    n, d = x.shape
    yield "transposed", x.T.contiguous().T
    yield "every second column", torch.stack([x, x], -1).flatten(1)[:, ::2]
    yield "a slice of wider rows", torch.cat([x, x], 1)[:, :d]
    yield "misaligned by one element", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, d)
    yield "reversed by a copy of strides", x.flip(0).flip(0)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(op, backend, dtype):
    student, teacher = draw((6, 33), dtype)
    expected = results(op, (student, teacher), backend)
    for (name, s), (other, t) in itertools.product(layouts(student), layouts(teacher)):
        assert torch.equal(s, student)
        got = results(op, (s, t), backend)
        tolerance = 4 * torch.finfo(dtype).eps  # another layout may be summed in another order
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item(), msg=f"{name}, {other}")
    same = student[:1].expand(6, 33)
    check_accuracy(op, (same, teacher), backend)
    check_accuracy(op, (teacher, same), backend)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_repeat(op, backend, dtype):
    first, *others = (results(op, draw((20, 1100), dtype), backend) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@each_op
@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_autocast_changes_nothing(op, backend, where):
    student, teacher = draw((64, 48))

    def run(forward, backward):
        leaf = student.detach().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=forward):
            out = op.run(leaf, teacher, backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=backward):
            return out, torch.autograd.grad(out, leaf)[0]

    for a, b in zip(run(where != "backward", where != "forward"), run(False, False), strict=True):
        assert torch.equal(a, b)


@each_op
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives(op, backend, reduction):
    inputs = tuple(x.requires_grad_() for x in draw((3, 5), torch.float64))

    def run(s, t):
        return op.run(s, t, backend=backend, reduction=reduction, **row_weight(op, (3, 5)))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    for only in range(2):
        fixed = list(inputs)
        fixed[1 - only] = fixed[1 - only].detach()
        assert torch.autograd.gradcheck(
            lambda x, f=fixed, i=only: run(*(x if i == j else f[j] for j in range(2))), inputs[only]
        )


@each_op
def test_functional_transforms(op, backend):
    student, teacher = draw((4, 3, 7), torch.float64)

    def ours(s, t):
        return op.run(s, t, backend=backend)

    def plain(s, t):
        return op.run(s, t, backend="reference")

    func = torch.func
    for wrap in (lambda f: f, func.grad, func.jacrev, lambda f: func.jacrev(func.grad(f))):
        assert_close(func.vmap(wrap(ours))(student, teacher), func.vmap(wrap(plain))(student, teacher))
    shared = func.vmap(ours, in_dims=(0, None))(student, teacher[0])
    assert_close(shared, torch.stack([plain(s, teacher[0]) for s in student]))
    leaf = student[0].requires_grad_()
    scales = torch.tensor([1.0, 3.0], dtype=torch.float64, device=DEVICE)
    batched, true = (
        torch.autograd.grad(f(leaf, teacher[0]), leaf, scales, is_grads_batched=True)[0] for f in (ours, plain)
    )
    assert_close(batched, true)


@each_op
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_without_recompiling(op, backend, compiler):
    counter = CompileCounterWithBackend(compiler)

    def run(s, t, w):
        return op.run(s, t, backend=backend, **w)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for rows in (8, 16, 24, 40):
        student, teacher = draw((rows, 65), seed=rows)
        weight = row_weight(op, (rows, 65))
        student.requires_grad_()
        a, b = compiled(student, teacher, weight), run(student, teacher, weight)
        assert_close(a, b)
        assert_close(torch.autograd.grad(a, student), torch.autograd.grad(b, student))
    assert counter.frame_count <= 2, "one graph for the first batch size, and one for every other"


@each_op
def test_exports(op, backend):
    module = torch.nn.Module()
    module.forward = lambda s, t: op.run(s, t, backend=backend)
    inputs = draw((4, 9))
    assert_close(torch.export.export(module, inputs).module()(*inputs), module.forward(*inputs))


@each_op
def test_a_gradient_that_nobody_wants_is_not_computed(op, backend):
    student, teacher = draw((4, 9))
    out = op.run(student.requires_grad_(), teacher, backend=backend)
    grads = torch.autograd.grad(out, (student, teacher.requires_grad_()), allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is None
    assert not op.run(student.detach(), teacher.detach(), backend=backend).requires_grad


@each_op
def test_repeated_backwards_accumulate(op, backend):
    student, teacher = draw((4, 9))
    out = op.run(student.requires_grad_(), teacher, backend=backend)
    for scale in (1.0, 3.0, 0.5):
        out.backward(torch.tensor(scale, device=DEVICE), retain_graph=True)
    true = results(op, (student.double(), teacher.double()), "reference")[1]
    assert_close(student.grad.double(), 4.5 / grad_output_of(out).item() * true, rtol=1e-5, atol=1e-8)


@each_op
def test_checkpointing(op, backend):
    student, teacher = draw((4, 9))
    leaf = student.requires_grad_()
    out = torch.utils.checkpoint.checkpoint(
        lambda s: op.run(s.sin(), teacher, backend=backend), leaf, use_reentrant=False
    )
    plain = op.run(leaf.sin(), teacher, backend="reference")
    assert_close(torch.autograd.grad(out, leaf), torch.autograd.grad(plain, leaf))


def test_the_yardstick_can_fail(backend):
    """A result that is wrong by a few of its last digits is refused."""
    op = OPS[0]

    def off(s, t, *, backend, **options):
        out = op.run(s, t, backend="reference", **options)
        return out if backend == "reference" else out * (1 + 1e-5)

    wrong = type(op)(**{**vars(op), "run": off})
    with pytest.raises(AssertionError, match="value: error"):
        check_accuracy(wrong, draw((5, 37)), backend if backend != "reference" else "torch")
