"""The arguments of `fused-dino`. A command's own imports come when it runs."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .. import __version__
from .errors import CommandError, broken_link
from .text import printable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # a full disk, a full share of it, a folder that is only read


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without argparse's usage before it."""
        self.exit(2, printable(f"{self.prog}: {message}") + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    It is 0; 2 for an error that the user can correct, printed as one line; 130 after Ctrl-C; 1 if the reader of a pipe
    is gone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal, or a log, in an encoding that lacks a character
    if broken := broken_link():
        say(f"fused-dino: {broken}")
        return 2
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    try:
        status = command(**options)
        sys.stdout.flush()
        return status
    except OSError as error:
        if error.errno not in (errno.EPIPE, *NO_ROOM):
            raise
        silence(sys.stdout)
        if error.errno == errno.EPIPE:
            return 1
        say(f"{parser.prog}: {error}")
        return 2
    except CommandError as error:
        say(f"{parser.prog}: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"{parser.prog}: interrupted")
        return 130


def say(line: str) -> None:
    """Print one line on stderr. Keep both streams from failing again when Python flushes them at its exit."""
    for stream, text in ((sys.stderr, f"{printable(line)}\n"), (sys.stdout, "")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            silence(stream)


def silence(stream: TextIO) -> None:
    """Discard what a stream could not write, and all later output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def make_parser() -> Parser:
    parser = Parser("fused-dino", description="Supervision by a frozen DINOv2 teacher: try it, time it, check it.")
    parser.add_argument("--version", action="version", version=f"fused-dino {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{demo,bench,doctor,teachers,estimate,recipes}")
    from ..benchmarks.arguments import add_arguments  # beyond a link, which main has checked

    add_demo(commands)
    text = "Time each op against eager PyTorch, torch.compile and its peers on this machine."
    bench = commands.add_parser("bench", help="time each op against the code that it replaces", description=text)
    add_arguments(bench)
    bench.set_defaults(command=run_bench)
    text = "Import what the library needs, run each op once against its reference, and say what is broken."
    doctor = commands.add_parser(
        "doctor", help="check the installation, and say what each op would run", description=text
    )
    doctor.add_argument("--json", action="store_true", dest="json_", help="print one JSON document")
    doctor.add_argument("--online", action="store_true", help="also ask whether the places of the weights answer")
    doctor.set_defaults(command=run_doctor)
    text = "List what can teach: its size, its cost at 224, what its images are normalised by, and its licence."
    teachers = commands.add_parser("teachers", help="list what can teach, its cost and its licence", description=text)
    teachers.add_argument("names", nargs="*", metavar="NAME", help="only these: names, or patterns such as 'eva02*'")
    teachers.add_argument("--json", action="store_true", dest="json_", help="print one JSON document")
    teachers.set_defaults(command=run_teachers)
    add_estimate(commands)
    text = "List the published definitions by name, or show some: formula, constants, cost, and the lines of use."
    recipes = commands.add_parser("recipes", help="list the published definitions, or show one", description=text)
    recipes.add_argument("names", nargs="*", metavar="NAME", help="show these")
    recipes.add_argument("--json", action="store_true", dest="json_", help="print one JSON document")
    recipes.set_defaults(command=run_recipes)
    return parser


def add_demo(commands: Any) -> None:
    from ..benchmarks.arguments import path  # beyond a link, which main has checked

    text = "Train a small text head on captioned photographs under a frozen teacher, and test what it learnt."
    demo = commands.add_parser("demo", help="train on real photographs and write a report", description=text)
    demo.add_argument(
        "--teacher",
        default="efficientnet-lite0",
        metavar="NAME",
        help="efficientnet-lite0 (default: real weights, no download) or a DINOv2 such as vits14 (downloads it)",
    )
    demo.add_argument(
        "--images",
        type=path,
        metavar="DIR",
        help="your own images: each NAME.jpg (png, webp, gif, tiff, ...) with its captions, one a line, in NAME.txt; "
        "the last quarter of the captions, at least one, is held out",
    )
    demo.add_argument("--loss", choices=("cosine", "mse", "vicreg"), default="cosine", help="default: cosine")
    demo.add_argument("--steps", type=positive_int, metavar="N", help="default: 80, or as many as 50 seconds allow")
    demo.add_argument("--seconds", type=positive_float, metavar="S", help="stop training after this long")
    demo.add_argument("--seed", type=seed, default=0, metavar="N", help="default: 0")
    demo.add_argument("--out", type=path, default=Path("demo"), metavar="DIR", help="default: ./demo")
    demo.set_defaults(command=run_demo)


def add_estimate(commands: Any) -> None:
    text = "Say what each part of a supervised step computes and moves, and how long a GPU takes for it at its roofs."
    estimate = commands.add_parser("estimate", help="say what a supervised step costs on a GPU", description=text)
    estimate.add_argument(
        "--teacher", default="vitl14", metavar="NAME", help="default: vitl14; see fused-dino teachers"
    )
    estimate.add_argument("--batch", type=positive_int, default=256, metavar="N", help="images a step; default: 256")
    estimate.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100 (default), h200 or b200")
    estimate.add_argument(
        "--side", type=positive_int, default=256, metavar="N", help="side of the images; default: 256"
    )
    estimate.add_argument("--loss", choices=("cosine", "mse", "vicreg"), default="cosine", help="default: cosine")
    dtypes = ("bfloat16", "float16", "float32")
    estimate.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of everything; default: bfloat16")
    estimate.add_argument("--json", action="store_true", dest="json_", help="print one JSON document")
    estimate.set_defaults(command=run_estimate)


def run_demo(**options: Any) -> int:
    from .demo import run

    return run(**options)


def run_bench(**options: Any) -> int:
    from .bench import run

    return run(**options)


def run_doctor(**options: Any) -> int:
    from .doctor import run

    return run(**options)


def run_teachers(**options: Any) -> int:
    from .teachers import run

    return run(**options)


def run_estimate(**options: Any) -> int:
    from .estimate import run

    return run(**options)


def run_recipes(**options: Any) -> int:
    from .recipes import run

    return run(**options)


def positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)
