"""Columns standardised, the first step of mse_loss(whiten=True)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dino.ops import standardize as ops_standardize
from fused_dino.ops import standardize_triton
from fused_dino.reference.cosine import prepare
from fused_dino.reference.dtypes import acc_dtype, upcast
from proving import Case, Op


def standardize(
    x: Tensor, *, backend: str, normalize: bool = True, eps: float = 1e-5, norm_eps: float = 1e-12
) -> Tensor:
    """Do to x what mse_loss(whiten=True) does to each of its inputs before it compares them."""
    if backend == "reference":
        return prepare(*upcast(x), normalize=normalize, norm_eps=norm_eps, whiten_eps=eps)
    options = standardize_triton.Standardization(normalize, eps, norm_eps, acc_dtype(x))
    return ops_standardize.standardize(x, options, backend)


def standardize_scales(
    x: Tensor, grad_output: Tensor, *, normalize: bool = True, eps: float = 1e-5, norm_eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Return the units. The value (z - mean) / (s + eps) has two errors: that of z - mean, and that of s times the
    value.

    The first is a rounding of |z| and of its column's size. The gradient adds g, mean(g), and (z - mean) / s times the
    sum of g (z - mean) / s. A product has the errors of its factors. The gradient of a normalised row is divided by its
    norm, and each element has an error of the whole row.
    """
    z, g = x.double(), grad_output.double().abs()
    norm = z.norm(dim=-1, keepdim=True).clamp(norm_eps, 1e154)
    z = F.normalize(z, dim=-1, eps=norm_eps) if normalize else z
    deviation, sigma = (z - z.mean(0)).abs(), z.std(0)
    rounding = (z.abs() + z.square().mean(0).sqrt()) / (sigma + eps)
    sigma_rounding = rounding.square().mean(0).sqrt()
    value = rounding + deviation / (sigma + eps) * sigma_rounding
    scaled = torch.where(sigma == 0, 0, deviation / sigma)
    projection = (scaled * (g * rounding).sum(0) + rounding * (g * scaled).sum(0)) / (len(z) - 1)
    gradient = ((g + g.mean(0)) * (1 + sigma_rounding) + projection) / (sigma + eps)
    return value, gradient.norm(dim=-1, keepdim=True) / norm if normalize else gradient


AS_THEY_ARE = {"normalize": False}

STANDARDIZE = Op(
    "standardize",
    standardize,
    (
        Case((5, 37), "no power of two: masked tails"),
        Case((2, 24), "two rows, the fewest: every column is 1 and -1"),
        Case((6, 1), "one column: of rows of length one, constant but for the sign"),
        Case((3, 1300), "wider than any block: the loop over columns"),
        Case((530, 5), "more than one run of rows"),
        Case((5, 37), "rows as they are", AS_THEY_ARE),
        Case((530, 5), "rows as they are, in more than one run", AS_THEY_ARE),
        Case((6, 20), "an eps that counts", {"eps": 0.5, **AS_THEY_ARE}),
        Case((6, 20), "a norm_eps above some norms and below others", {"norm_eps": 4.5}),
    ),
    scales=standardize_scales,
    forward=standardize_triton.standardize_fwd.overload,
    backward=standardize_triton.standardize_bwd.overload,
    forward_arguments=lambda x: (x, None, None, True, 1e-5, 1e-12, acc_dtype(x)),
    backward_arguments=lambda x, out, *saved: (
        *(torch.ones_like(out), x, None, None, out, *saved),
        *(True, 1e-5, 1e-12, acc_dtype(x)),
    ),
    inputs=("x",),
    shape=lambda rows, width: (max(rows, 2), width),
    part_of="mse_loss",
)
