"""Declare the arguments of `python -m benchmarks run` and `fused-dino bench`. Import nothing slow."""

import argparse
import os
from pathlib import Path


def path(text: str) -> Path:
    """Return a path, in which `~` is the home where no shell has read it, as in `--out=~/demo`."""
    if not text:  # as of a variable of the shell that is not set; Path("") would be the working folder
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return Path(os.path.expanduser(text))


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", metavar="NAME", help="only this one, such as cosine_loss")
    parser.add_argument("--row", metavar="TEXT", help="only rows whose line, as it is printed while it runs, has this")
    parser.add_argument("--quick", action="store_true", help="one telling row an op, in one direction")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument(
        "--seconds", type=positive_float, default=float("inf"), metavar="S", help="start no row after this long"
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="keep every round, and what was measured where")
    parser.add_argument("--self-check", action="store_true", help="time eager twice: the difference is noise")
