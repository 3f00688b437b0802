"""Cosine between rows: one read for the loss, one more for the gradients."""

import triton
import triton.language as tl


@triton.jit
def inverse(norm, eps):
    """1 / max(norm, eps), by tl.where and not tl.maximum: a NaN norm must stay NaN."""
    return 1 / tl.where(norm < eps, eps, norm)


@triton.jit
def store(pointer, value, mask):
    """A store rounded once more on its way from float64 to 16 bits, which the interpreter gets wrong in one step."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointer, value, mask=mask)


@triton.jit
def cosine_fwd_kernel(
    student, teacher,  # [N, D], last dimension contiguous
    distance, student_norm, teacher_norm,  # [N]
    stride_student, stride_teacher, width,
    EPS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns one row and walks it twice, the second time out of the cache: the product of two rows is taken
    # of rows of length one, since of the rows themselves it can leave the range.
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2**31
    column = tl.arange(0, BLOCK)
    student += row * stride_student
    teacher += row * stride_teacher
    ss = tl.zeros((BLOCK,), ACC)
    tt = tl.zeros((BLOCK,), ACC)
    for start in range(0, width, BLOCK):
        live = start + column < width
        # Upcast right at the load: half precision must not reach the products, and bf16 in the interpreter is wrong.
        s = tl.load(student + start + column, mask=live, other=0).to(ACC)
        t = tl.load(teacher + start + column, mask=live, other=0).to(ACC)
        ss += s * s
        tt += t * t
    s_norm = tl.sqrt(tl.sum(ss, 0))
    t_norm = tl.sqrt(tl.sum(tt, 0))
    eps = tl.full((), EPS, ACC)  # Triton 3.6 compares with a constant in float32
    s_inverse = inverse(s_norm, eps)
    t_inverse = inverse(t_norm, eps)
    st = tl.zeros((BLOCK,), ACC)
    for start in range(0, width, BLOCK):
        live = start + column < width
        s = tl.load(student + start + column, mask=live, other=0).to(ACC)
        t = tl.load(teacher + start + column, mask=live, other=0).to(ACC)
        st += (s * s_inverse) * (t * t_inverse)
    tl.store(distance + row, 1 - tl.sum(st, 0))
    tl.store(student_norm + row, s_norm)
    tl.store(teacher_norm + row, t_norm)


@triton.jit
def cosine_bwd_kernel(
    student, teacher,  # [N, D], last dimension contiguous
    distance, student_norm, teacher_norm, grad_output,  # [N]; grad_output of any stride
    grad_student, grad_teacher,  # [N, D] contiguous; None where it is not wanted
    stride_student, stride_teacher, stride_grad_output, width,
    EPS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns one row. With s and t of length one, d(1 - cos)/d student = (cos s - t) / |student|.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    student += row * stride_student
    teacher += row * stride_teacher
    s_norm = tl.load(student_norm + row)
    t_norm = tl.load(teacher_norm + row)
    cos = 1 - tl.load(distance + row)
    outer = tl.load(grad_output + row * stride_grad_output).to(ACC)
    eps = tl.full((), EPS, ACC)  # Triton 3.6 compares with a constant in float32
    s_inverse = inverse(s_norm, eps)
    t_inverse = inverse(t_norm, eps)
    # A clamped norm is a constant, and has no share in the gradient.
    s_along = tl.where(s_norm < eps, 0, cos)
    t_along = tl.where(t_norm < eps, 0, cos)
    s_outer = outer * s_inverse
    t_outer = outer * t_inverse
    for start in range(0, width, BLOCK):
        live = start + column < width
        s = tl.load(student + start + column, mask=live, other=0).to(ACC) * s_inverse
        t = tl.load(teacher + start + column, mask=live, other=0).to(ACC) * t_inverse
        if grad_student is not None:
            store(grad_student + row * width + start + column, s_outer * (s_along * s - t), live)
        if grad_teacher is not None:
            store(grad_teacher + row * width + start + column, t_outer * (t_along * t - s), live)
