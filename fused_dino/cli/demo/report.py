"""The files that the demo writes: metrics.json, report.html (which loads nothing from elsewhere), overview.png."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CommandError
from .data import Photo
from .learn import Course, Exam, Result, Settings
from .look import patch_colours
from .teacher import Teacher

SHOWN = 12  # photographs in the pictures; the numbers are of all
PHOTO_WIDTH = 480
PACKAGES = ("torch", "triton", "timm", "einops", "numpy", "scikit-image", "scikit-learn")


@dataclass(frozen=True)
class Story:
    """The inputs and results of a finished or interrupted demo."""

    settings: Settings
    teacher: Teacher
    photos: list[Photo]
    exam: Exam
    course: Course
    before: Result
    after: Result
    control: Result


def prepare(folder: Path) -> None:
    """Raise CommandError before the training if `folder` cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CommandError(f"--out: cannot write to {folder}: {error.strerror or error}") from None


def write(story: Story, folder: Path) -> None:
    for name, content in documents(story):
        try:
            (folder / name).write_bytes(content)
        except OSError as error:
            raise CommandError(f"--out: cannot write {folder / name}: {error.strerror or error}") from None


def documents(story: Story) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each file, the numbers first."""
    from . import figures

    facts = metrics(story)
    yield "metrics.json", (json.dumps(facts, indent=2) + "\n").encode()
    shown = story.photos[:SHOWN]
    colours = patch_colours(shown, story.teacher.picture, story.settings.device)
    maps = figures.Maps.of(shown, story.exam, story.before, story.after)
    yield "overview.png", figures.render(figures.overview(maps, colours, story.teacher.title), "png")
    page = template().render(
        facts=facts,
        story=story,
        cards=[card(story, index, colour) for index, colour in enumerate(colours)],
        curve=data_uri(figures.render(figures.loss_curve(story.course, story.settings.loss), "svg"), "image/svg+xml"),
        maps=data_uri(figures.render(figures.similarity_maps(maps), "svg"), "image/svg+xml"),
    )
    yield "report.html", page.encode()


def metrics(story: Story) -> dict[str, Any]:
    course = story.course
    taken = {"before": story.before, "after": story.after, "control": story.control}
    return {
        "config": {"teacher": story.teacher.title, **asdict(story.settings)},
        "versions": versions(),
        "photographs": len(story.photos),
        "steps_done": len(course.losses),
        "interrupted": course.interrupted,
        "seconds": round(course.seconds, 2),
        "top1": {**{name: result.top1 for name, result in taken.items()}, "chance": story.exam.chance},
        "per_photo": [
            {"name": photo.name, **{name: result.per_photo[i] for name, result in taken.items()}}
            for i, photo in enumerate(story.photos)
        ],
        "losses": course.losses,
        "control_losses": course.control_losses,
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def card(story: Story, index: int, colour: Tensor) -> dict[str, Any]:
    """Return the part of the report about one photograph."""
    from PIL import Image

    photo = story.photos[index]
    picture = Image.fromarray(photo.pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((PHOTO_WIDTH, PHOTO_WIDTH))
    patches = Image.fromarray((colour * 255).round().to(torch.uint8).numpy())
    return {
        "photo": photo,
        "picture": image_uri(picture, "JPEG"),
        "patches": image_uri(patches.resize(picture.size, Image.Resampling.BICUBIC), "JPEG"),
        "before": story.before.per_photo[index],
        "after": story.after.per_photo[index],
    }


def image_uri(image: Any, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88)
    return data_uri(buffer.getvalue(), f"image/{kind.lower()}")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def template() -> Any:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.0f}%"
    source = files("fused_dino.cli").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
