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
    """What mse_loss(whiten=True) does to each of its inputs before it compares them."""
    if backend == "reference":
        return prepare(*upcast(x), normalize=normalize, norm_eps=norm_eps, whiten_eps=eps)
    options = standardize_triton.Standardization(normalize, eps, norm_eps, acc_dtype(x))
    return ops_standardize.standardize(x, options, backend)


def standardize_scales(
    x: Tensor, grad_output: Tensor, *, normalize: bool = True, eps: float = 1e-5, norm_eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """With r the rounding of z - mean, |z| and the column's size, over what it is divided by: of y = (z - mean) /
    (s + eps) that r, and by as much as s is rounded y itself; of its gradient g, mean(g) and the product of
    (z - mean) / s with the sum of g y, each rounded so. Along a row of length one all of the row comes in."""
    z = x.double()
    norm = z.norm(dim=-1, keepdim=True).clamp(norm_eps, 1e154) if normalize else torch.ones_like(z[:, :1])
    z, dof, g = F.normalize(z, dim=-1, eps=norm_eps) if normalize else z, len(z) - 1, grad_output.double().abs()
    away, sigma = (z - z.mean(0)).abs(), z.std(0)
    rounding = (z.abs() + z.square().mean(0).sqrt()) / (sigma + eps)
    value = rounding + away / (sigma + eps) * rounding.square().mean(0).sqrt()
    size = torch.where(sigma == 0, 0, away / sigma)
    along = (size * (g * rounding).sum(0) + rounding * (g * size).sum(0)) / dof
    gradient = ((g + g.mean(0)) * (1 + rounding.square().mean(0).sqrt()) + along) / (sigma + eps)
    if normalize:
        gradient = gradient.norm(dim=-1, keepdim=True) / norm
    return value, gradient


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
    forward_arguments=lambda x: (x, True, 1e-5, 1e-12, acc_dtype(x)),
    backward_arguments=lambda x, *made: (torch.ones_like(made[0]), x, *made, True, 1e-5, 1e-12, acc_dtype(x)),
    inputs=("x",),
    shape=lambda rows, width: (max(rows, 2), width),
    part_of="mse_loss",
)
