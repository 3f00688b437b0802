"""The term of tokens: a denoiser's hidden tokens against the teacher's patch tokens, on a grid or at positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..features import Features, Grid
from ..live import dtype_of
from ..ops.plain import is_plain
from ..reference.cosine import take_rows
from ..validation import check_flag, check_positions
from .base import Alignment, Parts, stand_in
from .comparison import accepts
from .masks import blank, bring_rows
from .students import as_tokens
from .token_grids import TokenGrids, check_grid, find_grid, grid_of_target
from .token_projectors import check_projectors, make_projector


class TokenTerm(Alignment):
    r"""Aligns hidden tokens with the teacher's patch tokens.

    .. math:: \operatorname{mean}_n L(P(h_n), g_n)

    Both are brought onto one grid first. With ``index`` each token is compared with the position that it names.

    Args:
        in_dim (int or sequence of ints): Width C of a token. Several are the widths of several layers of the student:
            then it is a list of tensors, each has its own projector, ``projector.<n>``, and the loss is the mean.
        projector (str, nn.Module or sequence of modules): ``"mlp"`` (REPA's, arXiv 2410.06940), ``"conv"`` (a 3 x 3
            convolution over the grid), or a module [B, N, C] -> [B, N, D], for several layers one each. Default:
            ``"mlp"``.
        token_grid (sequence of two ints, optional): Rows and columns of the tokens, unless a call says them. Default:
            the grid of the images' aspect ratio, else the teacher's, whichever has N positions.
        standardize (bool or float): Brings each channel of the teacher's tokens to mean 0 and deviation 1 over an
            image's positions, with 1e-6 added to the deviation. A number is the share of the mean that is taken away
            (iREPA: 0.6). Default: ``False``.
        unbiased (bool): Divides that variance by N - 1, as iREPA does. Default: ``False``.
        compare (str): Grid on which tokens of different grids meet: the ``"larger"`` in rows and in columns, the
            ``"smaller"`` or the ``"teacher"``'s. Default: ``"larger"``.
        class_token (bool): Takes the student's first token for its class token, which is compared with the teacher's
            global token, as one more token in the mean, as REG does (arXiv 2507.01467). Default: ``False``.
        out_dim (int, optional): As in GlobalTerm, and so are the options that follow.
        loss (str or nn.Module): Loss of rows [B, N, D]. Default: ``"cosine"``.
        eps (float, optional): Default: the loss's own.
        weight (float): Default: 1.
        normalize_weight (bool): Default: ``True``.
        backend (str, optional): Default: see ``use_backend``.
        layer (int or sequence of ints, optional): Default: the last features.
        teacher (str, optional): Default: the one without a name.

    Shape:
        - student: tokens :math:`(B, N, C)`, a map :math:`(B, C, h, w)`, or frames :math:`(B, T, N, C)` of
          :math:`B T` images; with ``class_token`` 1 + N tokens; with several ``in_dim`` a list of those
        - weight, of a call: :math:`(B)`, or :math:`(B, N)` of the student's tokens; frames count as images
        - index, of a call: integers :math:`(B, N)`, positions on ``token_grid``, else on the teacher's grid; of the N
          tokens after a class token
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
        in_dim: int | Sequence[int],
        *,
        projector: str | nn.Module | Sequence[nn.Module] = "mlp",
        token_grid: Sequence[int] | None = None,
        standardize: bool | float = False,
        unbiased: bool = False,
        compare: str = "larger",
        class_token: bool = False,
        out_dim: int | None = None,
        loss: str | nn.Module = "cosine",
        eps: float | None = None,
        weight: float = 1.0,
        normalize_weight: bool = True,
        backend: str | None = None,
        layer: int | Sequence[int] | None = None,
        teacher: str | None = None,
    ) -> None:
        dims, kind, given = check_projectors(in_dim, projector)
        super().__init__(
            given,
            out_dim=out_dim,
            loss=loss,
            eps=eps,
            weight=weight,
            normalize_weight=normalize_weight,
            backend=backend,
            layer=layer,
            teacher=teacher,
        )
        self.in_dim, self.kind = dims, kind
        self.class_token = check_flag("class_token", class_token)
        if class_token and kind == "conv":
            raise ValueError("class_token needs a projector of single tokens, and a convolution takes a grid")
        if class_token and not self.layers:
            self.needs = frozenset({"global", "patch"})
        self.grids = TokenGrids(token_grid, None, standardize, unbiased, compare)
        if self.out_dim is not None:
            self.build(self.out_dim)

    def build(self, width: int) -> None:
        """Make the projector, unless a module was given."""
        if self.projector is None and isinstance(self.in_dim, tuple):
            self.projector = nn.ModuleList(make_projector(self.kind, dim, width) for dim in self.in_dim)
        elif self.projector is None:
            self.projector = make_projector(self.kind, self.in_dim, width)

    def parts(self) -> Parts:
        return super().parts()._replace(grids=self.grids)

    def check(  # type: ignore[override]
        self, name: str, student: Any, batch: int, *, weight: Any = None, index: Any = None, token_grid: Any = None
    ) -> None:
        """Check the tokens, their weights [B] or [B, N] and their positions [B, N]."""
        for each, its, dim in self.each(name, student):
            tokens, grid = self.tokens(each, its, dim, batch)
            self.check_weight(weight, tuple(tokens.shape[:2]))
            patches = tokens.shape[1] - int(self.class_token)  # a size less a bool does not compile by torch 2.11
            if token_grid is not None:
                told = check_grid(token_grid)
                if grid not in (None, told):
                    raise ValueError(f"token_grid is {token_grid} and {each} is a map of {grid}; leave it out")
                if index is None:
                    find_grid(patches, told, None)
            if index is not None:
                self.check_index(index, [len(tokens), patches])

    def check_target(  # type: ignore[override]
        self,
        name: str,
        target: Features,
        student: Any,
        *,
        weight: Any = None,
        index: Any = None,
        token_grid: Any = None,
    ) -> None:
        """Check that the grids of the tokens and of a target of the call are known."""
        for _, its, dim in self.each("student", student):
            tokens, grid = self.tokens("student", its, dim, len(target["patch"]))  # type: ignore[arg-type]
            self.places(self.grids, tokens, grid, target, index, token_grid, name)

    def places(
        self, grids: Any, tokens: Tensor, grid: Grid | None, features: Features, index: Any, token_grid: Any, name: str
    ) -> tuple[Grid, Grid]:
        """Return the grid of the student's tokens, or with index the one of their positions, and that of the target.

        grid: of a student that is a map; name: of the target, for errors.
        """
        patch: Any = features["patch"]
        count, several = tokens.shape[1] - int(self.class_token), patch.shape[1]
        told = grid or grids.told(token_grid)
        row_by_row = index is not None or (several == count and self.kind != "conv")
        its = features.get("grid") or grid_of_target(name, several, told, row_by_row)
        return (told or its) if index is not None else find_grid(count, told, its, features.get("image_size")), its

    def each(self, name: str, student: Any) -> list[tuple[str, Any, int]]:
        """Return (name, tensor, width) of each layer of the student."""
        if not isinstance(self.in_dim, tuple):
            return [(name, student, self.in_dim)]
        if not isinstance(student, (list, tuple)) or len(student) != len(self.in_dim):
            got = f"{len(student)} of them" if isinstance(student, (list, tuple)) else type(student).__name__
            raise TypeError(f"{name} must be a list of {len(self.in_dim)} tensors, one for each of in_dim, got {got}")
        return [(f"{name}[{n}]", *x) for n, x in enumerate(zip(student, self.in_dim, strict=True))]

    def tokens(self, name: str, x: Any, dim: int, batch: int) -> tuple[Tensor, Grid | None]:
        """Return a student's tokens as as_tokens does. A map has no class token."""
        tokens, grid = as_tokens(name, x, dim, batch)
        if self.class_token and (grid is not None or tokens.shape[1] < 2):
            raise ValueError(f"{name} must be tokens [B, 1 + N, {dim}], the class token first, got {list(x.shape)}")
        return tokens, grid

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
        """Compute what forward does, with other parts."""
        options: dict[str, Any] = {"index": index, "token_grid": token_grid, "targets": {}}
        features = self.choose(features)
        if not isinstance(self.in_dim, tuple):
            return self.align_layer(parts, student, self.in_dim, features, weight, scale=scale, **options)
        share = (1 if scale is None else scale) / len(self.in_dim)
        losses, several = [], []
        projectors: Any = parts.projector
        for projector, (_, its, dim) in zip(projectors, self.each("student", student), strict=True):
            own = parts._replace(projector=projector)
            loss, logs = self.align_layer(own, its, dim, features, weight, scale=share, **options)
            losses.append(loss)
            several.append(logs)
        return torch.stack(losses).sum(), {key: torch.stack([logs[key] for logs in several]).mean() for key in logs}

    def align_layer(
        self,
        parts: Parts,
        student: Tensor,
        dim: int,
        features: Features,
        weight: Tensor | None,
        *,
        scale: Any,
        index: Tensor | None,
        token_grid: Any,
        targets: dict[Grid, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scaled loss of one layer of the student, and its logs.

        targets: the teacher's tokens by the grid of the comparison, shared by the layers.
        """
        patch = features.get("patch")
        batch, *_, width = (features["global"] if patch is None else patch).shape
        tokens, grid = self.tokens("student", student, dim, batch)
        tokens = blank(tokens, weight)
        if patch is None:
            if self.kind == "conv":
                told = grid or parts.grids.told(token_grid)
                grid = find_grid(tokens.shape[1], told, features.get("grid"), features.get("image_size"))
            projected = self.project(parts, tokens, grid, width)
            loss, logs = self.compare(parts, projected, stand_in(features, tokens.shape[1]), weight, scale)
            return loss, {**logs, "is_global": projected.new_ones(())}
        place, teacher_grid = self.places(parts.grids, tokens, grid, features, index, token_grid, "the target")
        onto = place if index is not None else parts.grids.meeting(place, teacher_grid)
        if onto not in targets:
            targets[onto] = parts.grids.teacher(patch, onto, teacher_grid)
        target, positions = targets[onto], None
        if index is not None:
            projected = self.project(parts, tokens, None, width)
            if accepts(parts.loss, "index") and not self.class_token:
                positions = index
            else:
                own = weight[:, self.class_token :] if weight is not None and weight.ndim == 2 else weight
                target = take(target, index, own)
        else:
            bring = partial(self.bring, parts, grid=place, teacher_grid=teacher_grid)
            projected, weight = bring_rows(bring, self.project(parts, tokens, place, width), weight)
        if self.class_token:
            target = torch.cat([features["global"].unsqueeze(1).to(target.dtype), target], 1)
        return self.compare(parts, projected, target, weight, scale, index=positions)

    def bring(self, parts: Parts, x: Tensor, *, grid: Grid, teacher_grid: Grid) -> Tensor:
        """Bring tensors on the student's grid to the grid of the comparison. A class token stays as it is."""
        if not self.class_token or parts.grids.meeting(grid, teacher_grid) == grid:
            return parts.grids.student(x, grid, teacher_grid)
        return torch.cat([x[:, :1], parts.grids.student(x[:, 1:], grid, teacher_grid)], 1)

    def project(self, parts: Parts, tokens: Tensor, grid: Grid | None, width: int) -> Tensor:
        """Project tokens [B, N, C] in the projector's dtype to [B, N, width]. Another shape raises ValueError."""
        tokens = tokens.to(dtype_of(parts.projector) or tokens.dtype)
        projected = parts.projector(tokens, grid) if self.kind == "conv" else parts.projector(tokens)
        expected = [*tokens.shape[:2], width]
        if not isinstance(projected, Tensor) or list(projected.shape) != expected:
            got = list(projected.shape) if isinstance(projected, Tensor) else type(projected).__name__
            raise ValueError(f"{self.projector_name} must make {expected} of tokens {list(tokens.shape)}, got {got}")
        return projected


def take(patch: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """Return the patch tokens at positions [B, M], for a loss that cannot read them there; NaN for one that is none."""
    weight = weight if weight is None else weight.reshape(len(weight), -1).expand(index.shape)
    if index.is_cpu and is_plain((index, weight)):  # as the op that reads them checks them
        check_positions(index, patch, weight)
    return take_rows(patch, index)
