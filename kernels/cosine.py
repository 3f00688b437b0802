"""Cosine and squared error between rows: one kernel reads two rows and writes their loss, their gradients, or both."""

import triton
import triton.language as tl

from .store import store


@triton.jit
def inverse(norm, eps):
    """Return 1 / max(norm, eps), by tl.where and not tl.maximum: a NaN norm must stay NaN."""
    return 1 / tl.where(norm < eps, eps, norm)


@triton.jit
def load_row(row, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Load a block of a row and upcast it at once."""
    # Half precision must not reach the products, and the interpreter computes wrongly in bf16.
    column = start + tl.arange(0, BLOCK)
    return tl.load(row + column, mask=column < WIDTH, other=0).to(ACC)


@triton.jit
def store_row(row, start, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a block of a row."""
    column = start + tl.arange(0, BLOCK)
    store(row + column, value, column < WIDTH)


@triton.jit
def clear_row(row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    for start in range(0, WIDTH, BLOCK):
        store_row(row, start, tl.zeros((BLOCK,), ACC), WIDTH, BLOCK)


@triton.jit(do_not_specialize=["rows", "count", "student_rows", "target_rows"])
def cosine_rows_kernel(
    student, target,  # [N, D], last dimension contiguous; with an index target is [batch, target_rows, D]
    weight, scale, grad_output,  # [N], [], and [N] or [N, D]; None is 1
    loss, unscaled,  # [], [N] or [N, D]; the sum without scale; None: not computed
    partial, ticket,  # one element per program; a zero, which is left zero
    grad_student, grad_target,  # [N, D] contiguous; None: not computed
    stride_student, stride_target, stride_weight, stride_grad_row, stride_grad_column,
    rows, count,
    index, student_rows, target_rows, stride_batch,  # [batch, student_rows] contiguous; None: row i meets row i
    KIND: tl.constexpr, REDUCTION: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program of P owns every P-th row, one after the other. Where a block holds a row, the loops over columns run
    # once and the compiler keeps the row in registers; wider rows come out of the cache again. The product of two rows
    # is taken of rows of length one, since of the rows themselves it can leave the range.
    GRADIENT: tl.constexpr = grad_student is not None or grad_target is not None
    ELEMENTS: tl.constexpr = REDUCTION == "elements"
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first = program.to(tl.int64)  # int64: row * stride passes 2**31
    eps = tl.full((), EPS, ACC)  # Triton 3.6 compares with a constant in float32
    loss_scale = tl.full((), 1, ACC)
    if scale is not None:
        loss_scale = tl.load(scale).to(ACC)
    total = tl.zeros((), ACC)
    for i in range(0, tl.cdiv(rows - program, programs)):
        row = first + i * programs
        row_weight = tl.full((), 1, ACC)
        if weight is not None:
            row_weight = tl.load(weight + row * stride_weight).to(ACC)
        if weight is None or row_weight != 0:  # a row that is left out is not read: 0 * NaN is NaN
            s_row = student + row * stride_student
            t_row = target + row * stride_target
            if index is not None:
                batch = (program + i * programs) // student_rows  # in 32 bits where they hold all rows
                position = tl.load(index + row).to(tl.int64)
                inside = (position >= 0) & (position < target_rows)
                position = tl.where(inside, position, 0)  # in place of a row that target lacks, and weighed by NaN
                row_weight = tl.where(inside, row_weight, float("nan"))
                t_row = target + batch.to(tl.int64) * stride_batch + position * stride_target
            factor = loss_scale * row_weight / count

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

            st = tl.zeros(
                (BLOCK,), ACC
            )  # <s, t>, or with ELEMENTS <s, u>, where u is the gradient of s before normalising
            tu = tl.zeros((BLOCK,), ACC)
            dd = tl.zeros((BLOCK,), ACC)
            for start in range(0, WIDTH, BLOCK):
                s = load_row(s_row, start, WIDTH, BLOCK, ACC) * s_inverse
                t = load_row(t_row, start, WIDTH, BLOCK, ACC) * t_inverse
                if ELEMENTS:
                    if loss is not None:
                        store_row(loss + row * WIDTH, start, factor * (s - t) * (s - t), WIDTH, BLOCK)
                    if GRADIENT:
                        u = gradient_of_elements(
                            grad_output + row * stride_grad_row, stride_grad_column, start, WIDTH, s, t
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
                    tl.store(loss + row, factor * distance)
                total += row_weight * distance

            if GRADIENT:
                if ELEMENTS:
                    s_projection = tl.where(s_clamped, 0, cos)  # a clamped norm is a constant
                    t_projection = tl.where(t_clamped, 0, tl.sum(tu, 0))
                else:
                    if grad_output is not None:
                        factor *= tl.load(grad_output + row * stride_grad_row).to(ACC)
                    if KIND == "cosine":
                        s_projection = tl.where(s_clamped, 0, cos)
                        t_projection = tl.where(t_clamped, 0, cos)
                    else:
                        factor *= 2
                        s_projection = tl.where(s_clamped, 1, cos)
                        t_projection = tl.where(t_clamped, 1, cos)
                s_factor = factor * s_inverse
                t_factor = factor * t_inverse
                for start in range(0, WIDTH, BLOCK):
                    s = load_row(s_row, start, WIDTH, BLOCK, ACC) * s_inverse
                    t = load_row(t_row, start, WIDTH, BLOCK, ACC) * t_inverse
                    if ELEMENTS:
                        u = gradient_of_elements(
                            grad_output + row * stride_grad_row, stride_grad_column, start, WIDTH, s, t
                        )
                        s_grad = u - s_projection * s
                        t_grad = t_projection * t - u
                    else:
                        s_grad = s_projection * s - t
                        t_grad = t_projection * t - s
                    if grad_student is not None:
                        store_row(grad_student + row * WIDTH, start, s_factor * s_grad, WIDTH, BLOCK)
                    if grad_target is not None:
                        store_row(grad_target + row * WIDTH, start, t_factor * t_grad, WIDTH, BLOCK)
        else:
            if loss is not None and ELEMENTS:
                clear_row(loss + row * WIDTH, WIDTH, BLOCK, ACC)
            if loss is not None and REDUCTION == "rows":
                tl.store(loss + row, 0.0)
            if grad_student is not None:
                clear_row(grad_student + row * WIDTH, WIDTH, BLOCK, ACC)
            if grad_target is not None:
                clear_row(grad_target + row * WIDTH, WIDTH, BLOCK, ACC)

    if loss is not None and REDUCTION == "sum":
        # The program that finishes last adds up the partial sums of all, in their order.
        tl.store(partial + program, total)
        if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
            lane = tl.arange(0, BLOCK)
            sums = tl.zeros((BLOCK,), ACC)
            for start in range(0, programs, BLOCK):
                sums += tl.load(partial + start + lane, mask=start + lane < programs, other=0)
            reduced = tl.sum(sums, 0) / count
            tl.store(loss, loss_scale * reduced)
            if unscaled is not None:
                tl.store(unscaled, reduced)
            tl.store(ticket, 0)


@triton.jit
def gradient_of_elements(row, stride, start, WIDTH: tl.constexpr, s, t):
    """Return the gradient of (s - t)^2 with respect to s, for a row of grad_output of any stride."""
    column = start + tl.arange(0, s.shape[0])
    grad = tl.load(row + column.to(tl.int64) * stride, mask=column < WIDTH, other=0).to(s.dtype)
    return 2 * grad * (s - t)


@triton.jit
def cosine_rescale_kernel(grad, grad_output, numel, BLOCK: tl.constexpr, ACC: tl.constexpr):
    # A fixed grid strides over the flat gradient: at most 1,024 programs, not one per row, load a 1 and leave.
    factor = tl.load(grad_output).to(ACC)
    if factor != 1:  # NaN too
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, tl.num_programs(0) * BLOCK):
            index = start + tl.arange(0, BLOCK)
            live = index < numel
            store(grad + index, tl.load(grad + index, mask=live, other=0).to(ACC) * factor, live)
