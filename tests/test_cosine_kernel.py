"""What the kernel of cosine_loss must not do: copy the rows of an index, read past them, or read rows of weight 0.

The interpreter alone collects these tests, since it shows what a kernel does.
"""

import operator
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

from fused_dino import functional as FD
from fused_dino.ops import cosine_triton
from fused_dino.ops.cosine_triton import RowOptions, cosine_rows
from guard import guarded, survives
from proving import rows

LOSSES = (FD.cosine_loss, FD.mse_loss)
STUDENT, TARGET, INDEX = (4, 6, 20), (4, 9, 20), torch.arange(24).view(4, 6) * 5 % 9
COPIES = ("gather", "index", "take", "embedding", "clone", "copy", "contiguous", "cat", "slice")


class Calls(TorchDispatchMode):
    """Notes the calls that reach the dispatcher, but for allocations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "empty" not in func.name():
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def draw(weighted):
    """Return a student, a target whose rows do not lie one after another, and options."""
    target = torch.cat([rows(*TARGET, seed=1), rows(*TARGET, seed=2)], 1)[:, 1:10]
    weight = torch.arange(24.0, dtype=torch.float64).view(4, 6)
    return rows(*STUDENT).requires_grad_(), target, {"weight": weight} if weighted else {}


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_nothing_out_of_bounds_is_touched(side, integers):
    """This holds whatever the index has. Rows without a position are NaN, but for those of weight 0."""
    most = torch.iinfo(integers).max
    index = torch.where(torch.arange(24).view(4, 6) % 5 < 2, 9, INDEX).to(integers)
    index[0, 2:] = torch.tensor([-1, most, -most - 1, most // 20 + 1])
    outside = ((index < 0) | (index >= 9)).flatten()
    weight, one = torch.arange(24.0) % 3, torch.ones(24)
    student, target, index = (guarded(x, side) for x in (rows(24, 20), rows(*TARGET, seed=1), index))

    def run():
        for chosen in (None, guarded(weight, side)):
            expected = outside & (one if chosen is None else weight).bool()
            arguments = student, target, index, chosen, None
            loss, *_ = cosine_rows.run(*arguments, None, RowOptions("cosine", "rows", 1, 1e-12))
            assert torch.equal(loss.isnan(), expected)
            how = RowOptions("cosine", "rows", 1, 1e-12, student_grad=True)
            grad = cosine_rows.run(*arguments, guarded(one.double(), side), how)[2]
            assert torch.equal(grad.isnan().all(-1), expected)
            assert torch.equal(grad.isnan().any(-1), expected)

    assert outside.any()
    assert survives(run)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_graph_has_no_gathered_copy(reduction, weighted):
    """The only tensors as large as the student are the student, our ops' results, and views of them."""
    graphs = []

    def keep(graph, _):
        graphs.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    student, target, options = draw(weighted)
    torch._dynamo.reset()
    run = torch.compile(FD.cosine_loss, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    run(student, target, index=INDEX, reduction=reduction, backend="triton", **options).sum().backward()
    ours = cosine_rows.overload
    assert len(graphs) == 2
    for nodes in graphs:
        assert [node.target for node in nodes].count(ours) == 1
        for node in nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.numel() >= student.numel():
                assert node.target is operator.getitem or node.target.is_view, node
            assert not any(word in str(node.target) for word in COPIES), node


@pytest.mark.parametrize("weighted", [False, True])
def test_a_plain_call_has_no_gathered_copy(weighted):
    student, target, options = draw(weighted)
    with Calls() as calls:
        FD.cosine_loss(student, target, index=INDEX, backend="triton", **options).backward()
    assert [name for name in calls.seen if "fused_dino" in name] == [
        "fused_dino::cosine_rows",
        "fused_dino::cosine_rescale_",
    ]
    assert not [name for name in calls.seen if any(word in name for word in COPIES)]


@pytest.fixture
def costs(monkeypatch):
    """Counts the elements that kernels load, and those of their arithmetic of floating-point numbers."""
    seen = Counter()

    def watch(name, count):
        run = getattr(InterpreterBuilder, name)

        def counted(self, *args):
            seen.update(count(*args))
            return run(self, *args)

        monkeypatch.setattr(InterpreterBuilder, name, counted)

    def arithmetic(*args):
        size = max(x.data.size for x in args[:-1])
        return {args[-1].__name__: size} if args[0].data.dtype.kind == "f" else {}

    for name in ("unary_op", "binary_op", "ternary_op"):
        watch(name, arithmetic)
    watch("create_masked_load", lambda pointers, mask, *_: {"load": int(mask.data.sum())})  # every load is one
    monkeypatch.setattr(cosine_triton, "MANY_ROWS", 4)  # one program, of four warps, takes all rows
    return seen


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_weight_0_are_not_read_and_cost_no_arithmetic(loss, reduction, both, costs):
    """A row of weight 0 costs the load of its weight, and a comparison with 0."""

    def cost(weight):
        weight = torch.tensor(weight)
        student, target = (
            rows(len(weight), 300, dtype=torch.float32, seed=i).requires_grad_(i < 1 + both) for i in (0, 1)
        )
        costs.clear()
        loss(student, target, weight=weight, reduction=reduction, backend="triton").sum().backward()
        return Counter(costs)

    left = cost([1.0, 0.5])
    assert left["load"] > 2 * 2 * 300
    assert left["multiply"] > 2 * 2 * 300
    more = cost([0.0, 1.0, 0.0, 0.0, 0.5])
    more.subtract(left)
    forwards = 1 if reduction == "sum" and not both else 2
    assert {name: count for name, count in more.items() if count} == {
        "load": 3 * forwards,
        "not_equal": 3 * forwards,
    }
