"""Predict the time of each row on a GPU, name its limiter, and set its targets.

None is measured. Times of rows that memory limits are calculated from the speeds of fused_dino/gpus.py; the others are
estimated from the machine code of the kernels. `make report` renders them into docs/gpu.md, and beside the measurements
of a results file.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_dino import costs, gpus
from fused_dino.counting import Kernel

from .shapes import BACKWARD, FORWARD

GPUS = tuple(gpus.GPUS[name] for name in ("h100", "h200"))


@dataclass(frozen=True)
class Prediction:
    """A row in one direction, as evidence names it.

    limiter: What takes the time.
    us: Predicted microseconds on each of GPUS, or None where only a target is set.
    figure: Which of a GPU's times is predicted and judged: cold, graph or host.
    share: Target on each GPU: share of the nearer roof.
    most_us: Target: microseconds at most.
    eager, compile: Target: how many times faster it is than these, by `figure`.
    traffic: The bytes that it has to move, over those of the row. The share counts them.
    """

    op: str
    row: str
    direction: str
    precision: str
    limiter: str
    us: tuple[float, float] | None = None
    figure: str = "cold"
    share: tuple[float, float] | None = None
    most_us: float | None = None
    eager: float | None = None
    compile: float | None = None
    traffic: float = 1.0


def streamed(
    op: str, row: str, direction: str, precision: str, limiter: str, work: Kernel, share: tuple[float, float],
    traffic: float = 1.0, eager: float | None = None, compile: float | None = None,
) -> Prediction:  # fmt: skip
    """Predict a row that is as fast as its bytes move, at `share` of what a copy reaches on each GPU."""
    h100, h200 = (work.bytes * traffic / (gpus.COPIED * gpu.copy * x) for gpu, x in zip(GPUS, share, strict=True))
    us = round(h100 * 1e6), round(h200 * 1e6)
    return Prediction(op, row, direction, precision, limiter, us, "cold", share, None, eager, compile, traffic)


MEMORY, TAIL = "memory", "memory, and a tail of the last programs"
GATHER, RESCALED = "shared memory, from which the taps are gathered", "memory: the gradient is scaled once more"
SERIAL, TILES = "five kernels, one after the other", "the matrix unit, and its instructions"
IMAGES, TOKENS = (256, 3, 256, 256), (65536, 1024)
PREDICTIONS = (
    streamed("preprocess", "256 x 3 x 256 x 256 float32 size=224 out_dtype=bfloat16", FORWARD, "IEEE", MEMORY,
             work=costs.preprocess(IMAGES, 224, 4, 2), share=(0.92, 0.91), eager=8, compile=1.5),
    streamed("preprocess", "256 x 3 x 256 x 256 bfloat16 size=224", FORWARD, "bf16", GATHER,
             work=costs.preprocess(IMAGES, 224, 2, 2), share=(0.92, 0.82), eager=10, compile=2),
    streamed("preprocess", "256 x 3 x 256 x 256 uint8 size=224 out_dtype=bfloat16", FORWARD, "IEEE", GATHER,
             work=costs.preprocess(IMAGES, 224, 1, 2), share=(0.85, 0.66), eager=10, compile=2),
    streamed("preprocess", "256 x 3 x 512 x 512 float32 size=518 out_dtype=bfloat16", FORWARD, "IEEE", MEMORY,
             work=costs.preprocess((256, 3, 512, 512), 518, 4, 2), share=(0.93, 0.91), eager=6.5, compile=2.5),
    streamed("cosine_loss", "65536 x 1024 bfloat16", BACKWARD, "bf16", TAIL,
             work=costs.cosine_loss(TOKENS, 2), share=(0.94, 0.93), eager=9, compile=1.55),
    streamed("cosine_loss", "65536 x 1024 bfloat16 grad_output=0.25", BACKWARD, "bf16", RESCALED,
             work=costs.cosine_loss(TOKENS, 2), share=(0.94, 0.93), traffic=5 / 3),
    streamed("mse_loss", "65536 x 1024 bfloat16", BACKWARD, "bf16", TAIL,
             work=costs.mse_loss(TOKENS, 2), share=(0.94, 0.93), eager=9, compile=1.55),
    streamed("mse_loss", "65536 x 1024 bfloat16 grad_output=0.25", BACKWARD, "bf16", RESCALED,
             work=costs.mse_loss(TOKENS, 2), share=(0.94, 0.93), traffic=5 / 3),
    Prediction("cosine_loss", "256 x 1024 float32", BACKWARD, "IEEE", "host", (125, 125), "host", eager=2, compile=0.8),
    Prediction("cosine_loss", "256 x 1024 float32", BACKWARD, "IEEE", "launches", None, "graph", eager=8, compile=1.2),
    Prediction("vicreg_loss", "256 x 1024 float32", BACKWARD, "IEEE", SERIAL, (18, 18), "graph", eager=12, compile=5),
    Prediction("vicreg_loss", "256 x 8192 float32", BACKWARD, "TF32", SERIAL, (28, 28),
               most_us=20, eager=80, compile=60),
    Prediction("vicreg_loss", "1024 x 4096 bfloat16", BACKWARD, "bf16", TILES, (60, 60),
               share=(0.4, 0.4), eager=20, compile=8),
    Prediction("vicreg_loss", "4096 x 1024 float32", BACKWARD, "TF32", TILES, (65, 65),
               share=(0.55, 0.55), eager=2.3, compile=1.5),
)  # fmt: skip
