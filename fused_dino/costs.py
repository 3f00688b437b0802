"""The FLOP and bytes of each part of a supervised step, for the benchmarks and `fused-dino estimate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch

from .counting import Kernel, count
from .losses import CosineLoss, MSELoss, VICRegLoss
from .sizes import resolve
from .teacher import DINOv2Backbone
from .teacher.weights import VARIANTS
from .terms import Projector

LAUNCHES = {"preprocess": 1, "cosine_loss": 2, "mse_loss": 2, "vicreg_loss": 5}  # of our kernels, with the backward


def preprocess(shape: Sequence[int], size: int, itemsize: int, out_itemsize: int, backward: bool = False) -> Kernel:
    """Count three interpolations of two values and a multiply-add for each output; the adjoint costs as much."""
    outside = shape[0] * 3 * size**2
    times = 2 if backward else 1
    return Kernel(times * (prod(shape) * itemsize + outside * out_itemsize), times * 11 * outside)


def cosine_loss(shape: Sequence[int], itemsize: int, backward: bool = True) -> Kernel:
    """Count three products of rows; a gradient adds two scaled rows and their sum."""
    tensors, operations = (3, 10) if backward else (2, 6)
    return Kernel(tensors * prod(shape) * itemsize, operations * prod(shape))


def mse_loss(shape: Sequence[int], itemsize: int, backward: bool = True, whiten: bool = False) -> Kernel:
    """Count two norms and a squared difference; a gradient adds two scaled rows and their sum.

    Whitening adds two means, two deviations, and their subtraction and division; a gradient adds two sums over rows.
    """
    tensors, operations = (3, 11) if backward else (2, 7)
    if whiten:
        operations += 18 if backward else 10
    return Kernel(tensors * prod(shape) * itemsize, operations * prod(shape))


def vicreg_loss(shape: Sequence[int], itemsize: int, backward: bool = True) -> Kernel:
    """Count half of a symmetric product; a gradient adds a whole one."""
    n, d = shape
    tensors, products = (3, 3) if backward else (2, 1)
    return Kernel(tensors * n * d * itemsize, products * n * d * min(n, d))


LOSSES = {"cosine": cosine_loss, "mse": mse_loss, "vicreg": vicreg_loss}
KINDS = {"cosine": CosineLoss, "mse": MSELoss, "vicreg": VICRegLoss}

# --- models -----------------------------------------------------------------------------------------------------------


def on_meta(name: str, img_size: Any = 224, layers: Sequence[int] | None = None) -> DINOv2Backbone:
    """Build a teacher without memory, weights or network."""
    argument: dict[str, Any] = {"variant" if name in VARIANTS else "model": name}
    with torch.device("meta"):
        teacher = DINOv2Backbone(**argument, img_size=img_size, pretrained=False, layers=layers)
    return teacher.to("meta")  # some models make their buffers on the CPU, whatever is asked


def teacher_kernels(
    teacher: DINOv2Backbone, batch: int, dtype: torch.dtype, side: int = 224, needs: frozenset[str] | None = None
) -> list[Kernel]:
    """Return the kernels that a teacher on the meta device launches in eager PyTorch for the features that are read."""
    teacher.to(dtype)
    with torch.no_grad(), torch.device("meta"):
        images = torch.empty(batch, 3, side, side, dtype=dtype)
        return count(lambda: teacher(images, needs))


def projector_kernels(in_dim: int, out_dim: int, batch: int, dtype: torch.dtype) -> list[Kernel]:
    """Return the kernels that a projector launches in eager PyTorch, forward and backward to its input."""
    with torch.device("meta"):
        return there_and_back(Projector(in_dim, out_dim=out_dim).to(dtype), (batch, in_dim), dtype)


def there_and_back(module: Any, shape: Sequence[int], dtype: torch.dtype, *more: Any) -> list[Kernel]:
    """Return the kernels that a module on the meta device launches for a tensor [*shape], and for its gradients."""
    x = torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)
    outputs = torch.empty_like(module(x, *more))
    return count(lambda: torch.autograd.grad(module(x, *more), [x, *module.parameters()], outputs))


# --- a step -----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of a step: its kernels, and how many launches they take."""

    name: str
    kernels: list[Kernel]
    launches: int

    @property
    def flops(self) -> float:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        return sum(kernel.bytes for kernel in self.kernels)

    def seconds(self, copy: float, matrix: float) -> float:
        """Return the time at the roofs: for each kernel the longer of bytes over `copy` and FLOP over `matrix`."""
        return sum(max(kernel.bytes / copy, kernel.flops / matrix) for kernel in self.kernels)


def step(
    teacher: DINOv2Backbone, batch: int, side: int, loss: str, dtype: torch.dtype, in_dim: int = 8192, size: int = 224
) -> list[Part]:
    """Return the parts of a step that supervises z [B, in_dim] by the teacher's global token of images.

    Preprocessing and patch embedding are counted apart, also where the embedding reads raw images.
    """
    ours = preprocess((batch, 3, side, side), size, dtype.itemsize, dtype.itemsize)
    seen = teacher_kernels(teacher, batch, dtype, size, frozenset({"global"}))
    projected = projector_kernels(in_dim, teacher.embed_dim, batch, dtype)
    compared = LOSSES[loss]((batch, teacher.embed_dim), dtype.itemsize)
    return [
        Part("preprocess", [ours], LAUNCHES["preprocess"]),
        Part("teacher", seen, len(seen)),
        Part("projector", projected, len(projected)),
        Part("loss", [compared], LAUNCHES[f"{loss}_loss"]),
    ]


def supervised(
    supervision: Any, batch: int, side: int, students: Mapping[str, Sequence[int]], dtype: torch.dtype
) -> list[Part]:
    """Return the parts of a step under a supervision on the meta device.

    students: the shapes of its terms' tensors without the batch. Tokens lie on the teacher's grid.
    """
    supervision.to(dtype)
    teacher, size, parts = supervision.teacher, 0, []
    if teacher is not None:
        size = resolve(supervision.img_size, side, side, teacher.patch_size)[0]
        ours = preprocess((batch, 3, side, side), size, dtype.itemsize, dtype.itemsize)
        needs: frozenset[str] = frozenset().union(*(term.needs for term in supervision.terms.values()))
        seen = teacher_kernels(teacher, batch, dtype, size, needs)
        parts = [Part("preprocess", [ours], LAUNCHES["preprocess"]), Part("teacher", seen, len(seen))]
    for name, term in supervision.terms.items():
        more = [(size // teacher.patch_size,) * 2] if getattr(term, "kind", None) == "conv" else []
        if kernels := there_and_back(term.projector, (batch, *students[name]), dtype, *more):
            parts.append(Part("projector", kernels, len(kernels)))
        target = torch.empty(batch, *students[name][:-1], term.out_dim or teacher.embed_dim, dtype=dtype, device="meta")
        if (grids := getattr(term, "grids", None)) is not None and grids.standardize:
            kernels = count(partial(grids.prepare, target))
            parts.append(Part("targets", kernels, len(kernels)))
        parts.append(compared(term.loss, target))
    return parts


def compared(loss: Any, target: torch.Tensor) -> Part:
    """Return the cost of a loss on rows: ours by its formula, others by the kernels that eager PyTorch launches."""
    name = next((name for name, kind in KINDS.items() if isinstance(loss, kind)), None)
    if name is None:
        kernels = there_and_back(loss, target.shape, target.dtype, target)
        return Part("loss", kernels, len(kernels))
    kernel = LOSSES[name]((target[..., 0].numel(), target.shape[-1]), target.itemsize)
    return Part("loss", [kernel], LAUNCHES[f"{name}_loss"])
