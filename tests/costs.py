"""What VICReg over many ranks costs each of them, by calculation; `python tests/costs.py` writes docs/distributed.md.

test_distributed.py counts the same, the recipe's too, in real processes.
"""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from fused_dino.ops.vicreg_ranks import rows_travel_lighter  # noqa: E402

PAGE = ROOT / "docs/distributed.md"
WORLDS = (1, 2, 4, 8, 16, 64, 256, 1024)


class Cost(NamedTuple):
    """Of one rank, forward and backward: bytes that it receives, and operations in matrix products."""

    received: float
    operations: float


def gathered(numbers: float, world: int, itemsize: int) -> float:
    """Every rank's `numbers`, but its own."""
    return (world - 1) * numbers * itemsize


def summed(numbers: float, world: int, itemsize: int) -> float:
    """A ring's all-reduce passes them twice."""
    return 2 * (world - 1) / world * numbers * itemsize


def by_rows(rows: int, width: int, world: int, itemsize: int) -> Cost:
    """Two scalars and the largest column's covariances are summed in float64 beside the rows, which column that is and
    the counts are exchanged; then its rows of the product, and of the gradient."""
    received = gathered(rows * width, world, itemsize) + summed(2 + width, world, 8) + gathered(2, world, 8)
    return Cost(received, 4 * rows * (rows * world) * width)


def by_columns(rows: int, width: int, world: int, itemsize: int) -> Cost:
    """The sums of the columns, two scalars, the product, the squares, and what is left of the means."""
    received = summed(width + 2 + width * width + 2 * width, world, 4) + gathered(1, world, 8)
    return Cost(received, 4 * rows * width * width)


def by_moments(rows: int, width: int, world: int, itemsize: int) -> Cost:
    """Without a covariance: the sums of the columns, two scalars, the squares, and what is left of the means."""
    return Cost(summed(width + 2 + width + width, world, 4), 0)


def recipe(rows: int, width: int, world: int, itemsize: int) -> Cost:
    """Student and teacher are gathered, gradients are scattered back, and each rank repeats the loss of all rows."""
    received = 2 * gathered(rows * width, world, itemsize) + gathered(rows * width, world, itemsize)
    return Cost(received, 6 * rows * world * width * width)


def ours(rows: int, width: int, world: int, itemsize: int) -> tuple[str, Cost]:
    if rows_travel_lighter([rows] * world, width, itemsize, 4) or (world == 1 and rows < width):
        return "rows", by_rows(rows, width, world, itemsize)
    return "columns", by_columns(rows, width, world, itemsize)


def table(width: int, rows_of) -> str:
    lines = [
        "| ranks | rows in all | route | MB received | the recipe's | GFLOP in products | the recipe's |",
        "|--:|--:|---|--:|--:|--:|--:|",
    ]
    for world in WORLDS:
        rows = rows_of(world)
        route, cost = ours(rows, width, world, 4)
        eager = recipe(rows, width, world, 4)
        mb, eager_mb, gflop, eager_gflop = (
            f"{x:,.3g}" if x < 1000 else f"{x:,.0f}"
            for x in (cost.received / 1e6, eager.received / 1e6, cost.operations / 1e9, eager.operations / 1e9)
        )
        lines.append(f"| {world} | {rows * world:,} | {route} | {mb} | {eager_mb} | {gflop} | {eager_gflop} |")
    return "\n".join(lines)


def page() -> str:
    return f"""# VICReg over many ranks: what each of them pays

Calculated by `tests/costs.py`, forward and backward, in float32; `tests/test_distributed.py` counts the same,
ours and the recipe's, in three real processes. The recipe gathers student and teacher, repeats the whole loss on every
rank, and scatters the gradient back. Here every rank does its share, by the rows (one gather of the student's) or by
the columns (one sum of the [D, D] products over the ranks), whichever travels lighter: rows up to N = 2 D in float32,
and up to 4 D in 16 bits. The symmetry of the product saves up to a quarter more by columns, and is not counted. By rows
nothing [D, D] is allocated. A group of one rank is no group: it takes the smaller product, and on a GPU the kernels.

The ranks may bring different numbers of rows, or none. The choice has to be the same on all of them, so that "auto"
and `route="gram"` first exchange the ranks' counts on the host, eight bytes each. With a CPU backend in the group,
which `init_process_group()` without a backend sets up beside NCCL, no GPU waits for it; with NCCL alone the host waits
for the device once a call. `route="covariance"` exchanges no counts and never waits; nor does `cov_weight=0`, which
needs neither rows nor products: 3 D numbers are summed, and none beside the invariance where `var_weight` is 0 as well.

256 rows a rank, D = 1024:

{table(1024, lambda world: 256)}

256 rows a rank, D = 8192:

{table(8192, lambda world: 256)}

8192 rows in all, D = 1024, so that what a rank does falls as ranks are added:

{table(1024, lambda world: 8192 // world)}
"""


if __name__ == "__main__":
    PAGE.write_text(page())
