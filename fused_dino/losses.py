"""The losses as modules, their options fixed and checked at construction."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import functional as FD
from .functional import VICRegOutput
from .registry import OPS
from .validation import check_choice, check_flag, check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Loss(nn.Module):
    """An op of `functional` with its options fixed.

    detach_teacher: the teacher gets no gradient, as in the usual recipe. False lets it pass.
    options: the keyword arguments of the op. A wrong one raises here, not in training. A tensor among them moves with
        the module, and is in no state_dict().
    """

    op: Callable[..., Any]

    def __init__(self, *, detach_teacher: bool = True, **options: Any) -> None:
        super().__init__()
        self.detach_teacher = check_flag("detach_teacher", detach_teacher)
        if "weight" in options:
            raise TypeError(f"weight belongs to a call, {type(self).__name__}(...)(student, teacher, weight=...)")
        self.options = options
        tensors = {name: value for name, value in options.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            self.register_buffer(name, value, persistent=False)
        rows = torch.zeros(2, 1, device=next(iter(tensors.values()), torch.zeros(())).device)
        type(self).op(rows, rows, **FD.rehearsal(options))
        self.settings: dict[str, Any] = {**(type(self).op.__kwdefaults__ or {}), **options}

    def compute(self, student: Tensor, teacher: Tensor, **more: Any) -> Any:
        if self.detach_teacher and isinstance(teacher, Tensor):
            teacher = teacher.detach()
        options = {name: self._buffers.get(name, value) for name, value in self.options.items()}
        return type(self).op(student, teacher, **options, **more)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class CosineLoss(Loss):
    """One minus the cosine similarity of rows: ``functional.cosine_loss`` as a module.

    Args:
        detach_teacher (bool): Lets no gradient reach the teacher. Default: ``True``.
        **options: Keyword arguments of ``functional.cosine_loss``: alpha, reduction, eps, backend.

    Shape:
        - student, teacher: :math:`(..., D)`
        - weight, of a call: broadcastable to :math:`(...)`
        - Output: as the function's

    Raises:
        ValueError: If an option is out of range. The message names it.
        TypeError: If an option is unknown, or is ``weight``, which belongs to a call.

    Example:
        >>> loss = CosineLoss()(torch.randn(8, 64, requires_grad=True), torch.randn(8, 64))
        >>> loss.backward()
    """

    op = staticmethod(FD.cosine_loss)

    def forward(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
        """student, teacher [..., D], weight [...] -> as the function."""
        return self.compute(student, teacher, weight=weight)


class MSELoss(Loss):
    """Squared error of rows of length one: ``functional.mse_loss`` as a module.

    Args:
        detach_teacher (bool): Lets no gradient reach the teacher. Default: ``True``.
        **options: Keyword arguments of ``functional.mse_loss``: normalize, whiten, alpha, reduction, eps,
            backend.

    Shape:
        - student, teacher: :math:`(..., D)`
        - weight, of a call: broadcastable to :math:`(...)`
        - Output: as the function's

    Raises:
        ValueError: If an option is out of range. The message names it.
        TypeError: If an option is unknown, or is ``weight``, which belongs to a call.

    Example:
        >>> loss = MSELoss()(torch.randn(8, 64, requires_grad=True), torch.randn(8, 64))
        >>> loss.backward()
    """

    op = staticmethod(FD.mse_loss)

    def forward(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
        """student, teacher [..., D], weight [...] -> as the function."""
        return self.compute(student, teacher, weight=weight)


# The definitions in use, as options of vicreg_loss. Published VICReg has a variance and a covariance of both branches;
# with the second one frozen its gradient is that of the student's terms alone, under these weights: the mean of two
# variances leaves each half its weight, of which solo-learn takes the sum.
PUBLISHED = {"inv_weight": 25.0, "cov_weight": 1.0, "gamma": 1.0, "eps": 1e-4, "cov_reduction": "sum_over_d"}
PRESETS: dict[str, dict[str, Any]] = {
    "recipe": {},  # the defaults
    "vicreg": {**PUBLISHED, "var_weight": 12.5, "unbiased": True},
    "lightly": {**PUBLISHED, "var_weight": 12.5, "unbiased": True},
    "solo": {**PUBLISHED, "var_weight": 25.0, "unbiased": True},
}


class VICRegLoss(Loss):
    """Weighted invariance, variance and covariance of rows: ``functional.vicreg_loss`` as a module.

    Args:
        group (ProcessGroup or str, optional): Ranks whose rows count together. ``"auto"`` is the default process group
            once torch.distributed is initialised, and this process before. ``None`` is this process. A ProcessGroup
            names the data-parallel ranks where tensor or context parallelism makes them fewer. Default: ``"auto"``.
        **options: ``detach_teacher`` (default ``True``: no gradient reaches the teacher) and the keyword arguments of
            ``functional.vicreg_loss``: inv_weight, var_weight, cov_weight, gamma, eps, cov_reduction, unbiased, route,
            backend.

    Shape:
        - student, teacher: :math:`(N, D)`
        - Output: VICRegOutput of four scalars

    Raises:
        ValueError: If an option is out of range. The message names it.
        TypeError: If an option is unknown, or ``group`` is none of these.

    Example:
        >>> out = VICRegLoss.preset("vicreg")(torch.randn(8, 64, requires_grad=True), torch.randn(8, 64))
        >>> out.loss.backward()
    """

    op = staticmethod(FD.vicreg_loss)

    def __init__(self, *, group: ProcessGroup | str | None = "auto", **options: Any) -> None:
        super().__init__(**options)
        check_group(group, auto=True)
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> VICRegLoss:
        """A copy, for a moving average say, is of the same process group: that cannot be copied."""
        memo[id(self.group)] = self.group
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @classmethod
    def preset(cls, name: str, **options: Any) -> VICRegLoss:
        """The loss with the constants of a definition in use.

        The definitions regularise both branches. Here the teacher is frozen: the student's gradient is theirs, and the
        loss is theirs less the teacher's own variance and covariance, which are constants. lightly takes each rank's
        statistics alone unless told otherwise, as ``group=None`` does.

        Args:
            name (str): ``"recipe"`` (the defaults), ``"vicreg"`` (facebookresearch/vicreg, main_vicreg.py),
                ``"lightly"`` (lightly's VICRegLoss, the same) or ``"solo"`` (solo-learn, losses/vicreg.py, whose
                variance weighs twice as much).
            **options: Options that override the definition's.

        Returns:
            VICRegLoss: A new loss.

        Raises:
            ValueError: If the name is unknown.

        Example:
            >>> VICRegLoss.preset("solo").options["var_weight"]
            25.0
        """
        return cls(**{**PRESETS[check_choice("name", name, tuple(PRESETS))], **options})

    def forward(self, student: Tensor, teacher: Tensor) -> VICRegOutput:
        """student, teacher [N, D] -> VICRegOutput(loss, invariance, variance, covariance), scalars."""
        return self.compute(student, teacher, group=default_group() if self.group == "auto" else self.group)


def default_group() -> ProcessGroup | None:
    """The default process group once torch.distributed is initialised with more than one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


OURS = (CosineLoss, MSELoss, VICRegLoss)  # a subclass may have a forward of its own


def weighed(
    loss: Any, student: Tensor, teacher: Tensor, weight: float, alpha: float | Tensor | None
) -> tuple[Any, Tensor]:
    """(what the loss returned, weight * alpha * its scalar), the factor in the op where the op is known to take one."""
    factor = weight if alpha is None else weight * alpha
    if (
        type(loss) in OURS
        and OPS[loss.op.__name__].rowwise
        and loss.settings["reduction"] != "none"
        and loss.settings["alpha"] is None
        and not (loss._forward_hooks or loss._forward_pre_hooks)
    ):
        settings = {**loss.settings, "alpha": None if alpha is None and weight == 1 else factor}
        teacher = teacher.detach() if loss.detach_teacher else teacher
        scaled, value = FD.rows_loss(loss.op.__name__, student, teacher, **settings)
        return value, scaled
    out = loss(student, teacher)
    value = out.loss if isinstance(out, VICRegOutput) else out
    if not isinstance(value, Tensor) or value.ndim:
        raise TypeError(f"loss_type must return a scalar tensor, got {getattr(value, 'shape', type(value).__name__)}")
    return out, value * (factor.to(value) if isinstance(factor, Tensor) else factor)
