"""What a run is asked for; imports nothing that takes time."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", metavar="NAME", help="only this one, such as cosine_loss")
    parser.add_argument("--quick", action="store_true", help="one telling row an op, in one direction")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every round, and what was measured where")
    parser.add_argument(
        "--self-check", action="store_true", help="time eager twice under two names: the spread is noise"
    )
