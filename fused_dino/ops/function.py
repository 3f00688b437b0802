"""An op's autograd.Function, made from its mathematics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .plain import forward_mode, is_plain


def batch_by_batch(apply: Callable, info: Any, in_dims: tuple, *args: Any) -> tuple:
    """The vmap rule of an op whose rows belong together: one call a batch."""
    *tensors, options, backend = args
    parts = ([x] * info.batch_size if dim is None else x.unbind(dim) for x, dim in zip(tensors, in_dims, strict=False))
    results = [apply(*batch, options, backend) for batch in zip(*parts, strict=True)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(map(torch.stack, zip(*results, strict=True)))
    return stacked, (0,) * len(stacked)


def make_function(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., tuple] | None,
    formula: Callable[..., Any] | None,
    *,
    inputs: int,
    outputs: int = 1,
    saved: int = 1,
    twice: bool = False,
    linear: Callable[[Any], bool] | None = None,
    vmap: Callable[..., tuple] | None = batch_by_batch,
) -> Callable[..., Any]:
    """Return the apply(*tensors, options, backend) of an op's autograd.Function, whose options are a NamedTuple.

    Args:
        forward: (*tensors, options, backend) -> the results.
        backward: (ctx, saved tensors, gradients of the first `outputs` results, which of the first `inputs` tensors
            need one) -> their gradients; ctx has `options` and `backend`. None: the formula's.
        formula: (*tensors, options) -> the first `outputs` results by formulas of torch's own. It serves in forward
            mode, and where the gradient itself is differentiated or batched.
        inputs: How many of the tensors get a gradient, from the first one on.
        outputs: How many of the results have one. The others are for the op itself.
        saved: Index of the first result that the backward needs. It gets all tensors, too.
        twice: Whether the backward itself can be differentiated.
        linear: (options) -> whether the gradient is independent of the inputs' values, which are then not saved.
        vmap: torch's rule, whose first argument is the Function's apply. None refuses vmap.
    """

    def setup_context(ctx: Any, arguments: tuple, out: Any) -> None:
        *tensors, ctx.options, ctx.backend = arguments
        results = out if isinstance(out, tuple) else (out,)
        ctx.meta = None
        if linear is not None and linear(ctx.options):
            ctx.meta = [(x.shape, x.dtype) for x in tensors[:inputs]]
            tensors = [*([None] * inputs), *tensors[inputs:]]
        ctx.save_for_backward(*tensors, *results[saved:])
        if len(results) > outputs:
            ctx.mark_non_differentiable(*results[outputs:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *every: Tensor | None) -> tuple[Tensor | None, ...]:
        grads, arguments = every[:outputs], len(ctx.needs_input_grad)
        first = next((g for g in grads if g is not None), None)
        if first is None:
            return (None,) * arguments
        tensors = ctx.saved_tensors
        if ctx.meta is not None:
            tensors = (*(first.new_empty((), dtype=t).expand(shape) for shape, t in ctx.meta), *tensors[inputs:])
        needs_grad = ctx.needs_input_grad[:inputs]
        differentiable = (torch.is_grad_enabled() and not twice) or forward_mode()
        by_formula = backward is None or differentiable or is_batched(first)
        if by_formula and formula is not None:
            others = tensors[inputs : arguments - 2]
            input_grads = gradient_of(lambda *x: formula(*x, *others, ctx.options), tensors[:inputs], grads)
        else:
            assert backward is not None
            input_grads = backward(ctx, tensors, grads, needs_grad)
        needed = (g if needs else None for g, needs in zip(input_grads, needs_grad, strict=True))
        return (*needed, *((None,) * (arguments - inputs)))

    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # torch binds every call by it
    rules: dict[str, Any] = {"forward": forward, "setup_context": setup_context, "backward": differentiate}
    function: Any = type(name, (torch.autograd.Function,), {rule: staticmethod(f) for rule, f in rules.items()})
    if vmap is not None:
        function.vmap = staticmethod(lambda *arguments: vmap(apply, *arguments))

    def setup_jvp(ctx: Any, arguments: tuple, out: Any) -> None:
        setup_context(ctx, arguments, out)
        ctx.save_for_forward(*arguments[:-2])
        ctx.others = len(out) - outputs if isinstance(out, tuple) else 0

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if formula is None or any(x is not None for x in tangents[inputs:]):
            raise NotImplementedError(f"{name} has no forward mode for these inputs; backend='reference' has")
        primals = [x if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]
        others = primals[inputs:]
        moved = tangents_of(lambda *x: formula(*x, *others, ctx.options), primals[:inputs], tangents[:inputs])
        return (*(moved if isinstance(moved, tuple) else (moved,)), *((None,) * ctx.others))

    # A class of its own: Dynamo takes no Function with a jvp.
    rules = {"setup_context": setup_jvp, "jvp": jvp}
    function_in_forward_mode: Any = type(name, (function,), {rule: staticmethod(f) for rule, f in rules.items()})

    def forward_at_once(ctx: Any, *args: Any) -> Any:
        out = forward(*args)
        setup_context(ctx, args, out)
        return out

    # It has no setup_context of its own, for whose sake torch binds the arguments of every call.
    rules = {"forward": forward_at_once, "backward": differentiate}
    plain: Any = type(name, (torch.autograd.Function,), {rule: staticmethod(f) for rule, f in rules.items()})

    def apply(*args: Any) -> Any:
        if is_plain(args):
            return plain.apply(*args)
        has_tangents = forward_mode() and not torch.compiler.is_compiling()
        return (function_in_forward_mode if has_tangents else function).apply(*args)

    return apply


def gradient_of(formula: Callable[..., Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> tuple:
    """Return the gradients of the inputs, for one result or several."""
    out, vjp = torch.func.vjp(formula, *inputs)[:2]
    if isinstance(out, Tensor):
        return vjp(grads[0])
    return vjp(tuple(torch.zeros_like(x) if g is None else g for x, g in zip(out, grads, strict=True)))


def tangents_of(formula: Callable[..., Any], inputs: Sequence[Any], tangents: Sequence[Tensor | None]) -> Any:
    """Return tangents as the transpose of the gradient's transpose, since forward mode does not nest."""
    moving = [i for i, x in enumerate(tangents) if x is not None]

    def of_moving(*values: Tensor) -> Any:
        replaced = dict(zip(moving, values, strict=True))
        return formula(*(replaced.get(i, x) for i, x in enumerate(inputs)))

    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # a tangent may have one, too
        out, vjp = torch.func.vjp(of_moving, *(inputs[i] for i in moving))[:2]
        return torch.func.vjp(vjp, out)[1](tuple(tangents[i] for i in moving))[0]


def batched_rows(batch_size: int, in_dims: tuple, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Return tensors [B, N, D] under vmap as [B * N, D]: an op on rows needs no other rule."""

    def flat(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        return (x.expand(batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

    return tuple(map(flat, tensors, in_dims))


def is_batched(x: Tensor) -> bool:
    """Return whether x is under one of torch's two vmaps; the older one serves is_grads_batched. Wrappers of
    torch.func.grad, which have no storage either, are looked through."""
    if not torch.compiler.is_compiling():  # Dynamo traces neither of the two
        while torch._C._functorch.is_gradtrackingtensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    try:
        return x.untyped_storage() is None
    except NotImplementedError:
        return True
