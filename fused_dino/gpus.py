"""GPUs and their roofs, by their makers' data sheets: dense products, and memory in both directions together."""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """A GPU's roofs.

    name: A part of the device's name.
    copy: Bytes a second, read and written.
    matrix: FLOP a second of matrix products, by the precision of their inputs, as the benchmarks name it.
    """

    name: str
    form: str
    copy: float
    matrix: dict[str, float]
    source: str

    def is_named(self, device: str) -> bool:
        return self.name in device


def products(bf16: float, tf32: float, ieee: float) -> dict[str, float]:
    """Return FLOP a second from TFLOP/s; float16 is as fast as bfloat16."""
    return {"bf16": bf16 * 1e12, "fp16": bf16 * 1e12, "TF32": tf32 * 1e12, "IEEE": ieee * 1e12}


COPIED = 0.9  # of `copy`, what a copy reaches: 4.3 of 4.8 TB/s were measured on an H200
HOPPER = products(989.4, 494.7, 66.9)
GPUS = {
    "a100": GPU("A100", "SXM, 80 GB", 2.039e12, products(312, 156, 19.5),
                "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
                "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"),
    "h100": GPU("H100", "SXM", 3.35e12, HOPPER, "https://www.nvidia.com/en-us/data-center/h100/"),
    "h200": GPU("H200", "SXM", 4.8e12, HOPPER, "https://www.nvidia.com/en-us/data-center/h200/"),
    "b200": GPU("B200", "HGX", 7.7e12, products(2250, 1100, 75), "https://www.nvidia.com/en-us/data-center/hgx/"),
}  # fmt: skip


def find(device: str) -> GPU | None:
    """Return the GPU of the table whose name a device has."""
    return next((gpu for gpu in GPUS.values() if gpu.is_named(device)), None)
