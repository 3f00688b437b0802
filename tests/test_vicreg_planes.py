"""One plane of VICReg's product in place of two, where the second is below the rounding of the gradient.

These tests are collected in the interpreter and where there is a GPU.
"""

import pytest
import torch

from fused_dino.ops import vicreg_triton
from fused_dino.ops.vicreg_plan import BackwardOptions, make_plan
from proving import check_accuracy, pair
from table import VICREG

HALF = (torch.bfloat16, torch.float16)
SHAPES = ((48, 96), (96, 48))


def gradient(y, g, rest=None, **weights):
    """Return whether the first plane was enough, and the student's gradient; `rest` overwrites the second plane."""
    plan = make_plan(
        *y.shape, gamma=1.0, eps=1e-4, cov_reduction="mean", unbiased=False, route="auto",
        **{"inv_weight": 25.0, "var_weight": 10.0, "cov_weight": 0.5, **weights},
    )  # fmt: skip
    loss, _, _, _, *saved = vicreg_triton.vicreg_fwd(y, g, None, plan)
    saved = vicreg_triton.Saved(*saved)
    assert saved.largest[0] == -1, "the example must be multiplied as it is"
    if rest is not None:
        saved.product[:, 128:].fill_(rest)
    options = BackwardOptions(True, False, plan)
    grad, _ = vicreg_triton.vicreg_bwd(y, g, torch.ones_like(loss), None, saved, options)
    return bool(saved.largest[2]), grad


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_second_plane_is_read_only_where_it_counts(shape, dtype):
    y, g = pair(*shape, dtype=dtype)
    near = (y + 0.1 * g).to(dtype)
    cases = [
        (g, {}, True),  # the errors' part is far larger
        (near, {}, False),  # of small errors
        (g, {"inv_weight": 0.0}, False),
        (g, {"var_weight": 100.0}, False),
        (g, {"cov_weight": 5e3}, False),
        (torch.full_like(g, float("nan")), {}, False),
    ]
    for target, weights, enough in cases:
        found, grad = gradient(y, target, **weights)
        assert found == enough, weights
        rest = gradient(y, target, rest=0.1, **weights)[1]
        assert torch.equal(rest.nan_to_num(), grad.nan_to_num()) == (enough or bool(target.isnan().any()))


def test_one_plane_would_not_do_for_a_difference():
    """The gradient of orthogonal rows is a small difference of large sums."""
    square = torch.linalg.qr(pair(64, 64)[0])[0]
    y = (8 * square[:48]).bfloat16()
    check_accuracy(VICREG, (y, y), "triton", inv_weight=0.0, var_weight=0.0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_where_one_plane_is_enough_the_gradient_is_eagers(shape, dtype):
    y, g = pair(*shape, dtype=dtype)
    check_accuracy(VICREG, (y, g), "triton")
    for weight in (0.5, 5.0, 50.0, 500.0):  # from enough to not
        check_accuracy(VICREG, (y, g), "triton", var_weight=0.0, cov_weight=weight)
