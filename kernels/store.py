"""The rounding of every store in a kernel."""

import triton
import triton.language as tl


@triton.jit
def store(pointer, value, mask):
    """Store a value. On its way from float64 to 16 bits it is rounded twice: the interpreter gets one step wrong."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointer, value, mask=mask)
