"""`fused-dino demo`: captions learn to find photographs under a frozen teacher, in about a minute on a CPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from .ranks import Ranks

EXTRA = ("rich", "matplotlib", "PIL", "jinja2")
PATIENCE = 50.0  # seconds of training, unless --steps or --seconds is given
STEPS = 80


def run(
    teacher: str, images: Path | None, loss: str, steps: int | None, seconds: float | None, seed: int, out: Path
) -> int:
    """Run the demo and return the exit status: 0, or 130 if Ctrl-C ended the training."""
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise CommandError(f'the demo needs {", ".join(missing)}: pip install "fused_dino[demo]"')
    from .ranks import joined, leave
    from .show import printing

    with joined() as ranks, printing(quiet=ranks.rank > 0) as console:
        status = learn_and_report(console, ranks, teacher, images, loss, steps, seconds, seed, out)
    return status if ranks.world == 1 else leave(status)


def learn_and_report(
    console: Console,
    ranks: Ranks,
    teacher: str,
    images: Path | None,
    loss: str,
    steps: int | None,
    seconds: float | None,
    seed: int,
    out: Path,
) -> int:
    """Train and report on every rank; the first alone prints and writes."""
    import torch

    from ..text import printable
    from . import data, learn, report
    from .show import learning, summary, waiting
    from .teacher import load_teacher

    first = ranks.rank == 0
    if ranks.world > learn.CROPS_PER_STEP:
        raise CommandError(
            f"a step has {learn.CROPS_PER_STEP} crops: give as many processes at most, not {ranks.world}"
        )
    photos = data.embedded() if images is None else data.from_folder(images)
    if first:
        report.prepare(out)
    settings = learn.Settings(
        loss=loss,
        steps=steps or STEPS,
        seconds=PATIENCE if steps is None and seconds is None else seconds,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    check_backend(loss, settings.device)
    with waiting(console, f"Loading the teacher {printable(teacher)} and encoding the held-out crops"):
        frozen = load_teacher(teacher)
        student, control = (learn.Student(frozen.train, settings) for _ in range(2))
        exam = learn.Exam(photos, student, settings)
        before = exam.sit(student)
    console.print(
        f"{frozen.title} teaches a text head: {len(photos)} photographs, "
        f"{sum(len(photo.learn) for photo in photos)} captions to learn, {len(exam.captions)} held out.",
        soft_wrap=True,
    )
    with learning(console, settings.steps) as on_step:
        course = learn.train(student, control, photos, settings, on_step, ranks)
    if len(course.losses) < settings.steps:
        cause = "Interrupted" if course.interrupted else f"The {settings.seconds:g} s for training were over"
        done = f"{len(course.losses)} of {settings.steps} steps"
        console.print(f"{cause} after {done}: this is what was learnt so far.", soft_wrap=True)
    if not first:
        return 130 if course.interrupted else 0
    with waiting(console, "Testing, and writing the report"):
        story = report.Story(settings, frozen, photos, exam, course, before, exam.sit(student), exam.sit(control))
        pictures = report.Pictures()
        not_written = report.write(story, out, pictures)
    console.print(summary(story))
    for line in pictures.failures:
        console.print(line, soft_wrap=True)
    if not_written:
        raise CommandError("--out: " + "; ".join(not_written))
    console.print(f"Report: {printable(str(out / 'report.html'))}", soft_wrap=True)
    return 130 if course.interrupted else 0


def check_backend(loss: str, device: str) -> None:
    """Raise CommandError if the ops cannot run on the backend that the environment names."""
    import torch

    from fused_dino import explain_backend

    for op in ("preprocess", f"{loss}_loss"):
        try:
            says = explain_backend(op, torch.empty(0, device=device))
        except ValueError as error:
            raise CommandError(str(error)) from None
        if says.startswith("none: "):
            raise CommandError(says.removeprefix("none: "))
