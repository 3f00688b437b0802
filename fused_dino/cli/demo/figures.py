"""The demo's figures, drawn with matplotlib's object interface: no display, no global state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .data import Photo
from .learn import Course, Exam, Result

INK, SOFT, LINE, ACCENT, RIGHT, WRONG = "#1c2430", "#8a94a6", "#e6e9ef", "#2563a8", "#12805c", "#c2412d"
IDEOGRAPHS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "Hiragino Sans", "SimHei")


@dataclass(frozen=True)
class Maps:
    """The similarity of captions and shown photographs, before and after the training."""

    photos: list[Photo]
    captions: list[str]
    owners: list[int]
    before: Result
    after: Result

    @classmethod
    def of(cls, shown: list[Photo], exam: Exam, before: Result, after: Result) -> Maps:
        owners = [owner for owner in exam.owner.tolist() if owner < len(shown)]
        return cls(shown, exam.captions[: len(owners)], owners, before, after)

    @property
    def height(self) -> float:
        return 1.6 + 0.27 * len(self.captions)


def loss_curve(course: Course, loss: str) -> Figure:
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    for values, colour, label in (
        (course.control_losses, SOFT, "control: captions of random photographs"),
        (course.losses, ACCENT, "each photograph's own captions"),
    ):
        marker = "o" if len(values) < 10 else ""
        axes.plot(range(1, len(values) + 1), values, color=colour, lw=1.8, marker=marker, label=label)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(f"{loss} loss", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LINE)
    axes.tick_params(colors=SOFT, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def similarity_maps(maps: Maps) -> Figure:
    figure = Figure(figsize=(11, maps.height), layout="constrained")
    draw_maps(figure, maps)
    return figure


def overview(maps: Maps, colours: list[Tensor] | None, teacher: str) -> Figure:
    """Draw photographs, colours of their patch tokens if there are any, and the similarity, on one sheet."""
    figure = Figure(figsize=(13, 3.1 + maps.height), layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.1, maps.height))
    draw_photographs(parts[0], maps.photos, colours)
    parts[0].suptitle(f"Photographs, and the principal components of {teacher}'s patch tokens", color=INK)
    draw_maps(parts[1], maps)
    return figure


def draw_photographs(figure: Any, photos: list[Photo], colours: list[Tensor] | None) -> None:
    grid = figure.subplots(2, len(photos), squeeze=False)
    patches: Sequence[Tensor | None] = colours or [None] * len(photos)
    for column, photo, colour in zip(grid.T, photos, patches, strict=True):
        height, width = photo.pixels.shape[1:]
        column[0].imshow(photo.pixels.permute(1, 2, 0).numpy(), aspect="auto")
        if colour is not None:
            column[1].imshow(colour.numpy(), aspect="auto", interpolation="bicubic")
        column[0].set_title(label(photo.name, 16), fontsize=10, color=INK)
        for axes in column:
            axes.set_box_aspect(min(1.2, height / width))
            axes.set_axis_off()


def draw_maps(figure: Any, maps: Maps) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    rows, columns = len(maps.captions), len(maps.photos)
    both = torch.stack([result.similarity[:rows, :columns] for result in (maps.before, maps.after)])
    scale = {"cmap": "Blues", "aspect": "auto", "vmin": both.min().item(), "vmax": both.max().item()}
    for axes, result, when in zip(panels, (maps.before, maps.after), ("before", "after"), strict=True):
        image = axes.imshow(result.similarity[:rows, :columns].numpy(), **scale)
        axes.set_title(f"{when} learning: top-1 {result.top1:.2f}", fontsize=12, color=INK, pad=10)
        axes.set_xticks(range(columns), [label(photo.name, 16) for photo in maps.photos], rotation=40, ha="left")
        axes.tick_params(length=0, labelsize=9, labelcolor=INK, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        draw_choices(axes, result.similarity.argmax(1).tolist(), maps)
    panels[0].set_yticks(range(rows), [label(caption, 70) for caption in maps.captions])
    bar = figure.colorbar(image, ax=panels, fraction=0.02, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=SOFT, length=0)


def draw_choices(axes: Any, choices: list[int], maps: Maps) -> None:
    """Draw a ring on each caption's best photograph, and a line between the captions of two photographs."""
    for row, owner in enumerate(maps.owners):
        if choices[row] < len(maps.photos):
            colour = RIGHT if choices[row] == owner else WRONG
            axes.plot(choices[row], row, "o", ms=5, color="white", mec=colour, mew=2)
        if row and owner != maps.owners[row - 1]:
            axes.axhline(row - 0.5, color="white", lw=2)


def label(text: str, width: int) -> str:
    """Return a text of at most `width` characters, its beginning and its end, in which no dollar begins a formula."""
    if len(text) > width:
        end = width // 3
        text = f"{text[: width - 1 - end]}…{text[-end:]}"
    return text.replace("$", r"\$")


def render(figure: Figure, kind: str) -> bytes:
    """Return the figure as "svg" or "png". Ideographs take a font that has them, if one is installed."""
    installed = {font.name for font in fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in IDEOGRAPHS if name in installed)]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.family": family, "svg.hashsalt": "fused_dino"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(
            buffer, format=kind, dpi=110, transparent=kind == "svg", metadata={} if kind == "png" else {"Date": None}
        )
    return buffer.getvalue()
