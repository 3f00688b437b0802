"""The weight of a supervision's loss at a step: a linear warm-up, then a decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..validation import check_choice, check_int, check_number

DECAYS = ("constant", "linear", "cosine", "polynomial", "exponential")


@dataclass(frozen=True)
class Weight:
    r"""Weight of a supervision's loss at a step: it rises linearly to alpha, and then decays to another value.

    .. math:: w(s) = \min(1, s / s_w) \, (e + (\alpha - e) \, f(x)), \quad
        x = \min(1, \max(0, (s - s_b) / (s_e - s_b)))

    f is 1 (constant), :math:`1 - x` (linear), :math:`(1 + \cos \pi x) / 2` (cosine) or :math:`(1 - x)^p` (polynomial),
    with ``warmup_steps`` :math:`s_w`, ``start_step`` :math:`s_b`, ``end_step`` :math:`s_e`, ``end`` e and ``power`` p.
    An exponential decay takes the same factor in each step: :math:`\min(1, s / s_w) \, \alpha \, (e / \alpha)^x`.

    Args:
        alpha (float): Weight at the end of the warm-up.
        warmup_steps (int): Steps over which it rises from 0. Default: 0.
        decay (str): ``"constant"``, ``"linear"``, ``"cosine"``, ``"polynomial"`` or ``"exponential"``. Default:
            ``"constant"``.
        end_step (int, optional): Step from which the weight is ``end``. Every decay but the constant needs it.
        end (float): Weight from ``end_step`` on; above alpha it rises. The exponential decay needs one above 0.
            Default: 0.
        power (float): Exponent of the polynomial decay. Default: 1.
        start_step (int, optional): Step up to which the weight is alpha, before it decays. Default: ``warmup_steps``.

    Shape:
        - Call: a step, an int or an integer tensor of any shape
        - Output: a float, or a float64 tensor of that shape

    Raises:
        ValueError: If an argument is out of range, or given to a decay that does not use it.

    Example:
        >>> weight = Weight(0.5, warmup_steps=4, decay="cosine", end_step=12)
        >>> [round(weight(step), 3) for step in (0, 2, 4, 8, 12)]
        [0.0, 0.25, 0.5, 0.25, 0.0]

    Source: the names of transformers' learning-rate schedules.
    """

    alpha: float
    warmup_steps: int = 0
    decay: str = "constant"
    end_step: int | None = None
    end: float = 0.0
    power: float = 1.0
    start_step: int | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"alpha": check_number("alpha", self.alpha), "end": check_number("end", self.end)}
        checked["warmup_steps"] = check_int("warmup_steps", self.warmup_steps, 0)
        checked["power"] = check_number("power", self.power)
        check_choice("decay", self.decay, DECAYS)
        if checked["power"] <= 0 or (self.decay != "polynomial" and checked["power"] != 1):
            raise ValueError(f"power must be above 0, and left out without decay='polynomial', got {self.power!r}")
        if self.decay == "constant":
            if (self.start_step, self.end_step, self.end) != (None, None, 0):
                raise ValueError("start_step, end_step and end must be left out of a constant weight, which stays")
        else:
            checked |= self._check_steps()
            if self.decay == "exponential" and min(checked["alpha"], checked["end"]) <= 0:
                raise ValueError(f"alpha and end must be above 0 to decay exponentially, got {self.alpha}, {self.end}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _check_steps(self) -> dict[str, int]:
        """Return the steps of a decay that are given."""
        name, start = "warmup_steps", check_int("warmup_steps", self.warmup_steps, 0)
        checked = {}
        if self.start_step is not None:
            name, start = "start_step", check_int("start_step", self.start_step, start)
            checked["start_step"] = start
        if self.end_step is None or check_int("end_step", self.end_step) <= start:
            raise ValueError(f"end_step must be an int above {name}={start}, got {self.end_step!r}")
        return checked | {"end_step": check_int("end_step", self.end_step)}

    def __call__(self, step: int | Tensor) -> Any:
        at: Any = step
        if isinstance(step, Tensor):
            at = step.to(torch.float32 if step.device.type == "mps" else torch.float64)  # MPS has no float64
        value: Any = self.alpha
        if self.end_step is not None:
            start = self.warmup_steps if self.start_step is None else self.start_step
            left = 1 - within((at - start) / (self.end_step - start))
            if self.decay == "cosine":
                # With the angle from the end on, so that the last value is exactly `end`.
                left = (1 - cos(left * math.pi)) / 2
            if self.decay == "exponential":
                value = self.end * (self.alpha / self.end) ** left
            else:
                value = self.end + (self.alpha - self.end) * left**self.power
        return within(at / self.warmup_steps) * value if self.warmup_steps else value


def within(x: Any) -> Any:
    """Return x, or the nearest of 0 and 1."""
    return x.clamp(0, 1) if isinstance(x, Tensor) else min(max(x, 0.0), 1.0)


def cos(x: Any) -> Any:
    return x.cos() if isinstance(x, Tensor) else math.cos(x)
