"""What a call costs the host: the plain route beside the general one, in one run, without a GPU.

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

import fused_dino.functional as FD

from . import test_cosine, test_resize, test_vicreg

CALLS, ROUNDS = 100, 15
DEVICE = 1000  # that is none: what Triton keeps of the stub serves no other device
MOST = {"cosine forward + backward": 0.57, "vicreg forward + backward": 0.6, "preprocess": 0.5}  # of the general route


class Driver:
    """Triton's driver of an H100 whose launches are kept in `launches`, and run nothing."""

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
    """There is one, to which all that is compiled belongs."""
    return Driver()


def no_obstacle(tensor: torch.Tensor, interpreter: bool = True) -> None:
    """As on a GPU."""


def watched() -> bool:
    return True


@contextmanager
def stubbed_driver() -> Iterator[Driver]:
    """Within it Triton compiles for a GPU, and launches on tensors of a CPU do nothing."""
    from triton.runtime import driver

    with (
        mock.patch.object(driver, "_active", the_driver()),
        mock.patch("fused_dino.backend.triton_obstacle", no_obstacle),
    ):
        yield the_driver()


@contextmanager
def general_route() -> Iterator[None]:
    """Within it no call is plain."""
    with mock.patch("fused_dino.ops.plain.watched", watched):
        yield


def calls() -> dict[str, Callable[[], object]]:
    """The calls that are measured, small enough that a GPU would wait for the host."""
    student, target = (torch.randn(256, 1024, dtype=torch.bfloat16) for _ in range(2))
    images, grad = torch.zeros(4, 3, 256, 256), torch.ones(())
    cosine, vicreg, wide = student.requires_grad_(), student.detach().float().requires_grad_(), target.float()

    def preprocess() -> object:
        with torch.no_grad():
            return FD.preprocess(images, 224, out_dtype=torch.bfloat16, backend="triton")

    return {
        "cosine forward + backward": lambda: torch.autograd.grad(
            FD.cosine_loss(cosine, target, backend="triton"), cosine, grad
        ),
        "vicreg forward + backward": lambda: torch.autograd.grad(
            FD.vicreg_loss(vicreg, wide, backend="triton").loss, vicreg, grad
        ),
        "preprocess": preprocess,
    }


def eager_calls() -> dict[str, Callable[[], object]]:
    """Eager's code for the same, on so few numbers that a CPU computes them at once: its time is the host's."""
    student, target = (torch.randn(2, 4, dtype=torch.bfloat16) for _ in range(2))
    images, grad = torch.zeros(1, 3, 2, 2), torch.ones(())
    cosine, vicreg, wide = student.requires_grad_(), student.detach().float().requires_grad_(), target.float()

    def preprocess() -> object:
        with torch.no_grad():
            return test_resize.eager(test_resize.unit(images), (2, 2)).to(torch.bfloat16)

    return {
        "cosine forward + backward": lambda: torch.autograd.grad(test_cosine.recipe(cosine, target), cosine, grad),
        "vicreg forward + backward": lambda: torch.autograd.grad(test_vicreg.recipe(vicreg, wide), vicreg, grad),
        "preprocess": preprocess,
    }


def microseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS * 1e6


def ratio(call: Callable[[], object]) -> tuple[float, float, float]:
    """(microseconds of the plain route, of the general one, the median of their ratios), by turns."""
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
        for name, call in calls().items():
            plain, general, share = ratio(call)
            status |= share > MOST[name]
            times = f"plain {plain:6.1f} us  general {general:6.1f} us"
            print(f"{name:<26} {times}  {share:.2f} of it, at most {MOST[name]}  (eager {eager[name]:6.1f} us)")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
