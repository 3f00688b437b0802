"""The plain route: which calls take it, and that its launches are those of the general one. The driver is a stub."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dino import functional as FD
from fused_dino.ops import plain

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton import knobs

from fused_dino.benchmarks import host


@triton.jit
def scale_kernel(x, count, factor, at, WIDTH: tl.constexpr, EPS: tl.constexpr):
    where = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(x + where, tl.load(x + where, mask=where < count) * factor + EPS, mask=where < count)


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(plain, "LAUNCHES", {})
    with host.stubbed_driver() as driver:
        yield driver


@pytest.fixture
def looked_up(monkeypatch):
    """The kernels that Triton itself looked up."""
    seen, run = [], triton.JITFunction.run

    def watch(self, *args, **options):
        seen.append(self.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(triton.JITFunction, "run", watch)
    return seen


def launches(driver, call, route=nullcontext):
    """Return what is launched: the compilation, the grid and the arguments, with what decides the code of each
    tensor."""
    driver.launches = []
    with route():
        call()
    made, driver.launches = driver.launches, None
    return [tuple(map(seen, launch)) for launch in made]


def seen(x):
    return (x.dtype, x.shape, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor) else x


def pair(rows, width, dtype=torch.float32, skip=0):
    return tuple(torch.randn(rows, width + skip).to(dtype)[:, skip:].requires_grad_(i == 0) for i in range(2))


def loss_and_gradient(op, student, target, **options):
    out = op(student, target, backend="triton", **options)
    torch.autograd.grad(out if isinstance(out, torch.Tensor) else out.loss, student, torch.ones(()))


def variations():
    """Calls that differ by a dtype, an alignment, a constant, or the class of an integer."""
    aligned, misaligned = (torch.randn(64, 65)[:32, skip:].requires_grad_() for skip in (0, 1))
    yield (
        "cosine misaligned alone",
        lambda: loss_and_gradient(FD.cosine_loss, misaligned[:, :60], aligned[:, :60].detach()),
    )
    yield "cosine aligned alone", lambda: loss_and_gradient(FD.cosine_loss, aligned[:, :60], aligned[:, :60].detach())
    for name, x in {
        "": pair(32, 64),
        "half": pair(32, 64, torch.bfloat16),
        "misaligned": pair(32, 64, skip=1),
        "one row": pair(1, 64),
        "17 rows": pair(17, 64),
        "another width": pair(32, 72),
    }.items():
        yield f"cosine {name}", lambda x=x: loss_and_gradient(FD.cosine_loss, *x)
    yield "cosine weighted", lambda: loss_and_gradient(FD.cosine_loss, *pair(32, 64), weight=torch.ones(32), scale=0.5)
    yield "cosine eps", lambda: loss_and_gradient(FD.cosine_loss, *pair(32, 64), eps=0.0)
    yield "vicreg", lambda: loss_and_gradient(FD.vicreg_loss, *pair(32, 64))
    yield "vicreg by columns", lambda: loss_and_gradient(FD.vicreg_loss, *pair(64, 32))
    for size in (16, 28):
        yield f"preprocess {size}", lambda size=size: FD.preprocess(torch.zeros(2, 3, 32, 32), size, backend="triton")


def test_the_launches_are_those_of_the_general_route(driver, looked_up):
    """Launch once while the cache fills, and once from it."""
    general = {name: launches(driver, call, host.general_route) for name, call in variations()}
    assert not plain.LAUNCHES
    for expected_look_ups in (True, False):
        looked_up.clear()
        for name, call in variations():
            assert launches(driver, call) == general[name], name
        assert bool(looked_up) is expected_look_ups
    assert len({tuple(x) for x in general.values()}) == len(general)


@pytest.mark.parametrize("count", [1, 16, 17, 2**31, 2**31 + 1, 2**63])
@pytest.mark.parametrize("first", [1, 16, 17, 2**31, 2**31 + 1, 2**63])
def test_an_integer_of_another_class_has_other_code(first, count, driver):
    x = torch.zeros(64)

    def call(n):
        plain.launch(scale_kernel, (1,), x, n, 1.0, None, WIDTH=64, EPS=0.5)

    launches(driver, lambda: call(first))
    assert launches(driver, lambda: call(count)) == launches(driver, lambda: call(count), host.general_route)


@pytest.mark.parametrize(("first", "second"), [(0.0, -0.0), (-0.0, 0.0), (1, 1.0), (1.0, 1), (True, 1)])
def test_constants_that_are_equal_and_not_the_same(first, second, driver):
    x = torch.zeros(64)

    def call(eps):
        plain.launch(scale_kernel, (1,), x, 5, 1.0, None, WIDTH=64, EPS=eps)

    launches(driver, lambda: call(first))
    binaries = [launches(driver, lambda: call(second), route)[0][0] for route in (nullcontext, host.general_route)]
    assert binaries[0] == binaries[1]


def call_scale():
    plain.launch(scale_kernel, (1,), torch.zeros(64), 5, 1.0, None, WIDTH=64, EPS=0.5)


def test_a_setting_that_changes_code_is_part_of_the_key(driver, looked_up, monkeypatch):
    call_scale()
    call_scale()
    assert len(looked_up) == 1
    monkeypatch.setattr(knobs.runtime, "debug", True)
    call_scale()
    assert len(looked_up) == 2


def test_who_watches_launches_sees_them(driver, looked_up):
    call_scale()
    watched = []
    knobs.runtime.launch_enter_hook.add(watched.append)
    try:
        call_scale()
    finally:
        knobs.runtime.launch_enter_hook.remove(watched.append)
    assert len(looked_up) == 2


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", [torch.inference_mode, Mode, lambda: torch.device("cpu"), host.general_route])
def test_nothing_is_kept_where_somebody_watches(where, driver):
    with where():
        call_scale()
    assert not plain.LAUNCHES
    call_scale()
    assert len(plain.LAUNCHES) == 1


def test_nothing_is_kept_while_a_graph_is_captured(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call_scale()
    assert not plain.LAUNCHES


class Own(torch.Tensor):
    pass


def test_only_plain_tensors_are_plain():
    x, options = torch.ones(2, 3), ("no", "tensors")
    assert plain.is_plain((x, None, torch.nn.Parameter(x), options, "triton"))
    assert not plain.is_plain((x, x.as_subclass(Own)))
    assert not plain.is_plain((x.to("meta"),))
    with Mode():
        assert not plain.is_plain((x,))
    with torch._subclasses.FakeTensorMode() as mode:
        assert not plain.is_plain((x,))
    assert not plain.is_plain((mode.from_tensor(x),))
    inside = []
    torch.func.grad(lambda x: inside.append(plain.is_plain((x,))) or x.sum())(x)
    torch.func.vmap(lambda x: inside.append(plain.is_plain((x,))) or x)(x)
    torch.compile(lambda x: x + plain.is_plain((x,)), backend="eager", fullgraph=True)(x)
    assert inside == [False, False]


@pytest.mark.parametrize(("most", "status"), [(1e9, 0), (0.0, 1)])
def test_the_benchmark_of_the_host_holds_the_plain_route_against_a_limit(most, status, monkeypatch, capsys):
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "ROUNDS", 1)
    monkeypatch.setattr(host, "MOST", dict.fromkeys(host.MOST, most))
    threads = torch.get_num_threads()
    try:
        assert host.main() == status
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(host.MOST)
