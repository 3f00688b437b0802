"""Test that rounds are interleaved, that samples are long enough, and that host time stays out of GPU time."""

import itertools
from statistics import median

import pytest
import torch

from benchmarks import measure, roofs


class FakeGPU:
    """A stand-in for torch.cuda with two clocks: the time of the host, and the time at which the GPU is done.

    host, kernel: seconds of a call; waits: whether a call waits for the GPU; queue: how many launches may wait.
    """

    def __init__(self, host, kernel, waits=False, queue=1000):
        self.host, self.kernel, self.waits, self.queue = host, kernel, waits, queue
        self.now = self.done = 0.0
        self.calls = self.flushed = 0
        self.pending = []

    def work(self, seconds):
        self.done = max(self.now, self.done) + seconds

    def flush(self):
        self.flushed += 1
        self.work(1e-4)

    def _sleep(self, cycles):
        self.work(cycles / measure.CYCLES)

    def synchronize(self):
        self.now = max(self.now, self.done)

    def call(self):
        self.calls += 1
        self.pending = [end for end in self.pending if end > self.now]
        if len(self.pending) >= self.queue:
            self.now = self.pending[0]
        self.now += self.host
        self.work(self.kernel)
        self.pending.append(self.done)
        if self.waits:
            self.synchronize()

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                gpu.work(0.0)
                self.at = gpu.done

            def query(self):
                return self.at <= gpu.now

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()


def test_every_round_has_everyone_once_in_a_changing_order():
    calls = []
    samplers = {name: lambda name=name: calls.append(name) or {"wall": 1.0} for name in "abcd"}
    rounds = measure.interleave(samplers, seconds=0)
    assert {name: len(samples) for name, samples in rounds.items()} == dict.fromkeys("abcd", measure.LEAST)
    orders = [tuple(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1


def test_a_drift_of_the_machine_meets_everyone():
    """The machine slows down all the while. Without turns the second of two equal providers would look slower."""
    now = itertools.count(1.0, 0.01)
    samplers = {name: lambda: {"wall": next(now)} for name in ("first", "second")}
    rounds = measure.interleave(samplers, seconds=1e9)
    first, second = ([sample["wall"] for sample in rounds[name]] for name in samplers)
    assert len(first) == measure.MOST
    assert median(first) == pytest.approx(median(second), rel=0.02)


def test_rounds_go_on_while_seconds_last():
    now = [0.0]

    def sample():
        now[0] += 1.0
        return {"wall": 1.0}

    assert len(measure.interleave({"a": sample}, seconds=8, clock=lambda: now[0])["a"]) == 8
    assert len(measure.interleave({"a": sample}, seconds=1e9, clock=lambda: now[0])["a"]) == measure.MOST


@pytest.mark.parametrize("cost", [3e-6, 4e-4, 0.5])
def test_a_sample_is_long_enough_and_its_time_is_that_of_one_call(cost):
    now = [0.0]
    spans = []

    def call():
        now[0] += cost

    sample = measure.host_sampler(call, clock=lambda: now[0])
    start = now[0]
    assert sample()["wall"] == pytest.approx(cost)
    spans.append(now[0] - start)
    assert spans[0] >= measure.SAMPLE * 0.75


def test_cold_is_the_gpus_time_alone():
    """The time is the same for a host ten times as slow as the GPU and for one as fast: it contains no host time."""
    for host in (500e-6, 5e-6):
        gpu = FakeGPU(host=host, kernel=50e-6)
        assert measure.cold(gpu.call, host, gpu, gpu.flush) == pytest.approx(50e-6)
        assert gpu.calls == gpu.flushed == measure.COLD_ROUNDS >= 20


def test_a_round_in_which_the_host_was_late_is_taken_again():
    gpu = FakeGPU(host=30e-3, kernel=50e-6)
    assert measure.cold(gpu.call, 1e-6, gpu, gpu.flush) == pytest.approx(50e-6)
    assert gpu.calls > measure.COLD_ROUNDS


def test_a_call_that_waits_for_the_gpu_has_no_cold_time():
    gpu = FakeGPU(host=5e-6, kernel=50e-6, waits=True)
    with pytest.raises(RuntimeError, match="waits for the GPU"):
        measure.cold(gpu.call, 5e-6, gpu, gpu.flush)


def test_host_time_is_that_of_enqueuing():
    """The speed of the GPU does not matter: the clock starts when the GPU is done, and few calls wait at once."""
    for kernel in (50e-6, 50e-3):
        gpu = FakeGPU(host=20e-6, kernel=kernel, queue=8)
        assert measure.enqueue(gpu.call, gpu, lambda gpu=gpu: gpu.now) == pytest.approx(20e-6)


def test_what_another_provider_left_behind_is_not_timed():
    now, last = [0.0], [""]

    def call(name):
        now[0] += 0.01 if last[0] == name else 0.07
        last[0] = name

    samplers = {
        name: measure.host_sampler(lambda name=name: call(name), clock=lambda: now[0]) for name in ("first", "second")
    }
    rounds = measure.interleave(samplers, seconds=0)
    assert [sample["wall"] for samples in rounds.values() for sample in samples] == pytest.approx([0.01] * 10)


def test_statistics():
    assert measure.spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert measure.spread([7]) == 0


def test_roofs():
    share, name = roofs.of_the_roof(1.0, bytes=5e9, flops=1e9, precision="IEEE", roofs={"copy": 1e10, "IEEE": 1e10})
    assert (share, name) == (0.5, "copy")
    share, name = roofs.of_the_roof(1.0, bytes=5e9, flops=9e9, precision="IEEE", roofs={"copy": 1e10, "IEEE": 1e10})
    assert (share, name) == (0.9, "matrix")


def test_tf32_is_allowed_for_its_rows_alone():
    before = torch.get_float32_matmul_precision()
    for tf32, wanted in ((True, "high"), (False, "highest")):
        with roofs.matrix_precision(tf32):
            assert torch.get_float32_matmul_precision() == wanted
    assert torch.get_float32_matmul_precision() == before


def test_a_call_waits_for_the_gpu(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    call = measure.waiting(lambda: done.append("call") or 7, "cuda")
    assert (call(), done) == (7, ["call", "synchronize"])
