"""Measure this machine (`run`), or render benchmarks/results/ (`report`)."""

from __future__ import annotations

import argparse
import sys

from . import command
from .arguments import add_arguments


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_arguments(commands.add_parser("run", help="measure, print tables, and keep the evidence"))
    commands.add_parser("report", help="render the pages' figures from benchmarks/results/")
    options = vars(parser.parse_args(argv))
    try:
        if options.pop("command") == "run":
            return command.bench(**options)
        from . import report

        return report.write()
    except command.Refused as refused:
        print(f"{parser.prog}: {refused}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
