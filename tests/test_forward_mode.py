"""Forward mode: tangents of every op on every implementation, and under torch's other transforms."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap
from torch.testing import assert_close

from conftest import make_supervision
from fused_dino import functional as FD
from fused_dino.terms.grids import Regrid, bilinear
from proving import DTYPES, IMPLEMENTATIONS
from table import OPS

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
each_of_ours = pytest.mark.parametrize("backend", [name for name in IMPLEMENTATIONS if name != "reference"])


def by_jvp(function, point, direction):
    return jvp(function, point, direction)


def by_dual_numbers(function, point, direction):
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, point, direction)))
        return out.primal, out.tangent


def of_the_first_alone(function, point, direction):
    return jvp(lambda x: function(x, *point[1:]), point[:1], direction[:1])


def as_a_jacobian(function, point, direction):
    return jacfwd(function)(*point)


def of_a_tangent(function, point, direction):
    return jvp(lambda *x: jvp(function, x, direction)[1], point, direction)


def of_a_gradient(function, point, direction):
    return jvp(grad(lambda *x: function(*x).sum()), point, direction)


def of_a_gradient_by_dual_numbers(function, point, direction):
    with forward_ad.dual_level():
        inputs = [forward_ad.make_dual(x.clone().requires_grad_(), d) for x, d in zip(point, direction, strict=True)]
        out = forward_ad.unpack_dual(torch.autograd.grad(function(*inputs).sum(), inputs[0])[0])
        return out.primal, out.tangent


def a_gradient_of_a_tangent(function, point, direction):
    return grad(lambda *x: jvp(function, x, direction)[1].sum())(*point)


def over_a_batch(function, point, direction):
    batch = [torch.stack([x, d]) for x, d in zip(point, direction, strict=True)]
    return vmap(lambda *x: jvp(function, x, direction))(*batch)


def of_a_batch(function, point, direction):
    batch = tuple(torch.stack([x, d]) for x, d in zip(point, direction, strict=True))
    return jvp(vmap(function), batch, batch)


TRANSFORMS = (
    by_jvp, by_dual_numbers, of_the_first_alone, as_a_jacobian, of_a_tangent, of_a_gradient,
    of_a_gradient_by_dual_numbers, a_gradient_of_a_tangent, over_a_batch, of_a_batch,
)  # fmt: skip


@each_op
@each_of_ours
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_tangents_are_those_of_eager(op, backend, transform):
    shape = op.shape(3, 8)
    point, direction = (op.draw(shape, torch.float64, seed=seed) for seed in (0, 1))
    actual, expected = (
        transform(lambda *x, b=b: op.run(*x, backend=b), point, direction) for b in (backend, "reference")
    )
    assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_a_tangent_has_the_dtype_of_its_value(op, backend, dtype):
    point = op.draw(op.shape(3, 8), dtype)
    value, tangent = jvp(lambda *x: op.run(*x, backend=backend), point, point)
    assert tangent.dtype == value.dtype


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
@each_of_ours
def test_weights_and_scales_multiply_tangents(backend, scale, reduction):
    op = OPS[0]
    (point, direction), weight = op.draw((6, 8)), torch.arange(6.0)

    def tangent(backend):
        loss = lambda x: FD.cosine_loss(x, point, weight=weight, scale=scale, reduction=reduction, backend=backend)  # noqa: E731
        return jvp(loss, (direction,), (point,))[1]

    assert_close(tangent(backend), tangent("reference"))


@each_of_ours
def test_a_tangent_of_a_weight_is_refused(backend):
    op = OPS[0]
    (student, target), weight = op.draw((6, 8)), torch.arange(6.0)
    with pytest.raises(NotImplementedError, match="CosineFunction has no forward mode"):
        jvp(lambda w: FD.cosine_loss(student, target, weight=w, backend=backend), (weight,), (weight,))


@each_of_ours
def test_values_are_those_without_tangents(backend):
    for op in OPS:
        point = op.draw(op.shape(5, 33))
        assert_close(
            by_jvp(lambda *x, op=op: op.run(*x, backend=backend), point, point)[0],
            op.run(*point, backend=backend),
            rtol=0,
            atol=0,
        )


@each_of_ours
def test_training_through_a_tangent(backend):
    """Differentiate a loss with a tangent in it by .backward(), as MeanFlow does."""
    student, target = OPS[0].draw((6, 8))

    def gradient(backend):
        weight = torch.eye(8, requires_grad=True)
        value, tangent = jvp(lambda x: FD.cosine_loss(x @ weight, target, backend=backend), (student,), (target,))
        (value + tangent).backward()
        return weight.grad

    assert_close(gradient(backend), gradient("reference"))


@each_of_ours
def test_tangents_inside_a_compiled_function(backend, fresh_compiler):
    """Kernels in a graph have no forward mode. So the call breaks the graph, and a whole graph is refused."""
    student, target = OPS[0].draw((6, 8))

    def tangent(x, backend):
        return jvp(lambda x: FD.cosine_loss(x, target, backend=backend), (x,), (target,))[1]

    compiled = torch.compile(tangent, backend="aot_eager")
    assert_close(compiled(student, backend), tangent(student, "reference"))
    if backend == "triton":
        torch._dynamo.reset()
        with pytest.raises(Exception, match="no forward mode"):
            torch.compile(tangent, backend="aot_eager", fullgraph=True)(student, backend)


@each_of_ours
def test_a_tangent_goes_through_a_compiled_loss(backend, fresh_compiler):
    student, target = OPS[0].draw((6, 8))
    compiled = torch.compile(lambda x: FD.cosine_loss(x, target, backend=backend), backend="aot_eager")
    compiled(student)
    actual = jvp(compiled, (student,), (target,))[1]
    assert_close(actual, jvp(lambda x: FD.cosine_loss(x, target, backend="reference"), (student,), (target,))[1])


def test_tangents_of_tokens_on_another_grid():
    tokens, direction = torch.randn(2, 12, 5), torch.randn(2, 12, 5)
    module = Regrid(bilinear, (4, 3), (5, 6))
    for value, tangent in (by_jvp(module, (tokens,), (direction,)), by_dual_numbers(module, (tokens,), (direction,))):
        assert_close(value, module(tokens))
        assert_close(tangent, module(direction))


def test_tangents_of_a_supervision(teacher, batch):
    """Compare tangents with finite differences through every part of a supervision."""
    options = {"use_patch": True, "latent_shape": (4, 4, 4), "token_dim": 8, "patch_target": "attention"}
    dino = make_supervision(teacher, **options).double()
    tokens, direction = torch.randn(6, 16, 8, dtype=torch.float64), torch.randn(6, 16, 8, dtype=torch.float64)
    z_text = batch[0].double()

    def loss(z_text, tokens):
        return dino(z_text, batch[1], tokens=tokens)[0]

    tangent = jvp(loss, (z_text, tokens), (z_text, direction))[1]
    step = 1e-5
    ahead, behind = (loss(z_text * (1 + s), tokens + s * direction) for s in (step, -step))
    assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
