"""Patch embedding of raw images: resize and normalisation are folded into the weights of the convolution.

A bilinear resize without antialias by s = size_in / size_out >= 1 has half-pixel centres. If s p is whole, a patch of
p x p outputs reads its own window of (s p) x (s p) inputs and nothing else. With the taps of a patch as matrices
A [p, s p], whose rows sum to one,

tokens = W (gain A u A^T + offset) + b = (gain A^T W A) u + (b + sum W offset)

is one convolution of stride s p, where u = factor x + shift are the images on a scale that 16 bits hold well.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend import requested
from ..preprocess import Preprocess
from ..sizes import Size
from ..validation import FLOATING, check_scale, check_size, check_triple
from .transformers_model import CLASSES, is_known

if TYPE_CHECKING:
    from .backbone import DINOv2Backbone
    from .embedding import PatchProjection

CPU_GROWTH = 1.5  # of a patch's pixels: a CPU resizes faster than it multiplies larger windows
TIMM = {"vision_transformer": "VisionTransformer", "eva": "Eva"}
OPTIONS = {"interpolation": "bilinear", "antialias": False, "clamp": False, "out_dtype": None}


class Raw(NamedTuple):
    """What turns raw images into a teacher's input: a bilinear resize, then a normalisation.

    size: height and width of the input; the others are options of ``preprocess``.
    """

    size: Size
    input_range: tuple[float, float]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_raw(teacher: DINOv2Backbone, preprocess: Any, images: Tensor, size: Size | None) -> Raw | str:
    """Return the preprocessing to fold into the convolution, or the reason why these images are preprocessed first.

    size: of the teacher's input. Default: that of preprocess.
    """
    obstacle = find_obstacle(teacher) or find_option(preprocess, teacher.patch_size)
    if obstacle:
        return obstacle
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype not in (*FLOATING, torch.uint8):
        return "the images are not [B, 3, H, W] of floats or bytes"
    size = check_size(preprocess.size if size is None else size)
    if size != teacher.input_size(size):
        return "preprocess has another size than the teacher"
    h, w = sides = images.shape[2], images.shape[3]
    for inside, outside in zip(sides, size, strict=True):
        if inside < outside or inside * teacher.patch_size % outside:
            return f"a patch of {teacher.patch_size} has no window of whole pixels where {inside} become {outside}"
    if images.is_cpu and h * w > CPU_GROWTH * size[0] * size[1]:
        return f"a CPU resizes {h} x {w} to {size[0]} x {size[1]} faster than it multiplies so many pixels"
    low_high, options = preprocess.range_of(images.dtype), preprocess.options
    mean, std = check_triple("mean", options["mean"]), check_triple("std", options["std"], positive=True)
    check_scale(std, low_high)
    return Raw(size, low_high, mean, std)


def find_option(preprocess: Any, patch_size: int) -> str | None:
    """Return the option of a preprocessing that no convolution can do, or None."""
    if type(preprocess) is not Preprocess or preprocess._forward_hooks or preprocess._forward_pre_hooks:
        return "preprocess is no plain Preprocess"
    options = preprocess.options
    for name, value in OPTIONS.items():
        if options[name] != value:
            return f"preprocess has {name}={options[name]}"
    if options["patch_size"] not in (None, patch_size):
        return f"preprocess has patch_size={options['patch_size']}"
    backend, source = requested(options["backend"])
    return None if backend == "auto" else f"backend {backend} is asked for by {source}"


def find_obstacle(teacher: Any) -> str | None:
    """Return why a teacher takes no raw images, or None if it does."""
    projection, model = teacher.projection, teacher.computing
    if not teacher.takes_raw:
        return "engine=False"
    if projection is None:
        return f"{type(model).__name__} has no patch embedding that is a convolution by patches"
    if not projection.reads_all:
        return f"{type(model).__name__} may read its images elsewhere, too"
    parts = (teacher, model, getattr(model, "patch_embed", None), projection)
    if teacher._forward_hooks or any(part is not None and part._forward_pre_hooks for part in parts):
        return "a hook reads what the teacher is given"
    weight, bias = projection.weight, projection.bias
    if any(x is not None and type(x) not in (Tensor, nn.Parameter) for x in (weight, bias)):
        return f"the patch embedding's weight is a {type(weight).__name__}"
    return "MPS has no float64, in which weights are folded" if weight.device.type == "mps" else None


def reads_all_pixels(model: nn.Module) -> bool:
    """Whether a model is known to read its images by its patch embedding alone, and once."""
    if is_known(model):
        return type(model).__name__ in CLASSES.values()
    kind = type(model)
    if kind.__name__ == "DinoVisionTransformer":  # the official code
        return True
    forward, embed = getattr(kind, "forward_features", None), getattr(model, "patch_embed", None)
    found = [getattr(sys.modules.get(f"timm.models.{file}"), name, None) for file, name in TIMM.items()]
    plain = any(timm is not None and forward is timm.forward_features for timm in found)
    return plain and type(embed).__name__ == "PatchEmbed"


def embed(images: Tensor, raw: Raw, kernel: Tensor, constant: Tensor) -> Tensor:
    """Return the tokens [B, D, rows, columns] of raw images [B, 3, H, W], by folded weights."""
    return F.conv2d(centred(images, raw, kernel.dtype), kernel, constant, stride=kernel.shape[2:])


def folded(projection: PatchProjection, images: Tensor, raw: Raw) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias for images of a size, which the projection caches. read_raw has accepted raw."""
    weight, bias = projection.weight, projection.bias
    p = weight.shape[2]
    window = images.shape[2] * p // raw.size[0], images.shape[3] * p // raw.size[1]
    sources = (weight,) if bias is None else (weight, bias)
    return projection.cached((window, raw[1:]), sources, lambda: fold(weight, bias, window, raw))


def fold(weight: Tensor, bias: Tensor | None, window: Size, raw: Raw) -> tuple[Tensor, Tensor]:
    """Return the weight [D, 3, *window] and the bias [D] for centred images, computed in float64."""
    (low, high), (shift, factor) = raw.input_range, centring(raw.input_range)
    width, black = high - low, -shift / factor - low
    exact, p = weight.to(torch.float64), weight.shape[2]
    gains = [1 / (factor * width * s) for s in raw.std]
    offsets = [(black / width - m) / s for m, s in zip(raw.mean, raw.std, strict=True)]
    # By channels and Python numbers: a tensor of constants would be copied to the device.
    sums = exact.sum((2, 3)).unbind(1)
    added = sum(x * offset for x, offset in zip(sums, offsets, strict=True))
    scaled = torch.stack([x * gain for x, gain in zip(exact.unbind(1), gains, strict=True)], 1)
    rows, columns = (taps(p, side, weight.device) for side in window)
    folded = rows.T @ scaled @ columns
    moved = added if bias is None else bias.to(torch.float64) + added
    return folded.to(weight.dtype), moved.to(weight.dtype)  # type: ignore[union-attr]


def taps(p: int, window: int, device: torch.device) -> Tensor:
    """Return the weights [p, window] by which each of p outputs reads its window."""
    outputs, inputs = (torch.arange(n, dtype=torch.float64, device=device) for n in (p, window))
    centres = ((2 * outputs + 1) * window - p) / (2 * p)
    return (1 - (centres.unsqueeze(1) - inputs).abs()).clamp(min=0)


def centring(input_range: tuple[float, float]) -> tuple[float, float]:
    """Return (shift, factor) of u = factor x + shift: the range's middle goes to 0, its ends near -1 and 1.

    The factor is a power of two, so that bytes lose nothing even in bfloat16.
    """
    low, high = input_range
    factor = 2.0 ** -round(math.log2((high - low) / 2))
    return -(low / 2 + high / 2) * factor, factor


def centred(images: Tensor, raw: Raw, dtype: torch.dtype) -> Tensor:
    """Return centred images in the weight's dtype. Those of -1..1 are centred as they are."""
    shift, factor = centring(raw.input_range)
    if images.is_floating_point():
        images = images.to(torch.promote_types(images.dtype, dtype))
    if (shift, factor) != (0, 1):
        acc_dtype = images.dtype if images.is_floating_point() else dtype
        images = torch.add(torch.full((), shift, dtype=acc_dtype, device=images.device), images, alpha=factor)
    return images.to(dtype)
