"""Measure what a call costs the host without a GPU: the plain route beside the general one, in one run.

    python -m benchmarks.host

The driver's calls are replaced by ones that do nothing. What is left is the time of Python and torch on this CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fused_dino.functional as FD

from . import test_cosine, test_resize, test_vicreg

CALLS, ROUNDS = 100, 15
DEVICE = 1000  # no real device: what Triton keeps of the stub serves no other
MOST = {"cosine forward + backward": 0.57, "vicreg forward + backward": 0.6, "preprocess": 0.5}  # of the general route


class Driver:
    """Stand in for Triton's driver of an H100: keep launches in `launches`, and run nothing."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches: list[tuple] | None = None
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.get_current_device = lambda: DEVICE
        self.get_current_stream = lambda device: 0
        properties = {"max_shared_mem": 232448, "warpSize": 32, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 32, 0, 1024),
            get_device_properties=lambda device: properties,
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            if self.launches is not None:
                self.launches.append((metadata.hash, *args[:6], *args[9:]))  # but for what hooks are given

        launch.launch_cooperative_grid = False  # type: ignore[attr-defined]
        return launch


@cache
def the_driver() -> Driver:
    """Return the only driver: every kernel that was compiled belongs to it."""
    return Driver()


def no_obstacle(tensor: Tensor, interpreter: bool = True) -> None:
    """Find no obstacle, as on a GPU."""


def watched() -> bool:
    return True


@contextmanager
def stubbed_driver() -> Iterator[Driver]:
    """Let Triton compile for a GPU, and launches on tensors of a CPU do nothing."""
    from triton.runtime import driver

    unobstructed = mock.patch("fused_dino.backend.triton_obstacle", no_obstacle)
    with mock.patch.object(driver, "_active", the_driver()), unobstructed:
        yield the_driver()


@contextmanager
def general_route() -> Iterator[None]:
    """Send every call along the general route."""
    with mock.patch("fused_dino.ops.plain.watched", watched):
        yield


Calls = dict[str, Callable[[], object]]


def calls(shape: tuple[int, int], images: Tensor, cosine: Any, vicreg: Any, preprocess: Any) -> Calls:
    """Return the calls that are measured."""
    target, grad = torch.randn(shape), torch.ones(())
    bf16, bf16_target = torch.randn(shape).bfloat16().requires_grad_(), target.bfloat16()
    fp32 = torch.randn(shape).requires_grad_()

    def without_gradient() -> object:
        with torch.no_grad():
            return preprocess(images)

    return {
        "cosine forward + backward": lambda: torch.autograd.grad(cosine(bf16, bf16_target), bf16, grad),
        "vicreg forward + backward": lambda: torch.autograd.grad(vicreg(fp32, target), fp32, grad),
        "preprocess": without_gradient,
    }


def our_calls() -> Calls:
    """Return our calls, small enough that a GPU would wait for the host."""
    return calls(
        (256, 1024),
        torch.zeros(4, 3, 256, 256),
        lambda x, y: FD.cosine_loss(x, y, backend="triton"),
        lambda x, y: FD.vicreg_loss(x, y, backend="triton").loss,
        lambda x: FD.preprocess(x, 224, out_dtype=torch.bfloat16, backend="triton"),
    )


def eager_calls() -> Calls:
    """Return eager's calls, on so few numbers that a CPU computes them at once: their time is the host's."""
    return calls(
        (2, 4),
        torch.zeros(1, 3, 2, 2),
        test_cosine.recipe,
        test_vicreg.recipe,
        lambda x: test_resize.eager(test_resize.unit(x), (2, 2)).to(torch.bfloat16),
    )


def microseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS * 1e6


def ratio(call: Callable[[], object]) -> tuple[float, float, float]:
    """Return (microseconds of the plain route, of the general one, the median of their ratios), measured by turns."""
    microseconds(call)
    with general_route():
        microseconds(call)
    pairs = []
    for _ in range(ROUNDS):
        plain = microseconds(call)
        with general_route():
            pairs.append((plain, microseconds(call)))
    return min(p for p, _ in pairs), min(g for _, g in pairs), statistics.median(p / g for p, g in pairs)


def main() -> int:
    torch.set_num_threads(1)
    status = 0
    eager = {name: min(microseconds(call) for _ in range(ROUNDS)) for name, call in eager_calls().items()}
    with stubbed_driver():
        for name, call in our_calls().items():
            plain, general, share = ratio(call)
            status |= share > MOST[name]
            times = f"plain {plain:6.1f} us  general {general:6.1f} us"
            print(f"{name:<26} {times}  {share:.2f} of it, at most {MOST[name]}  (eager {eager[name]:6.1f} us)")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
