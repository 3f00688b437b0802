"""Hidden tokens of a denoiser, projected to the width of the teacher's patch tokens and brought onto one grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..live import dtype_of
from ..reference.dtypes import upcast
from ..validation import check_choice, check_flag, check_size, is_int, plain_int
from .grids import Grid, Regrid, bilinear, regrid

TOKEN_HIDDEN_DIM = 2048
STANDARDIZE_EPS = 1e-6


class TokenMLP(nn.Sequential):
    """REPA's projector (arXiv 2410.06940): Linear, SiLU, Linear, SiLU, Linear of each token, 2048 features inside."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        width = TOKEN_HIDDEN_DIM
        super().__init__(
            nn.Linear(in_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out_dim)
        )


class TokenConv(nn.Conv2d):
    """A 3 x 3 convolution with padding 1 over the grid of the tokens: [B, N, C] -> [B, N, D]."""

    def __init__(self, in_dim: int, out_dim: int, token_grid: Grid | None, teacher_grid: Grid) -> None:
        super().__init__(in_dim, out_dim, 3, padding=1)
        self.grid = partial(find_grid, token_grid=token_grid, teacher_grid=teacher_grid)

    def forward(self, input: Tensor) -> Tensor:
        rows, _ = self.grid(input.shape[1])
        return rearrange(super().forward(rearrange(input, "b (h w) c -> b c h w", h=rows)), "b d h w -> b (h w) d")


class TokenGrids(nn.Module):
    """Brings projected tokens [B, N, D] and the teacher's [B, M, D] onto one grid: the larger in rows and in columns.

    The smaller side is resampled bilinearly (align_corners=False); where one has more rows and the other more columns,
    both are. standardize: the teacher's tokens are first brought to mean 0 and deviation 1 over the positions,

        (t_n - mean_n t) / (std_n t + 1e-6)      per image and channel, std_n the root of the mean square

    token_grid: of the projected tokens, or None: see find_grid.
    """

    def __init__(self, token_grid: Sequence[int] | None, teacher_grid: Grid, standardize: bool) -> None:
        super().__init__()
        self.token_grid = None if token_grid is None else check_grid(token_grid)
        self.teacher_grid = teacher_grid
        self.standardize = standardize
        self.known: Grid = self.token_grid or teacher_grid
        onto = common(self.known, teacher_grid)
        self.resample = Regrid(bilinear, self.known, onto) if onto != self.known else None
        self.resample_teacher = Regrid(bilinear, teacher_grid, onto) if onto != teacher_grid else None

    def forward(self, projected: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as [B, L, D]. Standardised tokens are float32 (float64 for float64)."""
        grid = find_grid(projected.shape[1], self.token_grid, self.teacher_grid)
        tokens = standardize(tokens) if self.standardize else tokens
        if grid != self.known:
            onto = common(grid, self.teacher_grid)
            return resample(projected, grid, onto), resample(tokens, self.teacher_grid, onto)
        return (
            projected if self.resample is None else self.resample(projected),
            tokens if self.resample_teacher is None else self.resample_teacher(tokens),
        )

    def extra_repr(self) -> str:
        return f"token_grid={self.token_grid}, teacher_grid={self.teacher_grid}, standardize={self.standardize}"


def common(grid: Grid, other: Grid) -> Grid:
    """Return the larger rows and the larger columns of two grids."""
    return max(grid[0], other[0]), max(grid[1], other[1])


def resample(tokens: Tensor, grid: Grid, onto: Grid) -> Tensor:
    """Resample as Regrid does, with weights that are computed in this call, on the tokens' device."""
    if grid == onto:
        return tokens
    return regrid(tokens, *(bilinear(size, to, tokens.device) for size, to in zip(grid, onto, strict=True)))


def standardize(tokens: Tensor) -> Tensor:
    """Standardise each channel over the positions. One that is constant, as in an image of one token, becomes 0."""
    (tokens,) = upcast(tokens)
    std, mean = torch.std_mean(tokens, dim=1, correction=0, keepdim=True)
    return (tokens - mean) / (std + STANDARDIZE_EPS)


def find_grid(count: int, token_grid: Grid | None, teacher_grid: Grid) -> Grid:
    """Return token_grid if it is given, else the teacher's if it has as many tokens, else a square."""
    if token_grid is not None:
        if count != token_grid[0] * token_grid[1]:
            raise ValueError(f"tokens must be {token_grid[0]} x {token_grid[1]}, by token_grid, and N is {count}")
        return token_grid
    if count == teacher_grid[0] * teacher_grid[1]:
        return teacher_grid
    side = math.isqrt(count)
    if side < 1 or side * side != count:
        raise ValueError(
            f"token_grid must be given, as (rows, columns): {count} tokens are neither a square nor the teacher's "
            f"{teacher_grid[0]} x {teacher_grid[1]}"
        )
    return side, side


def check_grid(token_grid: Any) -> Grid:
    if is_int(token_grid):
        raise ValueError(f"token_grid must be None or two positive ints (rows, columns), got {token_grid!r}")
    return check_size(token_grid, "token_grid")


def make_token_projector(
    projector: str | nn.Module, in_dim: int, out_dim: int, token_grid: Grid | None, teacher_grid: Grid
) -> nn.Module:
    if isinstance(projector, nn.Module):
        return projector
    if not isinstance(projector, str):
        raise TypeError(f"token_projector must be 'mlp', 'conv' or a module, got {type(projector).__name__}")
    check_choice("token_projector", projector, ("mlp", "conv"))
    if projector == "mlp":
        return TokenMLP(in_dim, out_dim)
    return TokenConv(in_dim, out_dim, token_grid, teacher_grid)


def project(projector: nn.Module, tokens: Tensor, width: int) -> Tensor:
    """Project tokens [B, N, C] in the projector's dtype to [B, N, width]. Another shape raises ValueError."""
    projected = projector(tokens.to(dtype_of(projector) or tokens.dtype))
    expected = [*tokens.shape[:2], width]
    if not isinstance(projected, Tensor) or list(projected.shape) != expected:
        got = list(projected.shape) if isinstance(projected, Tensor) else type(projected).__name__
        raise ValueError(f"token_projector must make {expected} of tokens {list(tokens.shape)}, got {got}")
    return projected


def check_token_dim(token_dim: Any, projector: Any, token_grid: Any, standardize: bool) -> int | None:
    """Check token_dim and the options that need it."""
    check_flag("token_standardize", standardize)
    if token_dim is None:
        if projector != "mlp" or token_grid is not None or standardize:
            raise ValueError("token_dim must be given with token_projector, token_grid or token_standardize, got None")
        return None
    if not is_int(token_dim):
        raise ValueError(f"token_dim must be None or a positive int, got {token_dim!r}")
    return plain_int(token_dim)


def check_tokens(tokens: Any, token_dim: int | None) -> None:
    if tokens is None and token_dim is None:
        return
    if token_dim is None:
        raise ValueError("tokens must be left out: construct with token_dim=C to align tokens [B, N, C]")
    expected = f"floats of shape [B, N, {token_dim}]"
    if tokens is None:
        raise ValueError(f"tokens must be given, {expected}: the module was constructed with token_dim={token_dim}")
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be {expected}, got {type(tokens).__name__}")
    if tokens.ndim != 3 or tokens.shape[2] != token_dim or not tokens.is_floating_point():
        raise ValueError(f"tokens must be {expected}, got {tokens.dtype} of {list(tokens.shape)}")
