"""VICReg's accuracy with dominating columns and under torch's setting of TF32, as docs/guide.md has it; and what its
product allocates.
"""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from fused_dino import functional as FD
from fused_dino.ops import vicreg_tiles
from fused_dino.ops.dispatch import cdiv
from fused_dino.ops.vicreg_tiles import FLOAT64, TILES, split
from proving import DEVICE, DTYPES, check_accuracy
from table import VICREG

SHAPES = [(16, 64), (64, 256), (255, 256)]


def dominated(shape, factor, dtype, seed=0):
    """Return a student, one column of which deviates `factor` times as much as the others, and a target."""
    generator = torch.Generator().manual_seed(seed)
    y, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    y[:, min(3, shape[1] - 1)] *= factor
    return y.to(DEVICE, dtype), g.to(DEVICE, dtype)


def error_of_covariance(y, g):
    """Return the relative error of the covariance by rows against float64."""
    covariance = FD.vicreg_loss(y, g, route="gram").covariance.double()
    true = FD.vicreg_loss(y.double(), g.double(), backend="reference").covariance
    return ((covariance - true) / true).abs().item()


@pytest.mark.parametrize("route", ["gram", "covariance"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("factor", [10, 100, 1_000, 10_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_dominating_column_costs_no_more_than_in_eager(shape, factor, dtype, route, backend):
    check_accuracy(VICREG, dominated(shape, factor, dtype), backend, route=route)


@pytest.mark.parametrize("factor", [100, 10_000, 1_000_000])
@pytest.mark.parametrize("shape", [*SHAPES, (15, 16), (100, 2)])
def test_by_rows_the_covariance_alone_keeps_its_digits(shape, factor, backend):
    """No other term hides the error. Few rows, whose columns are similar by chance, and few columns are tested."""
    for seed in range(5):
        assert error_of_covariance(*dominated(shape, factor, torch.float32, seed)) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 4096), (4096, 64)])
def test_a_sum_of_4096_products_is_not_biased(shape, dtype, backend, monkeypatch):
    """A single split adds everything. A matrix unit that cut each sum of the chain would lose 2e-5."""
    monkeypatch.setattr(vicreg_tiles, "PROGRAMS", 1)
    y, g = dominated(shape, 1, dtype)
    covariance = FD.vicreg_loss(y, g).covariance.double()
    true = FD.vicreg_loss(y.double(), g.double(), backend="reference").covariance
    assert_close(covariance, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("shape", [(129, 128), (1024, 512)])
def test_the_variance_keeps_its_digits_beside_a_wide_product(shape, backend):
    """Added within its sums, a far larger term would round all that comes after it."""
    y, g = dominated(shape, 1, torch.float32)
    check_accuracy(VICREG, (0.3 * y, g), backend, inv_weight=0.0)


@pytest.fixture
def coarse_products():
    """Let products be coarse, as TF32 is on a GPU: bfloat16 where a processor has matrix instructions for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("route", ["gram", "covariance"])
def test_the_variance_is_no_product(route, coarse_products):
    y, g = dominated((300, 200), 1, torch.float32)
    y = (0.5 * y).requires_grad_()
    y64 = y.detach().double().requires_grad_()
    out, true = (FD.vicreg_loss(x, g.to(x), route=route, cov_weight=1e-9) for x in (y, y64))
    assert_close(out.variance.double(), true.variance, rtol=1e-6, atol=0)
    (grad,), (true_grad,) = torch.autograd.grad(out.loss, y), torch.autograd.grad(true.loss, y64)
    assert (grad - true_grad).norm() <= 1e-6 * true_grad.norm()


def test_by_rows_several_columns_may_dominate(backend):
    """The largest column is left out. The squares of the others are N times what their products give by chance."""
    for seed in range(5):
        y, g = dominated((64, 256), 10_000, torch.float32, seed)
        for column, factor in ((7, 10_000), (20, 3_000), (21, 100)):
            y[:, column] *= factor
        assert error_of_covariance(y, g) <= 1e-3


@pytest.mark.parametrize(
    ("factor", "least", "most"), [(100, 0, 1e-3), (1_000, 5e-4, 0.02), (10_000, 0.05, float("inf"))]
)
def test_by_rows_two_that_dominate_and_have_nothing_in_common_cost_digits_as_the_guide_says(
    factor, least, most, backend
):
    """Return the largest error of five draws. The reference has no route by rows."""
    signs = torch.tensor([1.0, -1.0], device=DEVICE)
    errors = []
    for seed in range(5):
        y, g = dominated((64, 256), 1, torch.float32, seed)
        y[:, 0], y[:, 3] = factor * signs.repeat(32), factor * signs.repeat_interleave(2).repeat(16)
        errors.append(error_of_covariance(y, g))
    assert max(errors) <= (1e-5 if backend == "reference" else most)
    assert backend == "reference" or max(errors) >= least


def test_the_splits_of_a_product_are_together_no_larger_than_the_student():
    most = 0
    steps = itertools.product(TILES, (16, 32, 64, 128))
    for tile, step in (*steps, (FLOAT64["TILE"], FLOAT64["BLOCK_K"])):
        for size, depth in itertools.product((1, 2, 7, 64, 100, 255, 1024), (1, 2, 63, 256, 4000, 100_000)):
            across = cdiv(size, tile)
            splits, depth_a_split = split(size, depth, across * (across + 1) // 2, step)
            assert splits == 1 or splits * size * size <= size * depth
            assert (splits - 1) * depth_a_split < depth <= splits * depth_a_split, "each has rows, and none is left"
            most = max(most, splits)
    assert most > 100, "the example must be split"


SETTINGS = """
import torch
from fused_dino.ops.vicreg_tiles import planes_of_products

torch.version.hip = None  # AMD multiplies float32 whatever is set
matmul = torch.backends.cuda.matmul
assert planes_of_products(torch.float32) == 3
for on in (True, False):
    expected = 2 if on else 3
    matmul.fp32_precision = "tf32" if on else "ieee"
    assert planes_of_products(torch.float32) == expected, "fp32_precision"
    matmul.allow_tf32 = on
    assert planes_of_products(torch.float32) == expected, "allow_tf32"
    torch.set_float32_matmul_precision("high" if on else "highest")
    assert planes_of_products(torch.float32) == expected, "set_float32_matmul_precision"
matmul.fp32_precision = "none"
torch.backends.fp32_precision = "tf32"
assert planes_of_products(torch.float32) == 2, "the setting of all backends"
"""


def test_either_way_of_allowing_tf32_is_followed():
    """The settings need a process of their own: torch has no way back to a state in which nothing was set."""
    done = subprocess.run([sys.executable, "-c", SETTINGS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
