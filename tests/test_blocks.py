"""The closed forms over several blocks: on a CPU a block is larger than the inputs of any other test."""

import pytest
import torch
import torch._inductor.config
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.testing import assert_close

from fused_dino import functional as FD
from fused_dino.ops import columns_torch, resize, vicreg_torch
from proving import DTYPES, check_accuracy
from table import PREPROCESS, STANDARDIZE, VICREG


def cases():
    for op in (STANDARDIZE, PREPROCESS, VICREG):
        for case in op.cases:
            yield pytest.param(op, case, id=f"{op.name}-{case}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), list(cases()))
def test_are_as_accurate_as_eager(op, case, dtype, monkeypatch):
    monkeypatch.setattr(columns_torch, "CPU_ELEMENTS", 60)
    monkeypatch.setattr(vicreg_torch, "CPU_PANEL", 3)
    monkeypatch.setattr(resize, "CPU_PIXELS", 1)
    check_accuracy(op, tuple(x.cpu() for x in op.draw(case.shape, dtype)), "torch", **case.options)


@pytest.fixture
def nan_in_new_memory():
    """Make torch fill what it allocates with NaN, as its deterministic mode does."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize(("op", "case"), list(cases()))
def test_nothing_is_read_that_was_not_written(op, case, monkeypatch):
    for elements in (columns_torch.CPU_ELEMENTS, 60):
        monkeypatch.setattr(columns_torch, "CPU_ELEMENTS", elements)
        check_accuracy(op, tuple(x.cpu() for x in op.draw(case.shape)), "torch", **case.options)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("route", ["gram", "covariance"])
def test_no_rows_have_no_covariance(route):
    assert FD.vicreg_loss(torch.ones(0, 3), torch.ones(0, 3), route=route).covariance == 0


def test_terms_that_are_left_out_are_tensors_of_their_own():
    terms = FD.vicreg_loss(torch.ones(2, 3), torch.ones(2, 3), var_weight=0, cov_weight=0)
    terms.variance.add_(1)
    assert terms.covariance == 0


@pytest.mark.parametrize("shape", [(2, 500), (3, 500), (2, 3000)])
def test_few_rows_by_columns(shape):
    check_accuracy(VICREG, tuple(x.cpu() for x in VICREG.draw(shape)), "torch", route="covariance")


def test_a_constant_column_is_centred_exactly(monkeypatch):
    monkeypatch.setattr(columns_torch, "CPU_ELEMENTS", 60)
    centred, squares = columns_torch.centre(torch.tensor([0.1, -3e7, 7e-20, 3e38]).expand(701, 4), torch.float32)
    assert not centred.any()
    assert not squares.any()


@pytest.mark.parametrize("count", [1, 4, 5])
def test_images_in_blocks_of_two(count, monkeypatch):
    monkeypatch.setattr(resize, "CPU_PIXELS", 2 * 7 * 9)
    for options in ({}, {"patch_size": 2}, {"out_dtype": torch.float16}):
        images = PREPROCESS.draw((count, 3, 7, 9), torch.float32)
        check_accuracy(PREPROCESS, tuple(x.cpu() for x in images), "torch", size=(6, 8), **options)


def test_a_compiled_gradient_adds_in_a_fixed_order():
    """Many outputs read one pixel of an enlarged image. A compiler would scatter their gradients by atomic
    additions."""
    x = PREPROCESS.draw((2, 3, 20, 20), torch.float32)[0].cpu()

    @torch._inductor.config.patch({"force_disable_caches": True, "cpp.threads": 2})  # caches keep no code to read
    def gradient(backend):
        leaf = x.clone().requires_grad_()
        run = torch.compile(lambda x: FD.preprocess(x, 224, backend=backend).square().sum(), fullgraph=True)
        code = run_fw_bw_and_get_code(lambda: run(leaf))[1]
        return leaf.grad, any("atomic_add" in part for part in code)

    (ours, scattered), (theirs, scatters) = gradient("torch"), gradient("reference")
    assert not scattered
    assert scatters, "the words to look for"
    assert_close(ours, theirs, rtol=1e-5, atol=1e-4 * theirs.abs().max().item())
