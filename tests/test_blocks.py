"""The closed forms where their blocks are several: on a CPU, whose blocks are larger than any other test's inputs."""

import pytest
import torch

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


def test_a_constant_column_is_centred_exactly(monkeypatch):
    monkeypatch.setattr(columns_torch, "CPU_ELEMENTS", 60)
    centred, squares = columns_torch.centre(torch.tensor([0.1, -3e7, 7e-20]).expand(701, 3), torch.float32)
    assert not centred.any()
    assert not squares.any()


@pytest.mark.parametrize("count", [1, 4, 5])
def test_images_in_blocks_of_two(count, monkeypatch):
    monkeypatch.setattr(resize, "CPU_PIXELS", 2 * 7 * 9)
    for options in ({}, {"patch_size": 2}, {"out_dtype": torch.float16}):
        images = PREPROCESS.draw((count, 3, 7, 9), torch.float32)
        check_accuracy(PREPROCESS, tuple(x.cpu() for x in images), "torch", size=(6, 8), **options)
