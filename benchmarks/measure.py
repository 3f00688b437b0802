"""Time calls on a CPU and on a GPU, interleaved in shuffled rounds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

Clock = Callable[[], float]
Sample = dict[str, float]  # figure -> seconds a call
SAMPLE = 5e-2  # seconds that one sample takes at least: a call here and there pays for pages that malloc had given back
LEAST, MOST = 5, 60  # rounds


def interleave(
    samplers: Mapping[str, Callable[[], Sample]], seconds: float, clock: Clock = time.perf_counter
) -> dict[str, list[Sample]]:
    """Return the samples of each round by name: at least LEAST rounds, and more while `seconds` last.

    Every round samples all in a new order, so that a drift of the machine meets all of them.
    """
    shuffle = random.Random(0).shuffle
    order = list(samplers)
    rounds: dict[str, list[Sample]] = {name: [] for name in order}
    start = clock()
    for count in range(MOST):
        if count >= LEAST and clock() - start >= seconds:
            break
        shuffle(order)
        for name in order:
            rounds[name].append(samplers[name]())
    return rounds


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range over the median."""
    if len(values) < 2:
        return 0.0
    low, mid, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / mid if mid else 0.0


def sampler(calls: Sequence[Callable[[], Any]], device: str) -> Callable[[], Sample]:
    """Return a function that samples a call. calls: The same call, on a GPU once for each input of rotate(...)."""
    return gpu_sampler(calls) if device == "cuda" else host_sampler(calls[0])


def host_sampler(call: Callable[[], Any], clock: Clock = time.perf_counter) -> Callable[[], Sample]:
    """Return a function that gives the wall time of a call, the mean over the calls that fit SAMPLE.

    A call that is not timed comes first, since the provider that was sampled before left other data in the caches, and
    other free memory to malloc.
    """

    def once(repeat: int) -> float:
        start = clock()
        for _ in range(repeat):
            call()
        return (clock() - start) / repeat

    call()
    repeat = max(1, round(SAMPLE / max(min(once(1), once(1)), 1e-7)))

    def sample() -> Sample:
        call()
        return {"wall": once(repeat)}

    return sample


# --- GPU --------------------------------------------------------------------------------------------------------------

COLD_ROUNDS = 20  # of a sample, whose median counts
FLUSH = 2**28  # bytes that are read to empty the L2: several times its size
CYCLES = 2e9  # a second, of a fast GPU's clock: a slower one sleeps longer
LEAST_SLEEP, LONGEST_SLEEP = 2e-4, 2.0  # seconds
HOST_ROUNDS, HOST_CALLS = 15, 2  # few calls: a stream holds some 1,000 launches, and then the host waits for the GPU
ROTATION = 3  # times the L2, so that no replay finds its inputs there
COPIES = 512  # at most


def gpu_sampler(calls: Sequence[Callable[[], Any]]) -> Callable[[], Sample]:
    """Return a function that gives a call's figures in seconds. A call that cannot be captured has no `graph`.

    cold: GPU time of a call whose inputs are not in the L2.
    graph: GPU time of a call in a CUDA graph of all calls, so that no launch is waited for.
    host: Time until a call is enqueued.
    """
    call = calls[0]
    graph = capture(calls)

    def sample() -> Sample:
        host = enqueue(call)
        figures = {"cold": cold(call, host), "host": host}
        return figures if graph is None else figures | {"graph": replay(graph) / len(calls)}

    sample()  # a call that cannot be timed raises here, and not in the middle of the rounds
    return sample


def enqueue(call: Callable[[], Any], cuda: Any = torch.cuda, clock: Clock = time.perf_counter) -> float:
    """Return the seconds in which the host enqueues a call on an idle GPU: the median of HOST_ROUNDS."""
    call()
    spent = []
    for _ in range(HOST_ROUNDS):
        cuda.synchronize()
        start = clock()
        for _ in range(HOST_CALLS):
            call()
        spent.append((clock() - start) / HOST_CALLS)
    cuda.synchronize()
    return median(spent)


def cold(call: Callable[[], Any], host: float, cuda: Any = torch.cuda, flush: Callable[[], Any] | None = None) -> float:
    """Return the GPU seconds of a call whose inputs are not in the L2: the median of COLD_ROUNDS.

    host: Seconds in which it is enqueued. The GPU sleeps meanwhile, so that the whole call is enqueued when it reaches
    the start event. A round in which the GPU was faster is taken again, with a longer sleep.
    """
    flush = flush or empty_the_cache
    sleep = 2 * host + LEAST_SLEEP
    times: list[float] = []
    while len(times) < COLD_ROUNDS:
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        cuda._sleep(round(sleep * CYCLES))
        start.record()
        call()
        end.record()
        late = start.query()
        cuda.synchronize()
        if not late:
            times.append(start.elapsed_time(end) / 1e3)
        elif (sleep := 2 * sleep) > LONGEST_SLEEP:
            raise RuntimeError("the call waits for the GPU, so that its GPU time cannot be told from the host's")
    return median(times)


@lru_cache(maxsize=1)
def other_data() -> Tensor:
    return torch.zeros(FLUSH // 4, device="cuda")


def empty_the_cache() -> None:
    """Read other data into the L2. Written data would cost the call the time to write them back."""
    other_data().sum()


def rotate(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Copy the inputs, strides and all, until they are together larger than ROTATION times the L2."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    needed = ROTATION * torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    return [inputs, *(tuple(x.clone() for x in inputs) for _ in range(min(COPIES, needed // max(size, 1))))]


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph | None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces at the first call on a stream
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    except Exception:  # whatever a provider does that a graph cannot hold
        torch.cuda.synchronize()
        return None
    return graph


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Return the seconds of one replay, the median of five."""
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3


def waiting(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Make a call wait until the GPU has ended it. A CPU needs no wait."""

    def call_and_wait() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return call_and_wait if device == "cuda" else call


def lost() -> bool:
    """Tell whether an error, such as a wrong address, has taken the GPU from this process for good."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return what one call allocates on the GPU beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
