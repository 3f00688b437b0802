"""The call of every op on rows: the checks of its arguments, and the scale of its loss."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .backend import choose
from .ops.plain import is_plain
from .reference.dtypes import acc_dtype, scaled
from .validation import check_choice, check_index, check_matching, check_positions, check_scalar, check_weight

REDUCTIONS = ("mean", "sum", "none")


def rows_loss(
    op: str,
    student: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: float | Tensor | None,
    reduction: str,
    backend: str | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of an op on rows and run it on the backend that is chosen.

    Returns:
        tuple: The loss, and the loss without scale and without a gradient, for logs.
    """
    index = options.get("index")
    if index is None:
        check_matching(student, target)
    else:
        check_index(index, student, target)
    if options.get("whiten") and math.prod(student.shape[:-1]) < 2:
        raise ValueError(f"whiten needs at least two rows, got student of shape {list(student.shape)}")
    weight = check_weight(weight, student)
    # Cast here: what becomes 0 in the dtype of the arithmetic leaves its row out, on every backend.
    weight = options["weight"] = None if weight is None else weight.to(acc_dtype(student, target))
    if index is not None and index.is_cpu and is_plain((index, weight)):  # elsewhere its values are not to be read
        check_positions(index, target, weight)
    options["reduction"] = check_choice("reduction", reduction, REDUCTIONS)
    if scale is not None:
        scale = check_scalar("scale", scale, student.device)
        scale = scale.to(acc_dtype(student, target)) if isinstance(scale, Tensor) else scale
    name, implementation = choose(op, student, backend)
    if name == "reference":
        value = implementation(student, target, **options)
        return (value if scale is None else scaled(value, scale)), value.detach()
    if isinstance(scale, float):
        scale = student.new_full((), scale, dtype=acc_dtype(student, target))
    return implementation(student, target, scale=scale, **options)
