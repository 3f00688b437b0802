"""The projectors of tokens: one layer of each token, or a convolution over their grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ..features import Grid
from ..validation import check_choice, check_int

TOKEN_HIDDEN_DIM = 2048
PROJECTORS = ("mlp", "conv")


class TokenMLP(nn.Sequential):
    """REPA's projector (arXiv 2410.06940): Linear, SiLU, Linear, SiLU, Linear of each token. width: inside."""

    def __init__(self, in_dim: int, out_dim: int, width: int = TOKEN_HIDDEN_DIM) -> None:
        super().__init__(
            nn.Linear(in_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out_dim)
        )


class TokenConv(nn.Conv2d):
    """A convolution over the grid of the tokens, padded by zeros: [B, N, C] -> [B, N, D]. kernel: its odd side."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int = 3) -> None:
        if check_int("kernel", kernel) % 2 == 0:
            raise ValueError(f"kernel must be odd, so that the grid keeps its size, got {kernel}")
        super().__init__(in_dim, out_dim, kernel, padding=kernel // 2)

    def forward(self, input: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        maps = rearrange(input, "b (h w) c -> b c h w", h=grid[0])
        return rearrange(super().forward(maps), "b d h w -> b (h w) d")


def check_projector(name: str, projector: Any) -> str | None:
    """Return the kind of a projector: "mlp", "conv" (a TokenConv, too), or None for any other module."""
    if isinstance(projector, nn.Module):
        return "conv" if isinstance(projector, TokenConv) else None
    if not isinstance(projector, str):
        raise TypeError(f"{name} must be 'mlp', 'conv' or a module, got {type(projector).__name__}")
    return check_choice(name, projector, PROJECTORS)


def make_projector(kind: str | None, in_dim: int, width: int) -> nn.Module:
    return TokenConv(in_dim, width) if kind == "conv" else TokenMLP(in_dim, width)


def check_projectors(in_dim: Any, projector: Any) -> tuple[Any, str | None, nn.Module | None]:
    """Return a student's width or widths, the kind of the projectors, and the given modules."""
    if not isinstance(in_dim, Sequence) or isinstance(in_dim, (str, bytes)):
        kind = check_projector("projector", projector)
        return check_int("in_dim", in_dim), kind, projector if isinstance(projector, nn.Module) else None
    dims = tuple(check_int("in_dim", dim) for dim in in_dim)
    if not dims:
        raise ValueError(f"in_dim must be a positive int or a sequence of at least one, got {in_dim!r}")
    if isinstance(projector, str):
        return dims, check_projector("projector", projector), None
    several = list(projector) if isinstance(projector, (Sequence, nn.ModuleList)) else []
    if len(several) != len(dims) or not all(isinstance(part, nn.Module) for part in several):
        raise TypeError(f"projector must be 'mlp', 'conv' or {len(dims)} modules, one for each of in_dim")
    kinds = {check_projector("projector", part) for part in several}
    if len(kinds) != 1:
        raise ValueError("projector must have convolutions for all of in_dim, or for none")
    return dims, kinds.pop(), nn.ModuleList(several)
