"""The class of a term, and the alignment that the terms of this package share: a projector, and a loss of rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..features import Features
from ..validation import check_flag, check_number, check_tensor, is_int
from .comparison import accepts, compare, make_loss
from .source import check_layer, choose
from .targets import read_target


class Term(nn.Module):
    """A part of a supervision's loss, made of a student's tensor and the teacher's features.

    A subclass defines ``forward``. A supervision passes those of ``weight``, ``index``, ``token_grid`` and ``scale``
    that its parameters name. It multiplies the loss of a term that does not take ``scale``.

    Args:
        weight (float): Factor of the term in its supervision's sum. Default: 1.
        teacher (str, optional): Name of its teacher, where there are several. Default: the one without a name.

    Shape:
        - student: a floating tensor whose first dimension is B; a subclass says more
        - Output: a scalar loss, and a dict of detached scalars

    Attributes:
        needs (frozenset of str): The features that it reads, of ``"global"``, ``"patch"`` and ``"layers"``.
        layers (tuple of ints): The layers that it reads. A teacher given by name returns their features.

    Raises:
        ValueError: If ``weight`` is no finite number, or ``teacher`` no name.

    Example:
        >>> class Distance(Term):
        ...     def forward(self, student, features):
        ...         return (student - features["global"]).square().mean(), {}
        >>> loss, logs = Distance(weight=0.5)(torch.zeros(2, 3), {"global": torch.ones(2, 3)})
        >>> loss.item()
        1.0
    """

    needs: frozenset[str] = frozenset({"global"})
    layers: tuple[int, ...] = ()
    takes: ClassVar[frozenset[str]] = frozenset()  # the names of forward's parameters

    def __init__(self, weight: float = 1.0, *, teacher: str | None = None) -> None:
        super().__init__()
        self.weight = check_number("weight", weight)
        if teacher is not None and not isinstance(teacher, str):
            raise TypeError(f"teacher must be None or the name of a teacher, got {type(teacher).__name__}")
        self.teacher = teacher

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.takes = frozenset(inspect.signature(cls.forward).parameters)

    def build(self, width: int) -> None:
        """Make what depends on the width of the teacher's features. A supervision calls it once, at construction."""

    def check(self, name: str, student: Any, batch: int, **options: Any) -> None:
        """Check a student's tensor and the options of a call before anything is computed.

        name: what the caller calls the tensor, for errors; batch: how many images there are; options: those of
        ``weight``, ``index`` and ``token_grid`` that were given.
        """
        check_tensor(name, student)
        if student.ndim < 1 or len(student) != batch:
            raise ValueError(f"{name} must have the images' batch size {batch}, got shape {list(student.shape)}")

    def read_target(self, name: str, target: Any, width: int | None) -> Features:
        """Return a target of a call as the features that ``forward`` gets in place of a teacher's.

        name: what the caller calls it, for errors; width: that of the features, where it is known.
        """
        return read_target(name, target, self.needs, width)

    def check_target(self, name: str, target: Features, student: Any, **options: Any) -> None:
        """Check that a target of a call fits a student that ``check`` has passed, with the options of that call.

        name: what the caller calls the target, for errors; target: what ``read_target`` returned.
        """

    def similarity(self, value: Tensor) -> Tensor:
        """Return the similarity that has this loss, for BySimilarity. A term without a similarity raises ValueError."""
        raise ValueError(f"{type(self).__name__} defines no similarity(value)")

    def forward(self, student: Tensor, features: Features) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss and its logs.

        student: the model's tensor; features: of the same images, on its device, detached unless the supervision's
        stopgrad_image is False. Logs are detached scalars by names without "loss". Key k of a term t is logged as
        dino_t_k, and "value" as dino_t, which is the loss if there is no "value".
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(student, features)")


class Parts(NamedTuple):
    """The parts of an alignment. A module that registers them under other names passes them."""

    projector: nn.Module
    loss: nn.Module
    grids: Any = None
    queries: Tensor | None = None


class Alignment(Term):
    """A term that projects the student and compares rows with the teacher's by a loss."""

    projector: nn.Module | None
    projector_name, loss_name = "projector", "loss"  # of the arguments that gave them, for errors

    def __init__(
        self,
        projector: nn.Module | None,
        *,
        out_dim: int | None,
        loss: str | nn.Module,
        eps: float | None,
        weight: float,
        normalize_weight: bool,
        backend: str | None,
        layer: int | Sequence[int] | None,
        teacher: str | None,
    ) -> None:
        super().__init__(weight, teacher=teacher)
        self.layers = check_layer(layer)
        if self.layers:
            self.needs = frozenset({"layers"})
        if projector is not None and not isinstance(projector, nn.Module):
            raise TypeError(f"projector must be a module or a name, got {type(projector).__name__}")
        if out_dim is not None and not is_int(out_dim):
            raise ValueError(f"out_dim must be None, the teacher's width, or a positive int, got {out_dim!r}")
        self.projector = projector
        self.loss = make_loss(loss, eps, backend)
        self.normalize_weight = check_flag("normalize_weight", normalize_weight)
        self.out_dim = out_dim

    def similarity(self, value: Tensor) -> Tensor:
        """Return the mean similarity of rows, if the loss has it."""
        of_loss = getattr(self.loss, "similarity", None)
        if of_loss is None:
            raise ValueError(f"{type(self.loss).__name__} has no cosine similarity")
        if not self.normalize_weight:
            raise ValueError("normalize_weight=False hides the similarity behind the sum of the weights")
        similarity: Tensor = of_loss(value)
        return similarity

    def parts(self) -> Parts:
        if self.projector is None:
            raise RuntimeError(
                f"{type(self).__name__} has no projector yet: give out_dim, or put it into a supervision"
            )
        return Parts(self.projector, self.loss)

    def forward(
        self, student: Tensor, features: Features, weight: Tensor | None = None, *, scale: float | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, times scale where that is given, and its logs. See Term."""
        return self.align(self.parts(), student, features, weight, scale=scale)

    def align(
        self, parts: Parts, student: Tensor, features: Features, weight: Tensor | None = None, *, scale: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute what forward does, with other parts."""
        raise NotImplementedError(f"{type(self).__name__} must define align(parts, student, features)")

    def read_target(self, name: str, target: Any, width: int | None) -> Features:
        """Return a target as Term does. A term that reads layers takes none."""
        if self.layers:
            raise ValueError(f"{name} must be left out: the term's target is {self.layers} of its teacher's layers")
        return super().read_target(name, target, width)

    def choose(self, features: Features) -> Features:
        """Return the features that the term reads: those of its layers, else the last ones."""
        return choose(features, self.layers, type(self).needs)

    def check_weight(self, weight: Any, rows: tuple[int, ...]) -> None:
        """Check the weights of rows or images. rows: the shape of all rows, whose first dimension is the images."""
        if weight is None:
            return
        check_tensor("weight", weight)
        if not accepts(self.loss, "weight"):
            raise ValueError(
                f"weight must be left out for {type(self.loss).__name__}, whose rows count together; "
                "give a dict of the other terms' weights"
            )
        if tuple(weight.shape) not in (rows[:1], rows):
            shapes = " or ".join(str(list(shape)) for shape in dict.fromkeys((rows[:1], rows)))
            raise ValueError(f"weight must be of shape {shapes}, got {list(weight.shape)}")

    def compare(
        self, parts: Parts, student: Tensor, target: Tensor, weight: Tensor | None, scale: Any, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scaled loss of rows, and the logs of what the loss returned."""
        if weight is not None and weight.ndim < student.ndim - 1:
            weight = weight.unsqueeze(1)
        options.update(weight=weight, normalize=self.normalize_weight, name=self.loss_name)
        return compare(parts.loss, student, target, scale, **options)


def stand_in(features: Mapping[str, Any], rows: int) -> Tensor:
    """Return the global token in place of each of so many patch tokens, [B, rows, D]."""
    token: Tensor = features["global"]
    return token.unsqueeze(1).expand(-1, rows, -1)
