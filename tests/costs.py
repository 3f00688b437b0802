"""The calculated costs of VICReg over many ranks, for each rank; `python tests/costs.py` writes docs/distributed.md.

test_distributed.py counts the same, and the seed's, in real processes.
"""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from fused_dino.ops.vicreg_ranks import rows_travel_lighter  # noqa: E402

PAGE = ROOT / "docs/distributed.md"
HEADING = "## VICReg over many ranks: what each rank pays"
WORLDS = (1, 2, 4, 8, 16, 64, 256, 1024)


class Cost(NamedTuple):
    """Bytes that one rank receives, and its operations in matrix products, forward and backward."""

    received: float
    operations: float


def gathered(numbers: float, world: int, itemsize: int) -> float:
    """Count the `numbers` of every other rank."""
    return (world - 1) * numbers * itemsize


def summed(numbers: float, world: int, itemsize: int) -> float:
    """Count an all-reduce in a ring, which passes the numbers twice."""
    return 2 * (world - 1) / world * numbers * itemsize


def by_rows(rows: int, width: int, world: int, itemsize: int) -> Cost:
    """Count two scalars that are summed in float64, and the rows, the largest column and the counts that are exchanged.
    Then count a rank's rows of the product, and of the gradient."""
    received = gathered(rows * width, world, itemsize) + summed(2, world, 8) + gathered(2, world, 8)
    return Cost(received, 4 * rows * (rows * world) * width)


def by_columns(rows: int, width: int, world: int, itemsize: int) -> Cost:
    """Count the sums of the columns and two scalars in float64, the product, and the counts."""
    received = summed(width + 2, world, 8) + summed(width * width, world, 4) + gathered(1, world, 8)
    return Cost(received, 4 * rows * width * width)


def by_moments(rows: int, width: int, world: int, itemsize: int) -> Cost:
    """Count the sums of the columns and two scalars in float64, and the squares. There is no covariance."""
    return Cost(summed(width + 2, world, 8) + summed(width, world, 4), 0)


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
        "| ranks | rows in all | route | MB received | the seed's | GFLOP in products | the seed's |",
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


def section() -> str:
    return f"""{HEADING}

The seed gathers student and teacher, computes the whole loss on every rank, and scatters the gradient back. Here every
rank computes its part, by one of two routes:

- The route by rows gathers the student's rows, and each rank multiplies its own rows with all. Nothing of size [D, D]
  is allocated. Squared errors are summed while rows are gathered.
- The route by columns sums [D, D] products over the ranks. Each rank centres its rows by their own means, so that it
  can multiply while the means of all ranks are summed. Symmetry saves up to a quarter of the work, and is not counted
  below.

On a GPU both routes launch the same kernels as one process, with collectives between the launches. The forward computes
the gradient, too, and the backward communicates nothing. Second derivatives need `backend="reference"`.

`route="auto"` takes the route that sends fewer bytes: rows up to N = 2 D in float32, and up to 4 D in 16 bits. A
group of one rank counts as no group: it takes the smaller product.

Ranks may have different numbers of rows, or none. All ranks must choose the same route. So `"auto"` and
`route="gram"` first exchange the counts on the host, eight bytes per rank. No GPU waits for that if the group has a
backend for CPUs, which `init_process_group()` without a backend sets up. With NCCL alone the host waits for the
device once per call. `route="covariance"` exchanges no counts and never waits. `cov_weight=0` does not either: it
sums D means and D squares, or with `var_weight=0` the invariance alone.

`tests/costs.py` calculates these tables, for forward and backward in float32. In 16 bits the route by rows sums N more
numbers of 4 bytes. `tests/test_distributed.py` counts the bytes of ours and of the seed in three processes, and
`tests/test_distributed_triton.py` those of the kernels in four.

256 rows per rank, D = 1024:

{table(1024, lambda world: 256)}

256 rows per rank, D = 8192:

{table(8192, lambda world: 256)}

8192 rows in all, D = 1024. The work of a rank falls as ranks are added:

{table(1024, lambda world: 8192 // world)}
"""


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(HEADING)[0] + section())
