"""Guard pages, which catch out-of-bounds access without a GPU: a process that touches one is killed."""

import ctypes
import faulthandler
import mmap
import os
import sys

import torch
from torch import Tensor

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
NOTHING, READ_WRITE, PRIVATE_ANONYMOUS = 0, 3, 0x22

# A forked child has none of its parent's threads. autograd decides in its first backward whether it needs any, and does
# once something was compiled; here nothing was.
torch.ones((), requires_grad=True).backward()


def guarded(tensor: Tensor, side: str) -> Tensor:
    """Copy a tensor so that its first ("before") or last ("after") byte touches a page that cannot be accessed."""
    size = tensor.numel() * tensor.element_size()
    space = -(-size // PAGE) * PAGE
    base = libc.mmap(None, space + 2 * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    libc.mprotect(base, PAGE, NOTHING)
    libc.mprotect(base + PAGE + space, PAGE, NOTHING)
    start = base + PAGE + (space - size if side == "after" else 0)
    raw = (ctypes.c_byte * size).from_address(start)
    return torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def survives(call) -> bool:
    """Tell whether `call` ends well in a child process, which a touch of a guard page kills."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # a death that is looked for needs no report
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0
