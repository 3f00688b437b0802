"""The public ops: what each computes, what it accepts, and the backend that runs it.

The losses differentiate both inputs. Every op computes in float32 (float64 as soon as one input is float64), whatever
the dtype of its inputs and whatever autocast says.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import distributed
from .backend import Backend, check_backend, choose
from .ops import cosine as ops_cosine
from .ops import resize as ops_resize
from .ops import vicreg as ops_vicreg
from .ops.vicreg_ranks import vicreg_loss_over_ranks
from .reference import cosine as reference_cosine
from .reference import resize as reference_resize
from .reference import vicreg as reference_vicreg
from .reference.dtypes import wide
from .validation import (
    check_choice,
    check_flag,
    check_floating_dtype,
    check_group,
    check_images,
    check_matching,
    check_number,
    check_patch_size,
    check_range,
    check_scalar,
    check_scale,
    check_size,
    check_triple,
    check_weight,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


class VICRegOutput(NamedTuple):
    """What vicreg_loss returns, each a scalar; only `loss` carries a gradient."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def preprocess(
    images: Tensor,
    size: int | Sequence[int] = 224,
    *,
    input_range: Sequence[float] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    antialias: bool = False,
    clamp: bool = False,
    out_dtype: torch.dtype | None = None,
    patch_size: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Images as a teacher wants them: resized, brought to 0..1 and normalised per channel.

        out = ((resize(images) - low) / (high - low) - mean) / std

    Equal to the usual `F.interpolate(((images - low) / (high - low) - mean) / std, size, mode=interpolation,
    align_corners=False, antialias=antialias)`, since the weights of a resize sum to one.

    images: [B, 3, H, W] of any H and W, contiguous or not; float16, bfloat16, float32, float64, or uint8. An empty
        batch gives an empty result.
    size: an int is a square (never the shorter side); or (h, w), in pixels, in Triton 262,144 at most.
    input_range: (low, high), the values that mean black and white; None: (-1, 1) for floats, (0, 255) for uint8.
    mean, std: per channel, on the scale 0..1; std is positive, and what it divides stays within float32.
    antialias: as in F.interpolate: the filter widens when it shrinks an image.
    clamp: clip the resized pixels to input_range before they are normalised (bicubic overshoots).
    out_dtype: of the result; None: the images' own, float32 for uint8.
    patch_size: None gives [B, 3, h, w]; p gives the patches [B, (h/p) (w/p), 3 p p], row by row, each in the order of
        a Conv2d weight [D, 3, p, p], so that a patch embedding is one matrix product.
    backend: auto, reference, torch or triton; None: see fused_dino.use_backend.

    Raises ValueError (TypeError for what is no dense tensor, or no bool) naming the argument; NotImplementedError for
    a backend without this op. Source: the transforms that DINOv2 was published with (arXiv 2304.07193).
    """
    check_images(images)
    size = check_size(size)
    given = check_range(input_range, images.dtype)
    options: dict[str, Any] = {
        "input_range": given,
        "mean": check_triple("mean", mean),
        "std": check_scale(check_triple("std", std, positive=True), given),
        "interpolation": check_choice("interpolation", interpolation, ("bilinear", "bicubic")),
        "antialias": check_flag("antialias", antialias),
        "clamp": check_flag("clamp", clamp),
        "out_dtype": check_floating_dtype("out_dtype", out_dtype)
        or (images.dtype if images.is_floating_point() else torch.float32),
        "patch_size": check_patch_size(patch_size, size),
    }
    name = choose("preprocess", images, backend)
    if name == "reference":
        return reference_resize.preprocess(images, size, **options)
    return ops_resize.preprocess(images, size, **options, backend=name)


def cosine_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None = None,
    alpha: float | Tensor | None = None,
    reduction: Reduction = "mean",
    eps: float = 1e-12,
    backend: Backend | None = None,
) -> Tensor:
    """One minus the cosine between rows.

        loss_i = 1 - <s_i / max(|s_i|, eps), t_i / max(|t_i|, eps)>

    Equal to `(1 - (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)).mean()`, in float32.

    student, teacher: [..., D], the same shape and device; float16, bfloat16, float32 or float64, mixed as you like.
    weight: broadcasts to [...]; a mask is one. "mean" divides by the weights' sum, and is 0 where that is 0. It gets
        no gradient: one that requires it is refused.
    alpha: a factor of the loss, a number or a scalar tensor on the same device (a warm-up: it may change every step).
        Given here and not multiplied in outside it is part of the gradient that the forward writes, which the
        backward then need not scale. It gets no gradient.
    reduction: "mean" -> [], "sum" -> [], "none" -> [...]. A mean over no rows is NaN, as in torch.
    eps: the smallest norm that is divided by; a row below it has a gradient of order 1 / eps.
    backend: auto, reference, torch or triton; None: see fused_dino.use_backend.

    Returns float32, float64 if an input is. 0 is the same direction, 1 orthogonal, 2 opposite. Raises ValueError
    (TypeError for what is no tensor) naming the argument; NotImplementedError for a backend without this op.
    Source: the negative cosine similarity of SimSiam (arXiv 2011.10566), plus one.
    """
    options = {"eps": check_number("eps", eps, minimum=0)}
    return rows_loss("cosine_loss", student, teacher, weight, alpha, reduction, backend, **options)[0]


def mse_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    whiten: bool = False,
    weight: Tensor | None = None,
    alpha: float | Tensor | None = None,
    reduction: Reduction = "mean",
    eps: float = 1e-5,
    backend: Backend | None = None,
) -> Tensor:
    """Squared error between elements, of rows of length one unless told otherwise.

        loss_ij = (s_ij - t_ij)^2

    normalize: rows are divided by max(|row|, 1e-12) first. The mean is then 2 (1 - cosine) / D: at D = 1024 some five
        hundred times weaker than cosine_loss. reduction="sum" gives 2 (1 - cosine) a row.
    whiten: columns are standardised next, (x - mean) / (deviation + eps) over all rows, the deviation unbiased. This
        standardises each dimension; it does not decorrelate them. Needs two rows.
    student, teacher: [..., D], the same shape and device; float16, bfloat16, float32 or float64, mixed as you like.
    weight: broadcasts to [...], one weight a row; a mask is one. "mean" divides by the weights' sum times D, and is 0
        where that is 0. It gets no gradient: one that requires it is refused.
    alpha: a factor of the loss, as in cosine_loss.
    reduction: "mean" -> [], "sum" -> [], "none" -> [..., D], as in F.mse_loss, which this is with normalize=False.
    eps: what is added to a deviation where columns are standardised; nothing else uses it.
    backend: auto, reference, torch or triton; None: see fused_dino.use_backend.

    Returns float32, float64 if an input is. A mean over no rows is NaN. Raises ValueError (TypeError for what is no
    tensor) naming the argument; NotImplementedError for a backend without this op.
    Source: of rows of length one, the loss of BYOL (arXiv 2006.07733).
    """
    options: dict[str, Any] = {
        "normalize": check_flag("normalize", normalize),
        "whiten": check_flag("whiten", whiten),
        "eps": check_number("eps", eps, minimum=0),
    }
    return rows_loss("mse_loss", student, teacher, weight, alpha, reduction, backend, **options)[0]


def rows_loss(
    op: str,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    alpha: float | Tensor | None,
    reduction: str,
    backend: str | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Of "cosine_loss" or "mse_loss": (the loss, the loss without alpha and without a gradient: for logs)."""
    check_matching(student, teacher)
    if options.get("whiten") and math.prod(student.shape[:-1]) < 2:
        raise ValueError(f"whiten needs at least two rows, got student of shape {list(student.shape)}")
    options["weight"] = check_weight(weight, student)
    options["reduction"] = check_choice("reduction", reduction, REDUCTIONS)
    if alpha is not None:
        alpha = check_scalar("alpha", alpha, student.device)
        alpha = alpha.to(wide(student, teacher)) if isinstance(alpha, Tensor) else alpha
    name = choose(op, student, backend)
    if name == "reference":
        value = getattr(reference_cosine, op)(student, teacher, **options)
        return (value if alpha is None else alpha * value), value.detach()
    if isinstance(alpha, float):
        alpha = student.new_full((), alpha, dtype=wide(student, teacher))
    return getattr(ops_cosine, op)(student, teacher, scale=alpha, **options, backend=name)


def vicreg_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    inv_weight: float | Tensor = 25.0,
    var_weight: float | Tensor = 10.0,
    cov_weight: float | Tensor = 0.5,
    gamma: float = 1.0,
    eps: float = 1e-4,
    cov_reduction: Literal["mean", "sum_over_d"] = "mean",
    unbiased: bool = False,
    route: Literal["auto", "gram", "covariance"] = "auto",
    group: ProcessGroup | None = None,
    backend: Backend | None = None,
) -> VICRegOutput:
    """VICReg against a frozen teacher: variance and covariance are the student's alone.

        loss       = inv_weight * invariance + var_weight * variance + cov_weight * covariance
        invariance = mean_ij (y_ij - g_ij)^2
        variance   = mean_j relu(gamma - sqrt(var_j + eps))
        covariance = sum_{i != j} c_ij^2 / D^2,   c = yc^T yc / max(N - 1, 1),   yc = y - mean(y)

    student, teacher: y and g, [N, D], the same shape and device; float16, bfloat16, float32 or float64, mixed as you
        like. One row is finite (its deviations are 0) and warns, unless compiled; no rows are NaN.
    inv_weight, var_weight, cov_weight: numbers or scalar tensors on the same device, which get no gradient. The number
        0 leaves its term out: it is not computed, and reported as 0.
    cov_reduction: "mean" divides by D^2, "sum_over_d" by D, as VICReg was published.
    gamma: the deviation below which a column is pushed apart. eps: what is added to a variance, at least 0.
    unbiased: the variance divides by N - 1, as VICReg was published, instead of N. (The covariance always does.)
    route: how the covariance is computed, by the [N, N] or the [D, D] product; auto takes the smaller. The same
        function; the reference always takes the [D, D] one. By rows a difference is taken, of which the column that
        deviates most is no part. It loses digits only where a second one deviates 1,000 times as much as the others,
        too, and has nothing in common with the first, and some roundings where "gram" is asked for and many rows have
        two or three columns: "covariance" is as accurate as eager there.
    group: None: the rows of this process; a ProcessGroup: the rows of all its ranks, which may bring different numbers
        of rows. Every rank gets the same loss, and a gradient that DDP's mean over the ranks makes the full batch's;
        each does its share. Ranks exchange their counts on the host first, unless route is "covariance" or
        cov_weight the number 0; only who knows the counts can warn of one row. A group of one rank is None.
    backend: auto, reference, torch or triton; None: see fused_dino.use_backend.

    Returns VICRegOutput(loss, invariance, variance, covariance) in float32, float64 if an input is. Raises ValueError
    (TypeError for what is no tensor) naming the argument; NotImplementedError for a backend without this op.
    Source: arXiv 2105.04906; `cov_reduction="sum_over_d", unbiased=True` are its definitions.
    """
    check_matching(student, teacher)
    if student.ndim != 2:
        raise ValueError(f"student must be [N, D], got shape {list(student.shape)}")
    check_choice("route", route, ("auto", "gram", "covariance"))
    check_group(group)
    if group is not None and group.size() == 1:
        group = None
    options: dict[str, Any] = {
        "inv_weight": check_scalar("inv_weight", inv_weight, student.device),
        "var_weight": check_scalar("var_weight", var_weight, student.device),
        "cov_weight": check_scalar("cov_weight", cov_weight, student.device),
        "gamma": check_number("gamma", gamma),
        "eps": check_number("eps", eps, minimum=0),
        "cov_reduction": check_choice("cov_reduction", cov_reduction, ("mean", "sum_over_d")),
        "unbiased": check_flag("unbiased", unbiased),
    }
    if student.shape[0] == 1 and group is None and not torch.compiler.is_compiling():
        warnings.warn("vicreg_loss got one row: its variance and covariance are 0 by convention", stacklevel=2)
    for weight in ("inv_weight", "var_weight", "cov_weight"):
        if isinstance(options[weight], Tensor):
            options[weight] = options[weight].to(wide(student, teacher))
    name = choose("vicreg_loss" if group is None else "vicreg_loss(group)", student, backend)
    if name == "reference":
        total = partial(distributed.sum_over_ranks, group=group)
        loss, *terms = reference_vicreg.vicreg_loss(student, teacher, **options, total=total)
    elif group is not None:
        loss, *terms = vicreg_loss_over_ranks(student, teacher, **options, route=route, group=group)
    else:
        loss, *terms = ops_vicreg.vicreg_loss(student, teacher, **options, route=route, backend=name)
    return VICRegOutput(loss, *(x.detach() for x in terms))


def rehearsal(options: dict[str, Any]) -> dict[str, Any]:
    """A module's options for a trial run at its construction, on the reference: the device may come later."""
    if options.get("backend") is not None:
        check_backend(options["backend"])
    return {**options, "backend": "reference"}
