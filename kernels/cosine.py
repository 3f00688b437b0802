"""Cosine and squared error between rows: one kernel reads two rows and writes their loss, their gradients, or both."""

import triton
import triton.language as tl

from .store import store


@triton.jit
def inverse(norm, eps):
    """1 / max(norm, eps), by tl.where and not tl.maximum: a NaN norm must stay NaN."""
    return 1 / tl.where(norm < eps, eps, norm)


@triton.jit
def load_row(row, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Upcast right at the load: half precision must not reach the products, and bf16 in the interpreter is wrong."""
    column = start + tl.arange(0, BLOCK)
    return tl.load(row + column, mask=column < WIDTH, other=0).to(ACC)


@triton.jit
def store_row(row, start, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    store(row + column, value, column < WIDTH)


@triton.jit(do_not_specialize=["rows", "count"])
def cosine_rows_kernel(
    student, teacher,  # [N, D], last dimension contiguous
    weight, alpha, grad_output,  # [N], [], and [N] or [N, D]; None is 1
    loss, value,  # [], [N] or [N, D]; the sum without alpha; None where it is not wanted
    partial, ticket,  # one element a program; a zero, which is left zero
    grad_student, grad_teacher,  # [N, D] contiguous; None where it is not wanted
    stride_student, stride_teacher, stride_weight, stride_grad_row, stride_grad_column,
    rows, count,
    KIND: tl.constexpr, REDUCTION: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program of P owns every P-th row, one after the other. Where a block holds a row, the loops over columns run
    # once and the compiler keeps the row in registers; wider rows come out of the cache again. The product of two rows
    # is taken of rows of length one, since of the rows themselves it can leave the range.
    GRADIENT: tl.constexpr = grad_student is not None or grad_teacher is not None
    ELEMENTS: tl.constexpr = REDUCTION == "elements"
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first = program.to(tl.int64)  # int64: row * stride passes 2**31
    eps = tl.full((), EPS, ACC)  # Triton 3.6 compares with a constant in float32
    outer = tl.full((), 1, ACC)
    if alpha is not None:
        outer = tl.load(alpha).to(ACC)
    total = tl.zeros((), ACC)
    for i in range(0, tl.cdiv(rows - program, programs)):
        row = first + i * programs
        s_row = student + row * stride_student
        t_row = teacher + row * stride_teacher
        share = tl.full((), 1, ACC)
        if weight is not None:
            share = tl.load(weight + row * stride_weight).to(ACC)
        scale = outer * share / count

        s_inverse = tl.full((), 1, ACC)
        t_inverse = tl.full((), 1, ACC)
        s_clamped = tl.full((), 1, tl.int1)
        t_clamped = tl.full((), 1, tl.int1)
        if KIND != "raw":
            ss = tl.zeros((BLOCK,), ACC)
            tt = tl.zeros((BLOCK,), ACC)
            for start in range(0, WIDTH, BLOCK):
                s = load_row(s_row, start, WIDTH, BLOCK, ACC)
                t = load_row(t_row, start, WIDTH, BLOCK, ACC)
                ss += s * s
                tt += t * t
            s_norm = tl.sqrt(tl.sum(ss, 0))
            t_norm = tl.sqrt(tl.sum(tt, 0))
            s_inverse = inverse(s_norm, eps)
            t_inverse = inverse(t_norm, eps)
            s_clamped = s_norm < eps
            t_clamped = t_norm < eps

        st = tl.zeros((BLOCK,), ACC)  # <s, t>, or with ELEMENTS <s, u>, where u is the gradient of s before normalising
        tu = tl.zeros((BLOCK,), ACC)
        dd = tl.zeros((BLOCK,), ACC)
        for start in range(0, WIDTH, BLOCK):
            s = load_row(s_row, start, WIDTH, BLOCK, ACC) * s_inverse
            t = load_row(t_row, start, WIDTH, BLOCK, ACC) * t_inverse
            if ELEMENTS:
                if loss is not None:
                    store_row(loss + row * WIDTH, start, scale * (s - t) * (s - t), WIDTH, BLOCK)
                if GRADIENT:
                    u = gradient_of_elements(
                        grad_output + row * stride_grad_row, stride_grad_column, start, s, t, WIDTH
                    )
                    st += s * u
                    tu += t * u
            else:
                st += s * t
                if KIND != "cosine":
                    dd += (s - t) * (s - t)
        cos = tl.sum(st, 0)

        if loss is not None and not ELEMENTS:
            distance = 1 - cos
            if KIND != "cosine":
                distance = tl.sum(dd, 0)
            if REDUCTION == "rows":
                tl.store(loss + row, scale * distance)
            total += share * distance

        if GRADIENT:
            if ELEMENTS:
                s_along = tl.where(s_clamped, 0, cos)  # a clamped norm is a constant, and has no share in the gradient
                t_along = tl.where(t_clamped, 0, tl.sum(tu, 0))
            else:
                if grad_output is not None:
                    scale *= tl.load(grad_output + row * stride_grad_row).to(ACC)
                if KIND == "cosine":
                    s_along = tl.where(s_clamped, 0, cos)
                    t_along = tl.where(t_clamped, 0, cos)
                else:
                    scale *= 2
                    s_along = tl.where(s_clamped, 1, cos)
                    t_along = tl.where(t_clamped, 1, cos)
            s_scale = scale * s_inverse
            t_scale = scale * t_inverse
            for start in range(0, WIDTH, BLOCK):
                s = load_row(s_row, start, WIDTH, BLOCK, ACC) * s_inverse
                t = load_row(t_row, start, WIDTH, BLOCK, ACC) * t_inverse
                if ELEMENTS:
                    u = gradient_of_elements(
                        grad_output + row * stride_grad_row, stride_grad_column, start, s, t, WIDTH
                    )
                    for_s = u - s_along * s
                    for_t = t_along * t - u
                else:
                    for_s = s_along * s - t
                    for_t = t_along * t - s
                if grad_student is not None:
                    store_row(grad_student + row * WIDTH, start, s_scale * for_s, WIDTH, BLOCK)
                if grad_teacher is not None:
                    store_row(grad_teacher + row * WIDTH, start, t_scale * for_t, WIDTH, BLOCK)

    if loss is not None and REDUCTION == "sum":
        # The program that finishes last adds up what all have left, in their order.
        tl.store(partial + program, total)
        if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
            index = tl.arange(0, BLOCK)
            sums = tl.zeros((BLOCK,), ACC)
            for start in range(0, programs, BLOCK):
                sums += tl.load(partial + start + index, mask=start + index < programs, other=0)
            whole = tl.sum(sums, 0) / count
            tl.store(loss, outer * whole)
            if value is not None:
                tl.store(value, whole)
            tl.store(ticket, 0)


@triton.jit
def gradient_of_elements(row, stride, start, s, t, WIDTH: tl.constexpr):
    """Of (s - t)^2 with respect to s, for a grad_output of any stride."""
    column = start + tl.arange(0, s.shape[0])
    outer = tl.load(row + column.to(tl.int64) * stride, mask=column < WIDTH, other=0).to(s.dtype)
    return 2 * outer * (s - t)


@triton.jit
def cosine_rescale_kernel(grad, grad_output, numel, BLOCK: tl.constexpr, ACC: tl.constexpr):
    # A fixed grid strides over the flat gradient, so that at most 1,024 programs, not one a row, load a 1 and leave.
    outer = tl.load(grad_output).to(ACC)
    if outer != 1:  # NaN too
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, tl.num_programs(0) * BLOCK):
            index = start + tl.arange(0, BLOCK)
            live = index < numel
            store(grad + index, tl.load(grad + index, mask=live, other=0).to(ACC) * outer, live)
