"""The losses as modules, whose options are fixed and checked at construction."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import functional as FD
from .backend import on_reference
from .distributed import default_group
from .functional import Backend, Reduction, VICRegOutput
from .hidden import move
from .validation import check_choice, check_flag, check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Loss(nn.Module):
    """An op of `functional` with fixed options.

    A wrong option raises at construction, not in training. A tensor among the options moves with the module, and is in
    no state_dict(). The target gets its gradient too unless detach_teacher is set.
    """

    op: Callable[..., Any]

    def __init__(self, detach_teacher: bool, **options: Any) -> None:
        super().__init__()
        self.detach_teacher = check_flag("detach_teacher", detach_teacher)
        self.options = options
        for name, value in options.items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"{name} is on the meta device, where it has no value; make it outside, or give a number"
                )
        device = next((x.device for x in options.values() if isinstance(x, Tensor)), torch.device("cpu"))
        rows = torch.zeros(2, 1, device=device)
        type(self).op(rows, rows, **on_reference(options))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        super()._apply(fn, recurse)
        self.options = {name: move(x, fn) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return self

    def compute(self, student: Tensor, target: Tensor | None, **more: Any) -> Any:
        """Call the op with the options and those of this call."""
        if self.detach_teacher and isinstance(target, Tensor):
            target = target.detach()
        options = {name: x.to(student.device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return type(self).op(student, target, **options, **more)

    def extra_repr(self) -> str:
        """Return the options that differ from the op's defaults."""
        defaults = type(self).op.__kwdefaults__ or {}
        return ", ".join(f"{name}={value}" for name, value in self.options.items() if value != defaults[name])


class CosineLoss(Loss):
    """One minus the cosine similarity of rows: ``functional.cosine_loss`` as a module.

    Args:
        scale (float or Tensor, optional): As in the function, and so are reduction, eps and backend.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``. Default: ``"mean"``.
        eps (float): Smallest norm that divides. Default: 1e-12.
        detach_teacher (bool): Lets no gradient reach the target. Default: ``True``.
        backend (str, optional): Default: see ``use_backend``.

    Shape:
        - student, target: :math:`(..., D)`
        - weight, of a call: broadcastable to :math:`(...)`; a row of weight 0 is left out, whatever it holds
        - index, of a call: :math:`(B, M)` for a student :math:`(B, M, D)` and a target :math:`(B, N, D)`
        - Output: as the function's

    Raises:
        ValueError: If an option is out of range. The message names it.
        TypeError: If an option is unknown.

    Example:
        >>> loss = CosineLoss()(torch.randn(8, 64, requires_grad=True), torch.randn(8, 64))
        >>> loss.backward()
    """

    op = staticmethod(FD.cosine_loss)

    def __init__(
        self,
        *,
        scale: float | Tensor | None = None,
        reduction: Reduction = "mean",
        eps: float = 1e-12,
        detach_teacher: bool = True,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(detach_teacher, scale=scale, reduction=reduction, eps=eps, backend=backend)

    def forward(
        self, student: Tensor, target: Tensor, weight: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Return the function's result of student and target [..., D], with weight [...] and index [B, M]."""
        return self.compute(student, target, weight=weight, index=index)

    def similarity(self, loss: Tensor) -> Tensor:
        """Return the mean similarity of rows that has this loss. Options that hide it raise ValueError."""
        if self.options["scale"] is not None or self.options["reduction"] != "mean":
            raise ValueError("a CosineLoss with a scale, or another reduction than 'mean', tells no mean similarity")
        return 1 - loss


class MSELoss(Loss):
    """Squared error of rows of length one: ``functional.mse_loss`` as a module.

    Args:
        normalize (bool): Divides rows by their norms first, as in the function. Default: ``True``.
        whiten (bool): Standardises each column over all rows next. Default: ``False``.
        scale (float or Tensor, optional): As in the function.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``. Default: ``"mean"``.
        eps (float): Added to a deviation where ``whiten`` is set. Default: 1e-5.
        norm_eps (float): Smallest norm that divides where ``normalize`` is set. Default: 1e-12.
        detach_teacher (bool): Lets no gradient reach the target. Default: ``True``.
        backend (str, optional): Default: see ``use_backend``.

    Shape:
        - student, target: :math:`(..., D)`
        - weight, of a call: broadcastable to :math:`(...)`; a row of weight 0 is left out, whatever it holds
        - Output: as the function's

    Raises:
        ValueError: If an option is out of range. The message names it.
        TypeError: If an option is unknown.

    Example:
        >>> loss = MSELoss()(torch.randn(8, 64, requires_grad=True), torch.randn(8, 64))
        >>> loss.backward()
    """

    op = staticmethod(FD.mse_loss)

    def __init__(
        self,
        *,
        normalize: bool = True,
        whiten: bool = False,
        scale: float | Tensor | None = None,
        reduction: Reduction = "mean",
        eps: float = 1e-5,
        norm_eps: float = 1e-12,
        detach_teacher: bool = True,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(
            detach_teacher, normalize=normalize, whiten=whiten, scale=scale, reduction=reduction, eps=eps,
            norm_eps=norm_eps, backend=backend,
        )  # fmt: skip

    def forward(self, student: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the function's result of student and target [..., D], with weight [...]."""
        return self.compute(student, target, weight=weight)


# Definitions in use, as options of vicreg_loss. Published VICReg has a variance and a covariance of both branches. If
# the second branch is frozen, its gradient is that of the student's terms under these weights. A definition that
# averages the two variances gives each half the weight; solo-learn adds them.
PUBLISHED = {"inv_weight": 25.0, "cov_weight": 1.0, "gamma": 1.0, "eps": 1e-4, "cov_reduction": "sum_over_d"}
PRESETS: dict[str, dict[str, Any]] = {
    "seed": {},  # the defaults
    "vicreg": {**PUBLISHED, "var_weight": 12.5, "unbiased": True},
    "lightly": {**PUBLISHED, "var_weight": 12.5, "unbiased": True},
    "solo": {**PUBLISHED, "var_weight": 25.0, "unbiased": True},
}


class VICRegLoss(Loss):
    """Weighted invariance, variance and covariance of rows: ``functional.vicreg_loss`` as a module.

    Args:
        group (ProcessGroup or str, optional): Ranks whose rows count together. ``"auto"`` is the default process group
            once torch.distributed is initialised, and this process before. ``None`` is this process. A ProcessGroup
            names the data-parallel ranks where tensor or context parallelism makes them fewer. In eval mode or without
            gradients the rows are this process's alone, as in SyncBatchNorm: no rank waits. Default: ``"auto"``.
        inv_weight (float or Tensor): As in the function, and so are the options that follow. Default: 25.
        var_weight (float or Tensor): Weight of the variance. Default: 10.
        cov_weight (float or Tensor): Weight of the covariance. Default: 0.5.
        gamma (float): Deviation below which a column is pushed apart. Default: 1.
        eps (float): Added to a variance. Default: 1e-4.
        cov_reduction (str): ``"mean"`` or ``"sum_over_d"``. Default: ``"mean"``.
        unbiased (bool): Divides the variance by N - 1. Default: ``False``.
        both (bool): Regularises the target too, as an SSL trainer does. Default: ``False``.
        per (str): ``"batch"`` or ``"position"``. Default: ``"batch"``.
        route (str): ``"auto"``, ``"gram"`` or ``"covariance"``. Default: ``"auto"``.
        detach_teacher (bool, optional): Lets no gradient reach the target. ``both=True`` refuses ``True``. Default:
            ``True`` unless ``both`` is set.
        backend (str, optional): Default: see ``use_backend``.

    Shape:
        - student, target: :math:`(N, D)` or :math:`(B, N, D)`; ``None`` as target leaves the invariance out
        - Output: VICRegOutput of four scalars

    Raises:
        ValueError: If an option is out of range. The message names it.
        TypeError: If an option is unknown, or ``group`` is none of these.

    Example:
        >>> out = VICRegLoss.preset("vicreg")(torch.randn(8, 64, requires_grad=True), torch.randn(8, 64))
        >>> out.loss.backward()
    """

    op = staticmethod(FD.vicreg_loss)

    def __init__(
        self,
        *,
        group: ProcessGroup | str | None = "auto",
        inv_weight: float | Tensor = 25.0,
        var_weight: float | Tensor = 10.0,
        cov_weight: float | Tensor = 0.5,
        gamma: float = 1.0,
        eps: float = 1e-4,
        cov_reduction: Literal["mean", "sum_over_d"] = "mean",
        unbiased: bool = False,
        both: bool = False,
        per: Literal["batch", "position"] = "batch",
        route: Literal["auto", "gram", "covariance"] = "auto",
        detach_teacher: bool | None = None,
        backend: Backend | None = None,
    ) -> None:
        if both and detach_teacher:
            raise ValueError(
                "detach_teacher=True keeps gradients from what both=True regularises; leave one of them out"
            )
        super().__init__(
            not both if detach_teacher is None else detach_teacher, inv_weight=inv_weight, var_weight=var_weight,
            cov_weight=cov_weight, gamma=gamma, eps=eps, cov_reduction=cov_reduction, unbiased=unbiased, both=both,
            per=per, route=route, backend=backend,
        )  # fmt: skip
        check_group(group, auto=True)
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> VICRegLoss:
        """Copy the module, but not its process group, which cannot be copied."""
        memo[id(self.group)] = self.group
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @classmethod
    def preset(cls, name: str, **options: Any) -> VICRegLoss:
        """Returns the loss with the constants of a definition in use.

        The definitions regularise both branches. ``both=True`` gives their loss and both gradients. By default the loss
        is one-sided: it leaves out the variance and covariance of a frozen target, which are constants, and gives the
        student's gradient. lightly takes each rank's statistics alone, as ``group=None`` does.

        Args:
            name (str): ``"seed"`` (the defaults), ``"vicreg"`` (facebookresearch/vicreg, main_vicreg.py),
                ``"lightly"`` (lightly's VICRegLoss, the same) or ``"solo"`` (solo-learn, losses/vicreg.py, whose
                variance weighs twice as much).
            **options: Options in place of the definition's.

        Returns:
            VICRegLoss: A new loss.

        Raises:
            ValueError: If the name is unknown.

        Example:
            >>> VICRegLoss.preset("solo").options["var_weight"]
            25.0
        """
        return cls(**{**PRESETS[check_choice("name", name, tuple(PRESETS))], **options})

    def forward(self, student: Tensor, target: Tensor | None) -> VICRegOutput:
        """Return VICRegOutput(loss, invariance, variance, covariance), scalars, of [N, D] or [B, N, D]."""
        group = default_group() if self.group == "auto" else self.group
        alone = not (self.training and torch.is_grad_enabled())
        return self.compute(student, target, group=None if alone else group)
