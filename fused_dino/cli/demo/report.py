"""The files that the demo writes: metrics.json, report.html (which loads nothing from elsewhere), overview.png."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import CommandError
from ..text import printable
from .data import Photo
from .learn import Course, Exam, Result, Settings
from .look import patch_colours
from .teacher import Teacher

if TYPE_CHECKING:
    from PIL.Image import Image

Drawn = TypeVar("Drawn")
ROOM = 4 * 2**20  # bytes: the files take less
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


class Pictures:
    """Draws pictures, and keeps a line about each that failed, since the report matters more."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def attempt(self, what: str, draw: Callable[[], Drawn]) -> Drawn | None:
        try:
            return draw()
        except Exception as error:
            reason = " ".join(str(error).split())
            self.failures.append(printable(f"{what} could not be drawn: {type(error).__name__}: {reason}"))
            return None


def prepare(folder: Path) -> None:
    """Raise CommandError before the training if `folder` cannot be written, or its disk is full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(ROOM))
    except OSError as error:
        raise CommandError(f"--out: cannot write to {folder}: {error.strerror or error}") from None


def write(story: Story, folder: Path, pictures: Pictures) -> list[str]:
    """Write what can be written, each file whole or not at all, and return a line about each that cannot."""
    failures = []
    for name, content in documents(story, pictures):
        path = folder / name
        try:
            path.write_bytes(content)
        except OSError as error:
            failures.append(f"cannot write {path}: {error.strerror or error}")
            with suppress(OSError):
                path.unlink()
    return failures


def documents(story: Story, pictures: Pictures) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each file, the numbers first."""
    facts, shown = metrics(story), story.photos[:SHOWN]
    yield "metrics.json", (json.dumps(facts, indent=2) + "\n").encode()
    colours = pictures.attempt(
        "Patch tokens", lambda: patch_colours(shown, story.teacher.picture, story.settings.device)
    )
    sheet = pictures.attempt("overview.png", lambda: draw_overview(story, shown, colours))
    if sheet is not None:
        yield "overview.png", sheet
    page = template().render(
        facts=facts,
        story=story,
        curve=pictures.attempt("The loss", lambda: draw_losses(story)),
        maps=pictures.attempt("The similarity", lambda: draw_similarity(story, shown)),
        cards=[card(story, i, colours[i] if colours else None, pictures) for i in range(len(shown))],
        failures=pictures.failures,
    )
    yield "report.html", page.encode("utf-8", "backslashreplace")


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


def draw_overview(story: Story, shown: list[Photo], colours: list[Tensor] | None) -> bytes:
    from . import figures

    maps = figures.Maps.of(shown, story.exam, story.before, story.after)
    return figures.render(figures.overview(maps, colours, story.teacher.title), "png")


def draw_losses(story: Story) -> str:
    from . import figures

    return data_uri(figures.render(figures.loss_curve(story.course, story.settings.loss), "svg"), "image/svg+xml")


def draw_similarity(story: Story, shown: list[Photo]) -> str:
    from . import figures

    maps = figures.Maps.of(shown, story.exam, story.before, story.after)
    return data_uri(figures.render(figures.similarity_maps(maps), "svg"), "image/svg+xml")


def card(story: Story, index: int, colour: Tensor | None, pictures: Pictures) -> dict[str, Any]:
    """Return the part of the report about one photograph."""
    photo = story.photos[index]
    patches = None
    if colour is not None:
        patches = pictures.attempt(f"Patch tokens of {photo.name}", lambda: draw_patches(photo, colour))
    return {
        "photo": photo,
        "picture": pictures.attempt(photo.name, lambda: image_uri(reduced(photo))),
        "patches": patches,
        "before": story.before.per_photo[index],
        "after": story.after.per_photo[index],
    }


def reduced(photo: Photo) -> Image:
    from PIL import Image

    picture = Image.fromarray(photo.pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((PHOTO_WIDTH, PHOTO_WIDTH))
    return picture


def draw_patches(photo: Photo, colour: Tensor) -> str:
    from PIL import Image

    patches = Image.fromarray((colour * 255).round().to(torch.uint8).numpy())
    return image_uri(patches.resize(reduced(photo).size, Image.Resampling.BICUBIC))


def image_uri(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return data_uri(buffer.getvalue(), "image/jpeg")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def template() -> Any:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.0f}%"
    source = files("fused_dino.cli").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
