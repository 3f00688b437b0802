"""The grids of hidden tokens: their own, and the grid on which they are compared with the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from ..features import Grid
from ..reference.dtypes import upcast
from ..validation import check_choice, check_flag, check_number, check_size, is_int
from .grids import Regrid, bilinear, regrid

STANDARDIZE_EPS = 1e-6
MEETINGS = ("larger", "smaller", "teacher")


class TokenGrids(nn.Module):
    """Brings projected tokens [B, N, D] and the teacher's [B, M, D] onto one grid, bilinearly (align_corners=False).

    compare: the grid of the comparison: in each axis the "larger" or the "smaller", or the "teacher"'s. standardize:
    the teacher's tokens are first standardised over the positions,

        (t_n - alpha mean_n t) / (std_n t + 1e-6)      per image and channel

    where alpha is its number, and unbiased divides the variance by N - 1. token_grid: the grid of the projected tokens,
    or None: see find_grid. teacher_grid: the teacher's grid, if it is known beforehand.
    """

    def __init__(
        self,
        token_grid: Sequence[int] | None,
        teacher_grid: Grid | None,
        standardize: bool | float = False,
        unbiased: bool = False,
        compare: str = "larger",
    ) -> None:
        super().__init__()
        self.token_grid = None if token_grid is None else check_grid(token_grid)
        self.standardize, self.alpha = standardize is not False, check_alpha(standardize)
        self.unbiased = check_flag("unbiased", unbiased)
        if unbiased and not self.standardize:
            raise ValueError("unbiased is of the deviation by which standardize divides; give standardize, too")
        self.compare = check_choice("compare", compare, MEETINGS)
        self.known: Any = None  # (grid, teacher_grid), for which the resampling is made beforehand
        self.resample: Regrid | None = None
        self.resample_teacher: Regrid | None = None
        if teacher_grid is not None:
            grid = self.token_grid or teacher_grid
            self.known, onto = (grid, teacher_grid), self.meeting(grid, teacher_grid)
            self.resample = Regrid(bilinear, grid, onto) if onto != grid else None
            self.resample_teacher = Regrid(bilinear, teacher_grid, onto) if onto != teacher_grid else None

    def meeting(self, grid: Grid, teacher_grid: Grid) -> Grid:
        """Return the grid on which the two are compared."""
        if self.compare == "teacher":
            return teacher_grid
        choose = max if self.compare == "larger" else min
        return choose(grid[0], teacher_grid[0]), choose(grid[1], teacher_grid[1])

    def told(self, token_grid: Any) -> Grid | None:
        """Return the grid that a call says, else the term's own, which may be None."""
        return self.token_grid if token_grid is None else check_grid(token_grid)

    def student(self, x: Tensor, grid: Grid, teacher_grid: Grid) -> Tensor:
        """Bring tensors [B, N, *] on the student's grid to the grid of the comparison."""
        if (grid, teacher_grid) == self.known:
            return x if self.resample is None else self.resample(x)
        return resample(x, grid, self.meeting(grid, teacher_grid))

    def teacher(self, tokens: Tensor, onto: Grid, teacher_grid: Grid) -> Tensor:
        """Bring the teacher's tokens onto a grid. Standardised tokens are float32 (float64 for float64)."""
        tokens = self.prepare(tokens)
        if self.resample_teacher is not None and (onto, teacher_grid) == (self.meeting(*self.known), self.known[1]):
            return self.resample_teacher(tokens)
        return resample(tokens, teacher_grid, onto)

    def prepare(self, tokens: Tensor) -> Tensor:
        return standardize(tokens, self.alpha, self.unbiased) if self.standardize else tokens

    def extra_repr(self) -> str:
        return f"token_grid={self.token_grid}, compare={self.compare}, standardize={self.standardize and self.alpha}"


def resample(tokens: Tensor, grid: Grid, onto: Grid) -> Tensor:
    """Resample as Regrid does, with weights that are computed in this call, on the tokens' device."""
    if grid == onto:
        return tokens
    return regrid(tokens, *(bilinear(size, to, tokens.device) for size, to in zip(grid, onto, strict=True)))


def standardize(tokens: Tensor, alpha: float = 1.0, unbiased: bool = False) -> Tensor:
    """Standardise each channel over the positions. One that is constant becomes 0 with an alpha of 1.

    The deviation of a single position is 0, unbiased or not.
    """
    (tokens,) = upcast(tokens)
    correction = int(unbiased and tokens.shape[1] > 1)
    std, mean = torch.std_mean(tokens, dim=1, correction=correction, keepdim=True)
    return (tokens - alpha * mean) / (std + STANDARDIZE_EPS)


def find_grid(count: int, token_grid: Grid | None, teacher_grid: Grid | None, image_size: Grid | None = None) -> Grid:
    """Return token_grid, else the grid of the images' aspect ratio, else the teacher's: the first that has all tokens.

    The same number of tokens fits several grids. So any other grid has to be given as token_grid.
    """
    if token_grid is not None:
        if count != token_grid[0] * token_grid[1]:
            raise ValueError(f"tokens must be {token_grid[0]} x {token_grid[1]}, by token_grid, and N is {count}")
        return token_grid
    if image_size is not None and (grid := grid_of_aspect(count, *image_size)) is not None:
        return grid
    if teacher_grid is not None and count == teacher_grid[0] * teacher_grid[1]:
        return teacher_grid
    images = "images of unknown size" if image_size is None else f"images of {image_size[0]} x {image_size[1]}"
    teacher = "" if teacher_grid is None else f" and the teacher's grid is {teacher_grid[0]} x {teacher_grid[1]}"
    raise ValueError(
        f"token_grid must be given, as (rows, columns): {count} tokens have no grid of the shape of {images}{teacher}"
    )


def grid_of_target(name: str, count: int, token_grid: Grid | None, row_by_row: bool) -> Grid:
    """Return the grid of a target without one: a grid in token_grid's aspect ratio, or one row if none is needed.

    name: of the target, for errors; row_by_row: whether no grid is needed, since tokens are compared one by one or by
    positions.
    """
    grid = None if token_grid is None else grid_of_aspect(count, *token_grid)
    if grid is None and not (row_by_row and token_grid is None):
        student = "no token_grid is given" if token_grid is None else f"token_grid is {token_grid[0]} x {token_grid[1]}"
        raise ValueError(
            f"{name} must say its grid, as a map [B, D, h, w] or by 'grid': it has {count} tokens, and {student}"
        )
    return grid or (1, count)


def grid_of_aspect(count: int, height: int, width: int) -> Grid | None:
    """Return the grid of `count` positions whose rows are to its columns as height to width, or None."""
    count, height, width = map(index, (count, height, width))  # a compiler makes a program for each grid
    divisor = math.gcd(height, width)
    rows, columns = height // divisor, width // divisor
    times = math.isqrt(count // (rows * columns))
    return (times * rows, times * columns) if times and times**2 * rows * columns == count else None


def check_grid(token_grid: Any) -> Grid:
    if not (isinstance(token_grid, Sequence) and len(token_grid) == 2 and all(map(is_int, token_grid))):
        raise ValueError(f"token_grid must be None or two positive ints (rows, columns), got {token_grid!r}")
    return check_size(token_grid, "token_grid")


def check_alpha(standardize: Any) -> float:
    """Return the share of the mean that is subtracted: 1 for True."""
    if isinstance(standardize, bool):
        return 1.0
    return check_number("standardize", standardize, minimum=0)
