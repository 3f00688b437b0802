"""The term of regions: a latent read as a map and pooled, and each region's target among the teacher's patch tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..features import Features, Grid, grid_of
from ..live import dtype_of, reach
from ..reference.dtypes import upcast, without_autocast
from ..validation import check_choice, check_int, check_size, is_int, plain_int
from .base import Alignment, Parts, stand_in
from .grids import Regrid, average, product, regrid
from .projector import Projector

LOCAL_HIDDEN_DIM = 256  # of the projector of regions
PATCH_TARGETS = ("region", "mean", "nearest", "attention")


class RegionTerm(Alignment):
    r"""Aligns regions of a latent, read as a map, with regions of the teacher's patch tokens.

    .. math:: \operatorname{mean}_k L(P(z_k), g_k)

    with the regions :math:`z_k` of the map, pooled by averages, and a target :math:`g_k` of each.

    Args:
        latent_shape (sequence of three ints): Channels, rows and columns of the map. Default: (4, 32, 32).
        grid (sequence of two ints): Rows and columns of regions. Default: (2, 2).
        target (str): Target of a region: ``"region"`` is the mean of the teacher's tokens in the region, ``"mean"``
            that of all tokens, and ``"nearest"`` the most similar token. ``"attention"`` is a mean by learnt queries,
            which may collapse onto tokens that are easy to match. Default: ``"region"``.
        projector (nn.Module, optional): A module [B, K, C] -> [B, K, D]. Default: ``Projector(C, hidden_dim, D)``.
        hidden_dim (int): Hidden width of that projector. Default: 256.
        out_dim (int, optional): As in GlobalTerm, and so are the options that follow.
        loss (str or nn.Module): Loss of rows [B, K, D]. Default: ``"cosine"``.
        eps (float, optional): Default: the loss's own.
        weight (float): Default: 1.
        normalize_weight (bool): Default: ``True``.
        backend (str, optional): Default: see ``use_backend``.
        layer (int or sequence of ints, optional): Default: the last features.
        teacher (str, optional): Default: the one without a name.

    Shape:
        - student: :math:`(B, C h w)` or a map :math:`(B, C, h, w)`
        - weight, of a call: :math:`(B)`, or :math:`(B, K)` for regions in row-major order
        - Output: a scalar, and the logs value, and is_global where the teacher gives no patch tokens

    Raises:
        ValueError: If an argument is out of range. The message names it.
        TypeError: If an argument is of a wrong type.

    Example:
        >>> term = RegionTerm((4, 8, 8), out_dim=6)
        >>> features = {"global": torch.randn(2, 6), "patch": torch.randn(2, 16, 6), "grid": (4, 4)}
        >>> loss, logs = term(torch.randn(2, 256), features)
        >>> list(logs)
        ['value']
    """

    needs = frozenset({"patch"})
    queries: nn.Parameter | None

    def __init__(
        self,
        latent_shape: Sequence[int] = (4, 32, 32),
        *,
        grid: Sequence[int] = (2, 2),
        target: str = "region",
        projector: nn.Module | None = None,
        hidden_dim: int = LOCAL_HIDDEN_DIM,
        out_dim: int | None = None,
        loss: str | nn.Module = "cosine",
        eps: float | None = None,
        weight: float = 1.0,
        normalize_weight: bool = True,
        backend: str | None = None,
        layer: int | Sequence[int] | None = None,
        teacher: str | None = None,
    ) -> None:
        super().__init__(
            projector,
            out_dim=out_dim,
            loss=loss,
            eps=eps,
            weight=weight,
            normalize_weight=normalize_weight,
            backend=backend,
            layer=layer,
            teacher=teacher,
        )
        self.latent_shape = check_latent_shape(latent_shape, None)
        self.patches = Patches(
            check_choice("target", target, PATCH_TARGETS), self.latent_shape, check_size(grid, "grid")
        )
        self.hidden_dim = check_int("hidden_dim", hidden_dim)
        self.queries = None
        if self.out_dim is not None:
            self.build(self.out_dim)

    def build(self, width: int) -> None:
        """Make the projector, unless a module was given, and the queries of the target "attention"."""
        if self.projector is None:
            self.projector = Projector(self.latent_shape[0], self.hidden_dim, width)
        if self.patches.target == "attention" and self.queries is None:
            self.queries = make_queries(self.patches.count, width)

    def parts(self) -> Parts:
        return super().parts()._replace(grids=self.patches, queries=self.queries)

    def check(  # type: ignore[override]
        self, name: str, student: Any, batch: int, *, weight: Any = None
    ) -> None:
        """Check the maps and the weights [B] or [B, K]."""
        super().check(name, student, batch)
        flat = math.prod(self.latent_shape)
        shapes = ((batch, flat), (batch, *self.latent_shape))
        if tuple(student.shape) not in shapes or not student.is_floating_point():
            raise ValueError(
                f"{name} must be floats of shape [B, {flat}] or {['B', *self.latent_shape]}, got {student.dtype} of "
                f"{list(student.shape)}"
            )
        self.check_weight(weight, (batch, self.patches.count))

    def check_target(self, name: str, target: Features, student: Any, **options: Any) -> None:
        """Check that the grid of a target is known where its tokens are pooled by where they lie."""
        if self.patches.target == "region" and target.get("grid") is None:
            raise ValueError(
                f"{name} must say its grid, as a map [B, D, h, w] or by 'grid', since each region pools its own tokens"
            )

    def align(
        self, parts: Parts, student: Tensor, features: Features, weight: Tensor | None = None, *, scale: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute what forward does, with other parts."""
        features = self.choose(features)
        student = student.to(dtype_of(parts.projector) or student.dtype).flatten(1)
        student, tokens = parts.projector(parts.grids(student)), features.get("patch")
        if tokens is not None:
            grid = grid_of(features) if parts.grids.target == "region" else None
            target = parts.grids.targets(tokens, student, parts.queries, grid)
            return self.compare(parts, student, target, weight, scale)
        if parts.queries is not None:
            student = student + reach(parts.queries).to(student.dtype)
        loss, logs = self.compare(parts, student, stand_in(features, student.shape[1]), weight, scale)
        return loss, {**logs, "is_global": student.new_ones(())}


def make_queries(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(count, width))


def check_latent_shape(latent_shape: Any, in_dim: int | None) -> tuple[int, ...]:
    """Check the shape and return it as a tuple. in_dim: the number of elements that it must have, or None."""
    shape = tuple(latent_shape) if isinstance(latent_shape, Sequence) else ()
    if len(shape) != 3 or not all(map(is_int, shape)):
        raise ValueError(f"latent_shape must be three positive ints (C, h, w), got {latent_shape!r}")
    shape = tuple(map(plain_int, shape))
    if in_dim is not None and math.prod(shape) != in_dim:
        sides = [side for side in range(math.isqrt(in_dim), 1, -1) if in_dim % side**2 == 0]
        fitting = ", ".join(f"({in_dim // side**2}, {side}, {side})" for side in sides) or f"({in_dim}, 1, 1)"
        raise ValueError(
            f"latent_shape {shape} has {math.prod(shape)} elements and in_dim is {in_dim}; "
            f"square maps that fit: {fitting}"
        )
    return shape


class Patches(nn.Module):
    """Pools z_text, read as a map [B, C, h, w], to K regions, and makes their targets [B, K, D].

    The target of region k is made from the teacher's tokens t_n of the same image:

        region     the mean of the tokens that lie in it
        mean       the mean of all tokens
        nearest    the token with the largest cosine to the student's region; no gradient flows through the choice
        attention  sum_n softmax_n(<q_k, t_n> / sqrt(D)) t_n, with learnt queries q [K, D]

    With "attention" the loss moves queries and student towards each other, and regions may collapse onto tokens that
    are easy to match. All targets but "region" ignore where a token lies.
    """

    def __init__(
        self, target: str, latent_shape: tuple[int, ...], onto: Grid, teacher_grid: Grid | None = None
    ) -> None:
        super().__init__()
        self.target = target
        self.onto = onto
        self.count = onto[0] * onto[1]
        self.pool = Regrid(average, (latent_shape[1], latent_shape[2]), onto)
        self.teacher_grid = teacher_grid
        known = target == "region" and teacher_grid is not None
        self.pool_teacher = Regrid(average, teacher_grid, onto) if known else None  # type: ignore[arg-type]
        self.channels = latent_shape[0]

    def forward(self, z_text: Tensor) -> Tensor:
        """Return the student's regions [B, K, C]."""
        return self.pool(rearrange(z_text, "b (c n) -> b n c", c=self.channels))

    def targets(self, tokens: Tensor, student: Tensor, queries: Tensor | None, grid: Grid | None = None) -> Tensor:
        """Return the targets [B, K, D] of tokens [B, N, D], student [B, K, D], and queries [K, D] for "attention".

        grid: of the tokens. Default: the teacher's.
        """
        if self.target == "region":
            if self.pool_teacher is not None and grid in (None, self.teacher_grid):
                return self.pool_teacher(tokens)
            weights = (average(size, to, tokens.device) for size, to in zip(grid or (), self.onto, strict=True))
            return regrid(tokens, *weights)
        if queries is not None:
            return attend(queries, tokens)
        if self.target == "nearest":
            return nearest(student, tokens)
        return tokens.mean(1, keepdim=True).expand(-1, self.count, -1)


@torch.no_grad()
def most_similar(student: Tensor, tokens: Tensor) -> Tensor:
    """Return for each student row [B, K, D] the index of the most similar token of [B, N, D], the first of equals."""
    with without_autocast(tokens):
        s, t = (F.normalize(x, dim=-1) for x in upcast(student, tokens))
        return (s @ t.mT).argmax(-1)


def nearest(student: Tensor, tokens: Tensor) -> Tensor:
    """Return for each student row its most similar token, [B, K, D]."""
    # The gradient of an index adds in a fixed order; that of gather adds with atomics.
    rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    return tokens[rows, most_similar(student, tokens)]


def attend(queries: Tensor, tokens: Tensor) -> Tensor:
    """Return each query's weighted mean of an image's tokens, in float32 (float64 if an input is)."""
    scores = product(queries, tokens.mT) / tokens.shape[-1] ** 0.5
    return product(scores.softmax(-1), tokens)
