"""The public ops. Each documents and checks its arguments, and runs on the chosen backend.

The losses differentiate both inputs. Every op computes in float32, or in float64 if an input is float64, whatever the
other dtypes and autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from .backend import Backend, choose
from .rows import rows_loss
from .validation import (
    check_choice,
    check_flag,
    check_floating_dtype,
    check_images,
    check_number,
    check_patch_size,
    check_range,
    check_scale,
    check_size,
    check_triple,
)
from .vicreg import vicreg_terms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

__all__ = ["cosine_loss", "mse_loss", "preprocess", "vicreg_loss"]

Reduction = Literal["mean", "sum", "none"]


class VICRegOutput(NamedTuple):
    """Result of ``vicreg_loss``: scalars, of which ``loss`` alone carries a gradient.

    Attributes:
        loss (Tensor): Weighted sum of the three terms.
        invariance (Tensor): Mean squared difference of student and target.
        variance (Tensor): Mean hinge of the columns' deviations.
        covariance (Tensor): Squared covariances off the diagonal.
    """

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
    r"""Resizes images, brings them to 0..1 and normalises each channel, as a teacher expects them.

    .. math:: y = ((\operatorname{resize}(x) - low) / (high - low) - mean) / std

    Equals ``F.interpolate(((images - low) / (high - low) - mean) / std, size, mode=interpolation, align_corners=False,
    antialias=antialias)``, since the weights of a resize sum to one. Computed in float32.

    Args:
        images (Tensor): Images of any height and width, contiguous or channels-last: float16, bfloat16, float32,
            float64 or uint8. An empty batch gives an empty result.
        size (int or sequence of two ints): Height and width in pixels. An int is a square, never the shorter side. The
            kernels take at most 262,144 a side. Default: 224.
        input_range (sequence of two floats, optional): Values that mean black and white. Default: ``(-1, 1)`` for
            floats, ``(0, 255)`` for uint8.
        mean (sequence of three floats): Mean of each channel on the scale 0..1. Default: ImageNet's.
        std (sequence of three floats): Deviation of each channel on the scale 0..1, positive. Default: ImageNet's.
        interpolation (str): ``"bilinear"`` or ``"bicubic"``. Default: ``"bilinear"``.
        antialias (bool): Widens the filter where it shrinks an image, as in ``F.interpolate``. Default: ``False``.
        clamp (bool): Clips the resized pixels to ``input_range`` before they are normalised: bicubic overshoots.
            Default: ``False``.
        out_dtype (torch.dtype, optional): Dtype of the result. Default: the images' own, float32 for uint8.
        patch_size (int, optional): Side ``p`` of the patches to return in place of an image. It divides ``size``.
        backend (str, optional): ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. Default: see ``use_backend``.

    Shape:
        - images: :math:`(B, 3, H, W)`
        - Output: :math:`(B, 3, h, w)`, or with ``patch_size`` :math:`(B, h w / p^2, 3 p^2)`. Patches are row by row,
          each in the order of a Conv2d weight :math:`(D, 3, p, p)`, so that a patch embedding is one matrix product

    Returns:
        Tensor: Normalised images or patches, differentiable in ``images``.

    Raises:
        ValueError: If an argument is out of range. The message names it, what came and what would do.
        TypeError: If ``images`` is no dense tensor, or a flag is no bool.
        NotImplementedError: If the backend has no such op.

    Example:
        >>> preprocess(torch.zeros(2, 3, 256, 320, dtype=torch.uint8), 224).shape
        torch.Size([2, 3, 224, 224])

    Source: the transforms that DINOv2 was published with (arXiv 2304.07193).
    """
    check_images(images)
    size = check_size(size)
    low_high = check_range(input_range, images.dtype)
    options: dict[str, Any] = {
        "input_range": low_high,
        "mean": check_triple("mean", mean),
        "std": check_scale(check_triple("std", std, positive=True), low_high),
        "interpolation": check_choice("interpolation", interpolation, ("bilinear", "bicubic")),
        "antialias": check_flag("antialias", antialias),
        "clamp": check_flag("clamp", clamp),
        "out_dtype": check_floating_dtype("out_dtype", out_dtype)
        or (images.dtype if images.is_floating_point() else torch.float32),
        "patch_size": check_patch_size(patch_size, size),
    }
    return choose("preprocess", images, backend)[1](images, size, **options)


def cosine_loss(
    student: Tensor,
    target: Tensor,
    *,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float | Tensor | None = None,
    reduction: Reduction = "mean",
    eps: float = 1e-12,
    backend: Backend | None = None,
) -> Tensor:
    r"""One minus the cosine similarity of rows, averaged.

    .. math:: \ell_i = 1 - \langle s_i / \max(\|s_i\|, \epsilon),\; t_i / \max(\|t_i\|, \epsilon) \rangle

    Equals ``(1 - F.cosine_similarity(student, target, dim=-1)).mean()``, computed in float32. It is 0 for the same
    direction, 1 for orthogonal rows, 2 for opposite ones.

    Args:
        student (Tensor): Rows to align: float16, bfloat16, float32 or float64, of any layout.
        target (Tensor): Rows to align with, of the same shape and device. Gets a gradient if it requires one.
        index (Tensor, optional): Position in ``target`` of each row of ``student``, if the student has a subset of the
            tokens: row ``[b, m]`` is compared with ``target[b, index[b, m]]``. int32 or int64, from 0 to N - 1. A value
            out of range raises on a CPU. On a GPU, and under a transform or a compiler, its row and gradient are NaN.
            The kernel reads the rows in place. A target that requires a gradient is refused.
        weight (Tensor, optional): Weights of rows, broadcastable to :math:`(...)`. A mask is one. ``"mean"`` divides by
            the sum of the weights, and is 0 where that is 0. A row of weight 0 is left out, whatever it holds: NaN and
            infinity reach neither value nor gradient. Its index may be anything, such as -1 for padding. A weight that
            requires a gradient is refused.
        scale (float or Tensor, optional): Factor of the loss: a number, or a scalar tensor on the same device without a
            gradient. Faster than multiplying the result: it is folded into the gradient that the forward computes.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``. A mean over no rows is NaN, as in torch. Default:
            ``"mean"``.
        eps (float): Smallest norm that divides. A row of a smaller norm has a gradient of order ``1 / eps``. Default:
            1e-12.
        backend (str, optional): ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. Default: see ``use_backend``.

    Shape:
        - student, target: :math:`(..., D)`
        - With index :math:`(B, M)`: student :math:`(B, M, D)`, target :math:`(B, N, D)`
        - Output: scalar, or :math:`(...)` with ``reduction="none"``, one value for each row of ``student``

    Returns:
        Tensor: float32, or float64 if an input is.

    Raises:
        ValueError: If shapes, devices or dtypes do not fit. The message names the argument and what would do.
        TypeError: If an input is no dense tensor, or ``index`` is neither int32 nor int64.
        NotImplementedError: If the backend has no such op.

    Example:
        >>> loss = cosine_loss(torch.randn(8, 64, requires_grad=True), torch.randn(8, 64))
        >>> loss.backward()
        >>> kept = torch.rand(2, 9).argsort(1)[:, :4]
        >>> loss = cosine_loss(torch.randn(2, 4, 64), torch.randn(2, 9, 64), index=kept)

    Source: negative cosine similarity of SimSiam (arXiv 2011.10566), plus one.
    """
    options: dict[str, Any] = {"index": index, "eps": check_number("eps", eps, minimum=0)}
    return rows_loss("cosine_loss", student, target, weight, scale, reduction, backend, **options)[0]


def mse_loss(
    student: Tensor,
    target: Tensor,
    *,
    normalize: bool = True,
    whiten: bool = False,
    weight: Tensor | None = None,
    scale: float | Tensor | None = None,
    reduction: Reduction = "mean",
    eps: float = 1e-5,
    norm_eps: float = 1e-12,
    backend: Backend | None = None,
) -> Tensor:
    r"""Squared error between the elements of rows, which are first divided by their norms.

    .. math:: \ell_{ij} = (s_{ij} - t_{ij})^2

    Equals ``F.mse_loss(F.normalize(student, dim=-1), F.normalize(target, dim=-1))``, computed in float32. This is
    :math:`2 (1 - \cos) / D`: at D = 1024 some five hundred times weaker than ``cosine_loss``.

    Args:
        student (Tensor): Rows to align: float16, bfloat16, float32 or float64, of any layout.
        target (Tensor): Rows to align with, of the same shape and device. Gets a gradient if it requires one.
        normalize (bool): Divides rows by their norms first. Default: ``True``.
        whiten (bool): Then standardises each column over all rows: ``(x - mean) / (std + eps)`` with the unbiased
            deviation. It does not decorrelate columns. Needs two rows. Default: ``False``.
        weight (Tensor, optional): Weights of rows, broadcastable to :math:`(...)`. A mask is one. ``"mean"`` divides by
            the sum of the weights times D, and is 0 where that is 0. A row of weight 0 is left out, whatever it holds.
            ``whiten`` takes the statistics of the other rows, each counted once; fewer than two give NaN. A weight that
            requires a gradient is refused.
        scale (float or Tensor, optional): Factor of the loss, as in ``cosine_loss``.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``, as in ``F.mse_loss``. A mean over no rows is NaN. Default:
            ``"mean"``.
        eps (float): Added to a deviation where ``whiten`` is set. Default: 1e-5.
        norm_eps (float): Smallest norm that divides where ``normalize`` is set. Default: 1e-12.
        backend (str, optional): ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. Default: see ``use_backend``.

    Shape:
        - student, target: :math:`(..., D)`
        - Output: scalar, or :math:`(..., D)` with ``reduction="none"``

    Returns:
        Tensor: float32, or float64 if an input is.

    Raises:
        ValueError: If shapes, devices or dtypes do not fit, or ``whiten`` gets one row. The message names the argument.
        TypeError: If an input is no dense tensor, or a flag is no bool.
        NotImplementedError: If the backend has no such op.

    Example:
        >>> loss = mse_loss(torch.randn(8, 64, requires_grad=True), torch.randn(8, 64), whiten=True)
        >>> loss.backward()

    Source: the loss of BYOL (arXiv 2006.07733), for rows of length one.
    """
    options: dict[str, Any] = {
        "normalize": check_flag("normalize", normalize),
        "whiten": check_flag("whiten", whiten),
        "eps": check_number("eps", eps, minimum=0),
        "norm_eps": check_number("norm_eps", norm_eps, minimum=0),
    }
    return rows_loss("mse_loss", student, target, weight, scale, reduction, backend, **options)[0]


def vicreg_loss(
    student: Tensor,
    target: Tensor | None,
    *,
    inv_weight: float | Tensor = 25.0,
    var_weight: float | Tensor = 10.0,
    cov_weight: float | Tensor = 0.5,
    gamma: float = 1.0,
    eps: float = 1e-4,
    cov_reduction: Literal["mean", "sum_over_d"] = "mean",
    unbiased: bool = False,
    both: bool = False,
    per: Literal["batch", "position"] = "batch",
    route: Literal["auto", "gram", "covariance"] = "auto",
    group: ProcessGroup | None = None,
    backend: Backend | None = None,
) -> VICRegOutput:
    r"""VICReg of a student against a frozen teacher, of two branches, or of one embedding alone.

    .. math::
        \ell = w_{inv} \, \operatorname{mean}_{ij} (y_{ij} - g_{ij})^2
        + w_{var} \, \operatorname{mean}_j \max(0, \gamma - \sqrt{var_j + \epsilon})
        + w_{cov} \sum_{i \ne j} c_{ij}^2 / D^2

    with the covariances :math:`c = y_c^T y_c / \max(N - 1, 1)` of the centred student. Computed in float32.
    Variance and covariance are the student's alone, unless ``both`` is set.

    Args:
        student (Tensor): Rows ``y``: float16, bfloat16, float32 or float64, of any layout. One row warns, and has
            deviations of 0. No rows give NaN.
        target (Tensor or None): Rows ``g``, of the same shape and device. Gets a gradient if it requires one. ``None``
            leaves the invariance out.
        inv_weight (float or Tensor): Weight of the invariance, a number or a scalar tensor on the same device. The
            number 0 leaves a term out: it is not computed, and reported as 0. Default: 25.
        var_weight (float or Tensor): Weight of the variance. Default: 10.
        cov_weight (float or Tensor): Weight of the covariance. Default: 0.5.
        gamma (float): Deviation below which a column is pushed apart. Default: 1.
        eps (float): Added to a variance. Default: 1e-4.
        cov_reduction (str): ``"mean"`` divides by :math:`D^2`, ``"sum_over_d"`` by D, as published. Default:
            ``"mean"``.
        unbiased (bool): Divides the variance by N - 1, as published, in place of N. Default: ``False``.
        both (bool): Regularises the target too: variance and covariance are sums over both branches. Nothing is
            detached. Default: ``False``.
        per (str): Rows of [B, N, D] that share a covariance: all B N rows (``"batch"``), or the B rows of each position
            (``"position"``). The loss is then the mean over the N positions. Default: ``"batch"``.
        route (str): Product that the covariance comes from: ``"gram"`` of rows [N, N], ``"covariance"`` of columns [D,
            D], or ``"auto"``, the smaller one. The Gram route subtracts two sums and leaves the largest column out, so
            that it cannot cancel. Accuracy drops if two uncorrelated columns dominate: 1e-3 when both are 100 times the
            others, meaningless at 10,000 times. Use ``"covariance"`` there. Default: ``"auto"``.
        group (ProcessGroup, optional): Ranks whose rows count together; they may bring different numbers of rows.
            Gradients are scaled so that DDP's averaging gives the full-batch gradient. Ranks exchange their counts on
            the host, unless ``route="covariance"`` or ``cov_weight=0``. Default: the rows of this process.
        backend (str, optional): ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. Default: see ``use_backend``.

    Shape:
        - student, target: :math:`(N, D)` or :math:`(B, N, D)`
        - Output: four scalars

    Returns:
        VICRegOutput: ``(loss, invariance, variance, covariance)`` in float32, or float64 if an input is.

    Raises:
        ValueError: If shapes, devices or dtypes do not fit. The message names the argument and what would do.
        TypeError: If an input is no dense tensor, or ``group`` is no process group.
        NotImplementedError: If the backend has no such op.

    Example:
        >>> out = vicreg_loss(torch.randn(8, 64, requires_grad=True), torch.randn(8, 64))
        >>> out.loss.backward()

    Source: VICReg (arXiv 2105.04906), whose definitions are ``cov_reduction="sum_over_d", unbiased=True``.
    """
    terms = vicreg_terms(
        student, target, inv_weight=inv_weight, var_weight=var_weight, cov_weight=cov_weight, gamma=gamma, eps=eps,
        cov_reduction=cov_reduction, unbiased=unbiased, both=both, per=per, route=route, group=group, backend=backend,
    )  # fmt: skip
    return VICRegOutput(*terms)
