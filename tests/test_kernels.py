"""What only device code can get wrong: memory that is not ours, offsets past 2**31, and what the dispatcher is told.

Collected where a kernel runs: in the interpreter (TRITON_INTERPRET=1), or on a GPU.
"""

import ctypes
import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fused_dino
from guard import guarded, survives
from proving import DEVICE, DTYPES, INTERPRETED, OPS, draw, results

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
interpreted_only = pytest.mark.skipif(
    not INTERPRETED, reason="a GPU has no guard pages: compute-sanitizer serves there"
)


def test_the_kernel_is_what_runs():
    for op in OPS:
        assert fused_dino.explain_backend(op.name, draw((2, 3))[0], backend="triton").startswith("triton: ")


@interpreted_only
@each_op
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("shape", [(3, 37), (1, 1), (2, 256), (2, 1025), (2, 4097)], ids=str)
def test_nothing_out_of_bounds_is_touched(op, side, shape, monkeypatch):
    """Inputs, saved tensors and results alike lie flush against pages that kill whoever touches them."""
    inputs = tuple(guarded(x, side) for x in draw(shape))
    made = torch.Tensor.new_empty

    def guarded_empty(self, *size, **options):
        out = made(self, *size, **options)
        return guarded(out, side) if out.numel() else out

    def run():
        monkeypatch.setattr(torch.Tensor, "new_empty", guarded_empty)
        results(op, inputs, "triton")

    assert survives(run)


@interpreted_only
def test_a_guard_page_kills():
    for side, outside in (("before", -1), ("after", 20)):
        x = guarded(torch.ones(5), side)
        assert survives(x.sum)
        assert survives(lambda x=x: ctypes.string_at(x.data_ptr(), 20))
        assert not survives(lambda x=x, outside=outside: ctypes.string_at(x.data_ptr() + outside, 1))


@each_op
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_offsets_past_two_to_the_31st(op, which):
    """Three rows whose starts lie 2**30 elements apart; only the pages that are touched exist."""
    width, stride = 40, 2**30 + 16
    far = []
    for x in draw((3, width), torch.bfloat16):
        wide = torch.empty(2 * stride + width, dtype=torch.bfloat16, device=DEVICE).as_strided((3, width), (stride, 1))
        far.append(wide.copy_(x))
    near = draw((3, width), torch.bfloat16)
    inputs = tuple(
        f if which in (name, "both") else n for name, f, n in zip(("student", "teacher"), far, near, strict=True)
    )
    expected = results(op, near, "triton")

    def run():
        for got, want in zip(results(op, inputs, "triton"), expected, strict=True):
            assert torch.equal(got, want)

    if INTERPRETED:
        assert survives(run), "a wrong address, or a wrong number"
    else:
        run()


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written(op, dtype, monkeypatch):
    """Memory is handed out full of NaN: what a kernel leaves unwritten shows."""
    made = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: made(*a, **k).fill_(float("nan")))
    for shape in ((4, 33), (2, 5000)):
        assert not any(x.isnan().any() for x in results(op, draw(shape, dtype), "triton"))


@each_op
@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES[:3], repeat=2)), ids=str)
def test_opcheck(op, first, second):
    student, teacher = draw((5, 33), first)[0], draw((5, 33), second)[1]
    arguments = op.forward_arguments(student, teacher)
    torch.library.opcheck(op.forward, arguments)
    torch.library.opcheck(op.backward, op.backward_arguments(student, teacher, *op.forward(*arguments)))


@each_op
def test_the_ops_own_gradient_is_refused(op):
    student, teacher = draw((5, 33))
    out = op.forward(*op.forward_arguments(student.requires_grad_(), teacher))[0]
    with pytest.raises(NotImplementedError, match="no gradient of its own"):
        out.sum().backward()


@each_op
def test_one_launch_forward_one_backward_and_nothing_else_of_full_size(op):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    student, teacher = draw((64, 96))
    run = torch.compile(
        lambda s, t: op.run(s, t, backend="triton"), fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )
    run(student.requires_grad_(), teacher).backward()
    assert len(graphs) == 2
    free = ("view", "reshape", "detach", "alias", "expand", "t")
    for graph, ours in zip(graphs, (op.forward, op.backward), strict=True):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        assert [node.target for node in calls].count(ours) == 1
        for node in calls:
            value = node.meta.get("val")
            whole = isinstance(value, torch.Tensor) and value.numel() >= student.numel()
            name = str(node.target).removeprefix("aten.").partition(".")[0]
            assert not whole or name in free or node.target is ours or "getitem" in str(node.target), node
