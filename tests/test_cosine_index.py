"""cosine_loss with an index: each row of the student is compared with the target's row at that position."""

import math
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fused_dino import CosineLoss
from fused_dino import functional as FD
from fused_dino.ops import plain
from proving import DEVICE, DTYPES, rows

NAN = float("nan")

pytestmark = pytest.mark.usefixtures("backend")
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def draw(batch, chosen, positions, width, dtype=torch.float64):
    """Return a student [batch, chosen, width], a target [batch, positions, width], and an index with repetitions."""
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(max(1, positions), (batch, chosen), generator=generator).to(DEVICE)
    student = rows(batch, chosen, width, dtype=dtype).requires_grad_()
    return student, rows(batch, positions, width, dtype=dtype, seed=1), index


def oracle(student, target, index, weight=None, reduction="mean"):
    """Return the loss and the student's gradient in float64, of one pair of rows after the other."""
    s, t = student.detach().double().requires_grad_(), target.double()
    values = torch.zeros(index.shape, dtype=torch.float64, device=DEVICE)
    weight = torch.ones_like(values) if weight is None else weight.double().expand(index.shape)
    for b in range(len(index)):
        for m in range(len(index[b])):
            if weight[b, m] != 0:
                x, y = s[b, m], t[b, index[b, m]]
                values[b, m] = weight[b, m] * (1 - torch.dot(x, y) / (x.norm() * y.norm()))
    value = values if reduction == "none" else values.sum()
    value = value / weight.sum() if reduction == "mean" else value
    return value.detach(), torch.autograd.grad(value.sum(), s)[0]


def results(student, target, index, reduction="mean", **options):
    value = FD.cosine_loss(student, target, index=index, reduction=reduction, **options)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def unchecked(monkeypatch):
    """Make reading the values of an index fail, as a GPU must not wait for them."""
    monkeypatch.setattr("fused_dino.rows.is_plain", lambda args: False)


SHAPES = {
    "fewer than the target has": (2, 3, 7, 16),
    "more than the target has": (2, 9, 4, 5),
    "one of one": (1, 1, 1, 3),
    "wider than the widest block": (2, 2, 3, 4100),
    "so many that a program takes several": (10, 20, 13, 8),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@each_reduction
def test_is_the_loss_of_each_row_and_the_one_it_names(shape, integers, reduction):
    student, target, index = draw(*shape)
    got = results(student, target, index.to(integers), reduction)
    for a, b in zip(got, oracle(student, target, index, reduction=reduction), strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_reduction
def test_has_the_bits_of_rows_that_are_gathered_before(dtype, reduction):
    student, target, index = draw(3, 5, 8, 40, dtype)
    weight = torch.linspace(0, 2, 15, device=DEVICE).view(3, 5)
    gathered = target[torch.arange(3, device=DEVICE)[:, None], index]
    for options in ({}, {"weight": weight}, {"scale": 0.3, "eps": 0.5}):
        plain = FD.cosine_loss(student, gathered, reduction=reduction, **options)
        expected = plain.detach(), torch.autograd.grad(plain.sum(), student)[0]
        for a, b in zip(results(student, target, index, reduction, **options), expected, strict=True):
            assert torch.equal(a, b)
    value, grad = results(student, target, index, reduction)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype


@each_reduction
def test_every_position_in_its_order_is_no_index(reduction):
    student, target, _ = draw(2, 6, 6, 20)
    index = torch.arange(6, device=DEVICE).expand(2, 6)
    expected = FD.cosine_loss(student, target, reduction=reduction)
    assert_close(FD.cosine_loss(student, target, index=index, reduction=reduction), expected, rtol=0, atol=0)


def test_a_permutation_of_both_changes_nothing():
    student, target, index = draw(2, 5, 7, 12)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4], device=DEVICE)
    moved = FD.cosine_loss(student, target[:, order], index=order.argsort()[index], reduction="none")
    assert torch.equal(moved, FD.cosine_loss(student, target, index=index, reduction="none"))


def test_one_position_may_serve_all_rows():
    student, target, _ = draw(2, 5, 7, 12)
    index = torch.full((2, 5), 6, device=DEVICE)
    expected = oracle(student, target[:, 6:].expand(2, 5, 12), torch.arange(5).expand(2, 5))
    for a, b in zip(results(student, target, index), expected, strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 2, 3, 4), (0, 0, 3, 4), (2, 0, 0, 4)], ids=str)
def test_no_rows(shape):
    student, target, index = draw(*shape)
    value, grad = results(student, target, index)
    assert value.isnan()
    assert grad.shape == student.shape
    assert results(student, target, index, "sum")[0] == 0
    assert results(student, target, index, "none")[0].shape == index.shape


def layouts(x):
    """Yield tensors equal to x that lie differently in memory."""
    yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "columns first", x.movedim(-1, 0).contiguous().movedim(0, -1)
    yield "every second row", torch.stack([x, x], 2).flatten(1, 2)[:, ::2]
    yield "without the first token", torch.cat([x[:, :1], x], 1)[:, 1:]
    yield "a slice of wider rows", torch.cat([x, x], -1)[..., : x.shape[-1]]


def test_layouts():
    student, target, index = draw(3, 4, 5, 6)
    expected = results(student, target, index)
    for name, moved in layouts(target):
        assert torch.equal(moved, target)
        for a, b in zip(results(student, moved, index), expected, strict=True):
            assert_close(a, b, rtol=1e-13, atol=1e-15, msg=name)
    for name, moved in layouts(student.detach()):
        for a, b in zip(results(moved.requires_grad_(), target, index), expected, strict=True):
            assert_close(a, b, rtol=1e-13, atol=1e-15, msg=name)
    for shared in (target[:1].expand_as(target), target[:, :1].expand_as(target)):
        for a, b in zip(results(student, shared, index), oracle(student, shared, index), strict=True):
            assert_close(a, b, rtol=1e-11, atol=1e-13)
    for moved in (index.T.contiguous().T, torch.stack([index, index], -1)[..., 0]):
        assert all(map(torch.equal, results(student, target, moved), expected))
    index = index[:1].expand_as(index)
    for a, b in zip(results(student, target, index), oracle(student, target, index), strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("filler", [NAN, float("inf"), 3e38])
def test_rows_that_no_index_names_do_not_count(filler):
    student, target, index = draw(2, 3, 9, 10, torch.float32)
    expected = results(student, target, index)
    named = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE).scatter_(1, index, True)
    assert not named.all()
    target[~named] = filler
    assert all(map(torch.equal, results(student, target, index), expected))


def test_a_nan_stays_in_the_rows_that_name_it():
    student, target, _ = draw(2, 3, 4, 10)
    target[1, 2, 0] = NAN
    index = torch.tensor([[2, 2, 0], [1, 2, 2]], device=DEVICE)
    value, grad = results(student, target, index, "none")
    expected = torch.tensor([[False, False, False], [False, True, True]], device=DEVICE)
    assert torch.equal(value.isnan(), expected)
    assert torch.equal(grad.isnan().all(-1), expected)
    assert torch.equal(grad.isnan().any(-1), expected)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (3,)], ids=str)
@each_reduction
def test_weights(shape, reduction):
    student, target, index = draw(2, 3, 4, 10)
    weight = torch.tensor([1.0, 0.0, 3.0, 0.5, 2.0, 0.0], dtype=torch.float64, device=DEVICE)
    weight = weight[: math.prod(shape)].view(shape)
    got = results(student, target, index, reduction, weight=weight)
    for a, b in zip(got, oracle(student, target, index, weight, reduction), strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-13)


@each_reduction
@pytest.mark.parametrize("padding", [-1, 4, 2**31 - 1, -(2**63)])
def test_the_index_of_a_row_of_weight_0_may_be_anything(padding, reduction):
    student, target, index = draw(2, 3, 4, 10)
    mask = torch.tensor([[True, True, False], [False, True, True]], device=DEVICE)
    expected = oracle(student, target, index, mask, reduction)
    got = results(student, target, index.masked_fill(~mask, padding), reduction, weight=mask)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-13)


OUTSIDE = (-1, 4, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63))


@pytest.mark.parametrize("position", OUTSIDE)
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-30])
def test_a_position_out_of_range_is_nan_where_its_value_is_not_read(position, scale, monkeypatch):
    """This holds whatever the target has in those rows, and however long they are."""
    unchecked(monkeypatch)
    student, target, index = draw(2, 3, 4, 10)
    index[1, 2] = position
    value, grad = results(student, target * scale, index, "none")
    expected = torch.zeros_like(index, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(value.isnan(), expected)
    assert torch.equal(grad.isnan().all(-1), expected)
    assert torch.equal(grad.isnan().any(-1), expected)
    assert FD.cosine_loss(student, target, index=index).isnan()
    assert torch.autograd.grad(FD.cosine_loss(student, target, index=index), student)[0][1, 2].isnan().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="the values of an index on a GPU are not read")
@pytest.mark.parametrize("position", OUTSIDE)
def test_a_position_out_of_range_is_named_on_a_cpu(position):
    student, target, index = draw(2, 3, 4, 10)
    index[1, 2] = position
    for weight in (None, torch.ones(2, 3), torch.ones(3)):
        with pytest.raises(ValueError, match=f"^index must be from 0 to 3, target's last position, got {position}$"):
            FD.cosine_loss(student, target, index=index, weight=weight)


S, T, INDEX = torch.ones(2, 3, 8), torch.ones(2, 5, 8), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "index", {"index": INDEX.float()}),
        (TypeError, "index", {"index": INDEX.bool()}),
        (TypeError, "index", {"index": INDEX.short()}),
        (TypeError, "index", {"index": [[0, 1, 2]] * 2}),
        (TypeError, "index", {"index": INDEX.to_sparse()}),
        (ValueError, "index", {"index": INDEX[:, :2]}),
        (ValueError, "index", {"index": INDEX[:1]}),
        (ValueError, "index", {"index": INDEX[0]}),
        (ValueError, "index", {"index": INDEX[..., None]}),
        (ValueError, "index", {"index": INDEX.to("meta")}),
        (ValueError, "index", {"target": T.to("meta")}),
        (ValueError, "student", {"student": S[0]}),
        (ValueError, "student", {"student": S[None]}),
        (ValueError, "student", {"student": S[..., :0]}),
        (ValueError, "student", {"student": S.long()}),
        (TypeError, "student", {"student": S.numpy()}),
        (ValueError, "target", {"target": T[0]}),
        (ValueError, "target", {"target": T[:1]}),
        (ValueError, "target", {"target": T[..., :4]}),
        (ValueError, "target", {"target": T[:, :0]}),
        (ValueError, "target", {"target": T.long()}),
        (ValueError, "target", {"target": T.clone().requires_grad_()}),
        (ValueError, "weight", {"weight": torch.ones(2)}),
        (ValueError, "weight", {"weight": torch.ones(2, 5)}),
        (ValueError, "weight", {"weight": torch.ones(2, 3, 8)}),
        (ValueError, "weight", {"weight": torch.ones(2, 3, requires_grad=True)}),
    ],
)
def test_bad_arguments_are_named(error, name, arguments):
    with pytest.raises(error, match=f"^{name} "):
        FD.cosine_loss(**{"student": S, "target": T, "index": INDEX, **arguments})


def test_a_gradient_of_the_target_is_refused(backend):
    """No tensor under vmap says that it requires a gradient. So the backward refuses it, unless formulas compute it."""
    student, target, index = draw(2, 3, 4, 5)
    student.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^target requires a gradient, .* give target.detach\(\)"):
        torch.func.grad(lambda t: FD.cosine_loss(student, t, index=index))(target)
    leaf = target.clone().requires_grad_()
    mapped = torch.func.vmap(lambda t: FD.cosine_loss(student, t, index=index))(leaf[None])
    gathered = leaf[torch.arange(2, device=DEVICE)[:, None], index]
    expected = torch.autograd.grad(FD.cosine_loss(student, gathered), leaf)
    assert_close(torch.autograd.grad(mapped.sum(), leaf, create_graph=True), expected)
    if backend != "reference":
        with pytest.raises(NotImplementedError, match=r"^target gets no gradient .* give target.detach\(\)"):
            mapped.sum().backward()


def test_the_module_takes_an_index():
    student, target, index = draw(2, 3, 4, 5)
    weight = torch.arange(3, device=DEVICE)
    out = CosineLoss(reduction="sum")(student, target.requires_grad_(), weight, index=index)
    expected = FD.cosine_loss(student, target.detach(), index=index, weight=weight, reduction="sum")
    assert_close(out, expected, rtol=0, atol=0)
    assert torch.autograd.grad(out, student)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="^target requires a gradient"):
        CosineLoss(detach_teacher=False)(student, target, index=index)


@each_reduction
def test_derivatives(reduction):
    student, target, index = draw(2, 3, 4, 3)
    weight = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    for options in ({}, {"weight": weight}):
        run = partial(FD.cosine_loss, target=target, index=index, reduction=reduction, **options)
        assert torch.autograd.gradcheck(run, student, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, student, fast_mode=True)


@each_reduction
def test_mapped_over_batches(reduction):
    drawn = [draw(2, 3, 4, 5), draw(2, 3, 4, 5)]
    student, target, index = (torch.stack(x).detach() for x in zip(*drawn, strict=True))
    index[1] = 3 - index[1]
    run = partial(FD.cosine_loss, reduction=reduction)
    vmap, expected = torch.func.vmap, [run(*x[:2], index=x[2]) for x in zip(student, target, index, strict=True)]
    assert_close(vmap(lambda s, t, i: run(s, t, index=i))(student, target, index), torch.stack(expected))
    shared = vmap(lambda i: run(student[0], target[0], index=i))(index)
    assert_close(shared, torch.stack([run(student[0], target[0], index=i) for i in index]))
    grads = vmap(torch.func.grad(lambda s, t, i: run(s, t, index=i).sum()))(student, target, index)
    true = [results(s.requires_grad_(), t, i, reduction)[1] for s, t, i in zip(student, target, index, strict=True)]
    assert_close(grads, torch.stack(true))
    index[0, 0, 0] = -1
    lost = vmap(lambda s, t, i: run(s, t, index=i))(student, target, index)
    assert lost[0].isnan().any()
    assert lost[1].isfinite().all()


def test_forward_mode_of_both():
    student, target, index = draw(2, 3, 4, 5)
    tangents = rows(2, 3, 5, seed=3), rows(2, 4, 5, seed=4)
    gathered = torch.arange(2, device=DEVICE)[:, None], index
    got = torch.func.jvp(partial(FD.cosine_loss, index=index), (student.detach(), target), tangents)
    expected = torch.func.jvp(
        partial(FD.cosine_loss, backend="reference"),
        (student.detach(), target[gathered]),
        (tangents[0], tangents[1][gathered]),
    )
    assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_compiles_as_one_graph(fresh_compiler):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(FD.cosine_loss, fullgraph=True, backend=counter)
    for batch, chosen, positions in ((2, 3, 5), (3, 4, 7), (4, 5, 9), (5, 12, 8)):
        student, target, index = draw(batch, chosen, positions, 6)
        values = [f(student, target, index=index) for f in (compiled, FD.cosine_loss)]
        assert_close(*values, rtol=1e-9, atol=1e-12)
        assert_close(*(torch.autograd.grad(x, student)[0] for x in values), rtol=1e-9, atol=1e-12)
    assert counter.frame_count <= 2
    index[0, 0] = positions
    assert compiled(student, target, index=index).isnan()


def test_exports():
    module = torch.nn.Module()
    module.forward = lambda student, target, index: FD.cosine_loss(student, target, index=index)
    batch, chosen, positions = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "chosen", "positions"))
    shapes = {0: batch, 1: chosen}, {0: batch, 1: positions}, {0: batch, 1: chosen}
    inputs = [x.detach() for x in draw(2, 3, 4, 5)]
    exported = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes).module()
    for sizes in ((2, 3, 4), (4, 9, 7)):
        inputs = [x.detach() for x in draw(*sizes, 5)]
        assert_close(exported(*inputs), module.forward(*inputs), rtol=1e-12, atol=1e-14)


def test_bits_repeat_and_the_plain_route_has_them(monkeypatch):
    drawn = draw(3, 50, 20, 9, torch.float32)
    first, second = (results(*drawn) for _ in range(2))
    assert all(map(torch.equal, first, second))
    monkeypatch.setattr(plain, "watched", lambda: True)
    assert all(map(torch.equal, first, results(*drawn)))


def test_no_value_is_read_on_the_host():
    """Meta tensors have no values, so that reading one would raise."""
    student, target = (torch.empty(2, n, 4, device="meta") for n in (3, 5))
    index = torch.empty(2, 3, dtype=torch.int64, device="meta")
    FD.cosine_loss(student.requires_grad_(), target, index=index, backend="torch").backward()
    assert student.grad.shape == student.shape
