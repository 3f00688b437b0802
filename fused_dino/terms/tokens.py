"""The term of tokens: a denoiser's hidden tokens against the teacher's patch tokens, on a grid or at positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..features import Features, Grid, grid_of
from ..live import dtype_of
from ..ops.plain import is_plain
from ..reference.cosine import take_rows
from ..reference.dtypes import acc_dtype
from ..validation import check_choice, check_int, check_positions
from .base import Alignment, Parts, stand_in
from .comparison import accepts
from .token_grids import TokenGrids, check_grid, find_grid, resample

TOKEN_HIDDEN_DIM = 2048
PROJECTORS = ("mlp", "conv")


class TokenTerm(Alignment):
    r"""Aligns hidden tokens with the teacher's patch tokens.

    .. math:: \operatorname{mean}_n L(P(h_n), g_n)

    Both are brought onto one grid first. With ``index`` each token is compared with the position that it names.

    Args:
        in_dim (int): Width C of a token.
        projector (str or nn.Module): ``"mlp"`` (REPA's, arXiv 2410.06940), ``"conv"`` (a 3 x 3 convolution over the
            grid), or a module [B, N, C] -> [B, N, D]. Default: ``"mlp"``.
        token_grid (sequence of two ints, optional): Rows and columns of the tokens, unless a call says them. Default:
            the grid of the images' aspect ratio, else the teacher's, whichever has N positions.
        standardize (bool or float): Brings each channel of the teacher's tokens to mean 0 and deviation 1 over an
            image's positions, with 1e-6 added to the deviation. A number is the share of the mean that is taken away
            (iREPA: 0.6). Default: ``False``.
        unbiased (bool): Divides that variance by N - 1, as iREPA does. Default: ``False``.
        compare (str): Grid on which tokens of different grids meet: the ``"larger"`` in rows and in columns, the
            ``"smaller"`` or the ``"teacher"``'s. Default: ``"larger"``.
        out_dim (int, optional): As in GlobalTerm, and so are the options that follow.
        loss (str or nn.Module): Loss of rows [B, N, D]. Default: ``"cosine"``.
        eps (float, optional): Default: the loss's own.
        weight (float): Default: 1.
        normalize_weight (bool): Default: ``True``.
        backend (str, optional): Default: see ``use_backend``.
        layer (int or sequence of ints, optional): Default: the last features.

    Shape:
        - student: tokens :math:`(B, N, C)`, a map :math:`(B, C, h, w)`, or frames :math:`(B, T, N, C)` of
          :math:`B T` images
        - weight, of a call: :math:`(B)`, or :math:`(B, N)` of the student's tokens; frames count as images
        - index, of a call: integers :math:`(B, N)`, positions on ``token_grid``, else on the teacher's grid
        - Output: a scalar, and the logs value, and is_global where the teacher gives no patch tokens

    Raises:
        ValueError: If an argument is out of range. The message names it.
        TypeError: If an argument is of a wrong type.

    Example:
        >>> term = TokenTerm(12, out_dim=6)
        >>> features = {"global": torch.randn(2, 6), "patch": torch.randn(2, 16, 6), "grid": (4, 4)}
        >>> visible = torch.tensor([[0, 3, 7], [2, 5, 15]])
        >>> loss, logs = term(torch.randn(2, 3, 12), features, index=visible)
    """

    needs = frozenset({"patch"})

    def __init__(
        self,
        in_dim: int,
        *,
        projector: str | nn.Module = "mlp",
        token_grid: Sequence[int] | None = None,
        standardize: bool | float = False,
        unbiased: bool = False,
        compare: str = "larger",
        out_dim: int | None = None,
        loss: str | nn.Module = "cosine",
        eps: float | None = None,
        weight: float = 1.0,
        normalize_weight: bool = True,
        backend: str | None = None,
        layer: int | Sequence[int] | None = None,
    ) -> None:
        given = projector if isinstance(projector, nn.Module) else None
        super().__init__(
            given,
            out_dim=out_dim,
            loss=loss,
            eps=eps,
            weight=weight,
            normalize_weight=normalize_weight,
            backend=backend,
            layer=layer,
        )
        self.in_dim = check_int("in_dim", in_dim)
        self.kind = check_projector("projector", projector)
        self.grids = TokenGrids(token_grid, None, standardize, unbiased, compare)
        if self.out_dim is not None:
            self.build(self.out_dim)

    def build(self, width: int) -> None:
        """Make the projector, unless a module was given."""
        if self.projector is None:
            self.projector = TokenMLP(self.in_dim, width) if self.kind == "mlp" else TokenConv(self.in_dim, width)

    def parts(self) -> Parts:
        return super().parts()._replace(grids=self.grids)

    def check(  # type: ignore[override]
        self, name: str, student: Any, batch: int, *, weight: Any = None, index: Any = None, token_grid: Any = None
    ) -> None:
        """Check the tokens, their weights [B] or [B, N] and their positions [B, N]."""
        tokens, grid = as_tokens(name, student, self.in_dim, batch)
        self.check_weight(weight, tuple(tokens.shape[:2]))
        if token_grid is not None:
            told = check_grid(token_grid)
            if grid not in (None, told):
                raise ValueError(f"token_grid is {token_grid} and {name} is a map of {grid}; leave it out")
            if index is None:
                find_grid(tokens.shape[1], told, None)
        if index is not None:
            self.check_index(index, list(tokens.shape[:2]))

    def check_index(self, index: Any, rows: list[int]) -> None:
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index must be an int32 or int64 tensor of the tokens' positions {rows}, got {got}")
        if list(index.shape) != rows:
            raise ValueError(f"index must have a position for each of the tokens {rows}, got shape {list(index.shape)}")
        if self.kind == "conv":
            raise ValueError("index must be left out with a convolution, which needs every token of the grid")

    def forward(
        self,
        student: Tensor,
        features: Features,
        weight: Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        index: Tensor | None = None,
        token_grid: Sequence[int] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, times scale where that is given, and its logs. See Term."""
        return self.align(self.parts(), student, features, weight, scale=scale, index=index, token_grid=token_grid)

    def align(
        self,
        parts: Parts,
        student: Tensor,
        features: Features,
        weight: Tensor | None = None,
        *,
        scale: Any = None,
        index: Tensor | None = None,
        token_grid: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Do what forward does with other parts."""
        features = self.choose(features)
        tokens, grid = as_tokens("student", student, self.in_dim, len(features["global"]))
        told = grid or (parts.grids.token_grid if token_grid is None else check_grid(token_grid))
        patch, width = features.get("patch"), features["global"].shape[1]
        if patch is None:
            if self.kind == "conv":
                grid = find_grid(tokens.shape[1], told, features.get("grid"), features.get("image_size"))
            projected = self.project(parts, tokens, grid, width)
            loss, logs = self.compare(parts, projected, stand_in(features, tokens.shape[1]), weight, scale)
            return loss, {**logs, "is_global": projected.new_ones(())}
        teacher_grid = grid_of(features)
        if index is not None:
            patch = parts.grids.prepare(patch)
            patch = patch if told is None else resample(patch, teacher_grid, told)
            patch, positions = (patch, index) if accepts(parts.loss, "index") else (take(patch, index, weight), None)
            return self.compare(parts, self.project(parts, tokens, None, width), patch, weight, scale, index=positions)
        grid = find_grid(tokens.shape[1], told, teacher_grid, features.get("image_size"))
        projected = parts.grids.student(self.project(parts, tokens, grid, width), grid, teacher_grid)
        if weight is not None and weight.ndim == 2:
            rows = weight.unsqueeze(2).to(acc_dtype(projected))
            weight = parts.grids.student(rows, grid, teacher_grid).squeeze(2)
        return self.compare(parts, projected, parts.grids.teacher(patch, grid, teacher_grid), weight, scale)

    def project(self, parts: Parts, tokens: Tensor, grid: Grid | None, width: int) -> Tensor:
        """Project tokens [B, N, C] in the projector's dtype to [B, N, width]. Another shape raises ValueError."""
        tokens = tokens.to(dtype_of(parts.projector) or tokens.dtype)
        projected = parts.projector(tokens, grid) if self.kind == "conv" else parts.projector(tokens)
        expected = [*tokens.shape[:2], width]
        if not isinstance(projected, Tensor) or list(projected.shape) != expected:
            got = list(projected.shape) if isinstance(projected, Tensor) else type(projected).__name__
            raise ValueError(f"{self.projector_name} must make {expected} of tokens {list(tokens.shape)}, got {got}")
        return projected


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
    """Return the kind of a projector: None for a module, unless that is a convolution, which is told the grid."""
    if isinstance(projector, nn.Module):
        return "conv" if isinstance(projector, TokenConv) else None
    if not isinstance(projector, str):
        raise TypeError(f"{name} must be 'mlp', 'conv' or a module, got {type(projector).__name__}")
    return check_choice(name, projector, PROJECTORS)


def take(patch: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """Return the patch tokens at positions [B, M], for a loss that cannot read them there; NaN for one that is none."""
    weight = weight if weight is None else weight.reshape(len(weight), -1).expand(index.shape)
    if index.is_cpu and is_plain((index, weight)):  # as the op that reads them checks them
        check_positions(index, patch, weight)
    return take_rows(patch, index)


def as_tokens(name: str, x: Any, dim: int, batch: int) -> tuple[Tensor, Grid | None]:
    """Return a student's tokens as [B, N, C], and the grid of a map. Another shape raises ValueError."""
    expected = f"{name} must be floats of shape [B, N, {dim}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{expected}, got {type(x).__name__}")
    shape = tuple(x.shape)
    if not x.is_floating_point() or len(shape) not in (3, 4):
        raise ValueError(f"{expected}, got {x.dtype} of {list(shape)}")
    if len(shape) == 3 and shape[2] == dim:
        if shape[0] != batch:
            raise ValueError(f"{name} must have the images' batch size {batch}, got shape {list(shape)}")
        return x, None
    if len(shape) == 4 and shape[3] == dim and shape[0] * shape[1] == batch:
        return x.flatten(0, 1), None
    if len(shape) == 4 and shape[1] == dim and shape[0] == batch:
        return rearrange(x, "b c h w -> b (h w) c"), (shape[2], shape[3])
    raise ValueError(
        f"{expected}, a map [B, {dim}, h, w] or frames [B, T, N, {dim}] of {batch} images, got {x.dtype} of "
        f"{list(shape)}"
    )
