"""The projector from the student's width to the teacher's."""

from torch import nn

from ..validation import check_int


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
        in_dim, hidden_dim = check_int("in_dim", in_dim), check_int("hidden_dim", hidden_dim)
        out_dim = check_int("out_dim", out_dim)
        super().__init__(
            nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, out_dim)
        )
