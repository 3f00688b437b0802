"""The projector from the student's width to the teacher's."""

from typing import Any

import torch
from torch import Tensor, nn


class Projector(nn.Sequential):
    r"""Projects features to the teacher's width: Linear, GELU, LayerNorm, Linear.

    It is a plain Sequential: its parameters have the names of the code that it replaces (0.weight, 0.bias, 2.weight,
    2.bias, 3.weight, 3.bias), and that code's initial values from the same random seed.

    Args:
        in_dim (int): Width of the input. Default: 8192.
        hidden_dim (int): Width between the two Linear layers. Default: 4096.
        out_dim (int): Width of the result, the teacher's. Default: 1024.

    Shape:
        - Input: :math:`(..., in\_dim)`, in the parameters' dtype
        - Output: :math:`(..., out\_dim)`

    Raises:
        ValueError: If a width is no positive int.

    Example:
        >>> Projector(32, 64, 16)(torch.randn(4, 32)).shape
        torch.Size([4, 16])
    """

    def __init__(self, in_dim: int = 8192, hidden_dim: int = 4096, out_dim: int = 1024) -> None:
        for name, value in (("in_dim", in_dim), ("hidden_dim", hidden_dim), ("out_dim", out_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        super().__init__(
            nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, out_dim)
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def reach(*parameters: Tensor) -> Tensor:
    """Return a float32 0 that gives each parameter an exact zero gradient, even if one holds a NaN or is a shard."""
    local: list[Any] = [getattr(p, "to_local", lambda p=p: p)() for p in parameters]
    zeros = [p.flatten()[:0].float().sum() for p in local]
    return torch.stack(zeros).sum() if zeros else torch.zeros(())
