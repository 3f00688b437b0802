"""A supervision: a teacher, its terms and a schedule. It answers as a trainer wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import warn_if_unsynchronised
from .functional import Backend
from .legacy_checkpoint import Legacy, adopt, watch_parents
from .live import live_tensors, reach
from .schedule import Schedule
from .sizes import SizeRule, check_img_size
from .teacher.given import make_preprocess, make_teacher
from .teacher.held import Taught
from .terms.base import Parts, Term
from .validation import check_flag, check_scalar


class Call(NamedTuple):
    """A term, what it gets in one call, its factor in the sum, and the parts that it uses in place of its own."""

    term: Any
    student: Tensor
    options: dict[str, Any]
    weight: float
    parts: Parts | None = None

    def run(self, features: Any, alpha: float | Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss times weight and alpha, and the logs."""
        scale = self.weight if alpha is None else self.weight * alpha
        folded = None if alpha is None and self.weight == 1 else scale
        if self.parts is not None:
            return self.term.align(self.parts, self.student, features, scale=folded, **self.options)
        if "scale" in self.term.takes:
            return self.term(self.student, features, scale=folded, **self.options)
        loss, logs = self.term(self.student, features, **self.options)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = getattr(loss, "shape", type(loss).__name__)
            raise TypeError(f"{type(self.term).__name__} must return a scalar tensor as its loss, got {got}")
        return loss * (scale.to(loss) if isinstance(scale, Tensor) else scale), {"value": loss.detach(), **logs}

    def similarity(self, value: Tensor) -> Tensor:
        """Return the similarity that the logged loss means: NaN where all rows are left out."""
        weight, found = self.options.get("weight"), self.term.similarity(value)
        return found if weight is None else torch.where((weight != 0).any(), found, torch.nan)


class Supervised(Taught):
    """What every supervision does with the calls of its terms."""

    schedule: Schedule
    legacy: Legacy | None = None  # names in others' checkpoints

    def __init__(self) -> None:
        super().__init__()
        watch_parents()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        adopt(self, state_dict, prefix, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _sum(
        self, calls: Mapping[str, Call], x_img: Any, features: Any, alpha: Any, zeros: Sequence[Tensor] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the terms' losses, and their logs by the names of a trainer's log."""
        needs = frozenset().union(*(call.term.needs for call in calls.values()))
        features = self._features(x_img, features, next(iter(calls.values())).student.device, needs)
        if alpha is not None:
            alpha = check_scalar("alpha", alpha, self.schedule.step.device)
        losses, logs = list(zeros), {}
        for name, call in calls.items():
            loss, found = call.run(features, alpha)
            losses.append(loss)
            if any("loss" in key for key in found):
                raise ValueError(f"logs of {name} must have names without 'loss', which trainers add up: {list(found)}")
            logs.update({self._log_name(name, key): value for key, value in found.items()})
            if "is_global" in found:
                self._warn_once()
        return sum(losses[1:], losses[0]), logs

    def _log_name(self, name: str, key: str) -> str:
        return f"dino_{name}" if key == "value" else f"dino_{name}_{key}"

    def _scheduled(
        self, run: Callable[..., Any], step: int | None, calls: Mapping[str, Call], *inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Return what run(alpha=...) gives under the schedule, or the zero after its stop, and count a step.

        The step is counted at the end, since a call that raises is none.
        """
        schedule = self.schedule
        now = schedule.begin(step)
        if schedule.skips(now):
            loss, logs = self._zero(*inputs), {}
            more = schedule.logs(0.0, loss)
        else:
            loss, logs = run(alpha=schedule.factor(now))
            similarity = None if schedule.watch is None else self._similarity(calls, logs, schedule.watch.stop.term)
            loss, more = schedule.settle(loss, now, similarity)
        if step is None:
            schedule.advance()
        return {"loss_dino": loss, **logs, **{f"dino_{key}": value for key, value in more.items()}}

    def _similarity(self, calls: Mapping[str, Call], logs: Mapping[str, Tensor], term: str | None) -> Tensor:
        """Return the similarity of a call's term, or the mean of all, from the logs."""
        if term is not None and term not in calls:
            raise ValueError(f"BySimilarity's term {term!r} must be one of the call's: {', '.join(calls)}")
        names = list(calls) if term is None else [term]
        return torch.stack([calls[name].similarity(logs[self._log_name(name, "value")]) for name in names]).mean()

    def _zero(self, *inputs: Tensor | None, without: str = "") -> Tensor:
        """Return 0 that gives inputs and parameters a zero gradient. without: a child that is left out."""
        parts = [part for name, part in self.named_children() if name != without]
        tensors = [x for part in parts for x in live_tensors(part) if x.is_floating_point()]
        tensors += [x for x in (*self._parameters.values(), *inputs) if x is not None]
        return reach(*tensors)

    def _check_alpha(self, alpha: Any, as_dict: bool, step: Any) -> None:
        if as_dict and alpha is not None:
            raise ValueError("alpha must be left out with as_dict=True, whose weight is the schedule's")
        if step is not None and not as_dict:
            raise ValueError("step must be left out, or as_dict=True given: only the schedule's weight depends on it")


class Supervision(Supervised):
    r"""Adds a loss that aligns your model with a frozen teacher's features: the sum of terms under a schedule.

    Example:
        >>> teacher = DINOv2Backbone("vits14", pretrained=False)  # random weights; leave pretrained out for DINOv2's
        >>> supervision = Supervision(teacher, {"token": TokenTerm(in_dim=48, weight=0.5)})
        >>> images, hidden = torch.rand(2, 3, 256, 256) * 2 - 1, torch.randn(2, 64, 48)
        >>> list(supervision.loss_dict(images, {"token": hidden}))
        ['loss_dino', 'dino_token']

    .. math:: loss = \alpha(step) \sum_t w_t L_t

    The teacher is invisible to the trainer, as in DinoSupervision.

    Args:
        teacher (str or nn.Module): As in DinoSupervision.
        terms (dict of str to Term): The terms by name, such as ``{"token": TokenTerm(1152)}``. Their parameters are
            ``terms.<name>.*`` in a checkpoint.
        schedule (Schedule, optional): When the loss counts, and how much. Default: always, by a weight of 1.
        img_size (int, sequence of two ints or callable, optional): The teacher's input, as in DinoSupervision. Default:
            the teacher's own, else 224.
        preprocess (str or nn.Module): As in DinoSupervision, and so are the options that follow.
        input_range (sequence of two floats, optional): Values that mean black and white.
        stopgrad_image (bool): Default: ``True``.
        backend (str, optional): Backend of the preprocessing; a term has its own. Default: see ``use_backend``.

    Shape:
        - images: :math:`(B, 3, H, W)` of any size; students: a dict of each term's tensor
        - Output: a scalar in float32, float64 where an input or a projector is, and a dict of detached scalars

    Raises:
        ValueError: If an argument is out of range. The message names it, what came and what would do.
        TypeError: If an argument is of a wrong type.
    """

    def __init__(
        self,
        teacher: str | nn.Module,
        terms: Mapping[str, Term],
        schedule: Schedule | None = None,
        *,
        img_size: int | Sequence[int] | SizeRule | None = None,
        preprocess: str | nn.Module = "bilinear",
        input_range: Sequence[float] | None = None,
        stopgrad_image: bool = True,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        check_terms(terms)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be None or a Schedule, got {type(schedule).__name__}")
        if img_size is None:
            img_size = getattr(teacher, "img_size", None) or 224
        self.img_size = check_img_size(img_size)
        self.stopgrad_image = check_flag("stopgrad_image", stopgrad_image)
        self.schedule = Schedule(1.0, 0) if schedule is None else schedule
        layers = dict.fromkeys(n for term in terms.values() for n in term.layers)
        self.teacher = make_teacher(teacher, self.img_size, True, None, layers)
        self.preprocess = make_preprocess(preprocess, self.img_size, input_range, self.teacher, backend)
        self.teacher_grid = self._find_grid(img_size)
        for name, term in terms.items():
            if not stopgrad_image and any(getattr(part, "detach_teacher", False) for part in term.modules()):
                raise ValueError(f"stopgrad_image=False needs a loss of {name} with detach_teacher=False")
            term.build(int(self.teacher.embed_dim))
        self.terms = nn.ModuleDict(terms)
        check_schedule(self.schedule, terms)

    def forward(
        self,
        images: Tensor | None = None,
        students: Mapping[str, Tensor] | None = None,
        *,
        features: Mapping[str, Any] | None = None,
        weight: Tensor | Mapping[str, Tensor] | None = None,
        index: Tensor | Mapping[str, Tensor] | None = None,
        token_grid: Sequence[int] | None = None,
        alpha: float | Tensor | None = None,
        as_dict: bool = False,
        step: int | None = None,
    ) -> Any:
        """Returns the loss without alpha and warm-up, and its logs; or with ``as_dict`` what ``loss_dict`` returns.

        Wrappers such as DistributedDataParallel reach this method alone.

        Args:
            images (Tensor, optional): Images, as for ``encode``.
            students (dict of str to Tensor): Each term's tensor, of the same images.
            features (dict, optional): What ``encode`` returned, in place of ``images``.
            weight (Tensor or dict, optional): Weights of the images [B], or a dict by term, for tokens [B] or [B, N]. A
                row of weight 0 is left out.
            index (Tensor or dict, optional): Positions [B, N] of the tokens on ``token_grid``, else on the teacher's
                grid; a dict by term where several terms take one.
            token_grid (sequence of two ints, optional): Rows and columns of the tokens in this call.
            alpha (float or Tensor, optional): Scale of the loss, a number or a scalar tensor. Default: ``None``.
            as_dict (bool): Returns ``loss_dict``'s result, and counts a step as it does. Default: ``False``.
            step (int, optional): As in ``loss_dict``; only with ``as_dict``.

        Returns:
            tuple or dict: The loss, and detached logs: ``dino_<term>``, the term's loss without its weight, and
            ``dino_<term>_<key>`` for each log of the term.

        Raises:
            ValueError: If an input does not fit. The message names it.
            TypeError: If an input is no tensor.
        """
        self._check_alpha(alpha, as_dict, step)
        calls = self._calls(images, students, features, weight, index, token_grid)
        run = partial(self._sum, calls, images, features)
        return self._scheduled(run, step, calls, *students_of(calls)) if as_dict else run(alpha)

    def loss_dict(
        self,
        images: Tensor | None = None,
        students: Mapping[str, Tensor] | None = None,
        step: int | None = None,
        *,
        features: Mapping[str, Any] | None = None,
        weight: Tensor | Mapping[str, Tensor] | None = None,
        index: Tensor | Mapping[str, Tensor] | None = None,
        token_grid: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the weighted loss and its logs, for trainers that add up every key that contains "loss".

        Args:
            images (Tensor, optional): As in ``forward``.
            students (dict of str to Tensor): As in ``forward``.
            step (int, optional): The training step, as in DinoSupervision. Default: counts the calls.
            features (dict, optional): As in ``forward``, and so are the arguments that follow.
            weight (Tensor or dict, optional): Weights of rows.
            index (Tensor or dict, optional): Positions of tokens.
            token_grid (sequence of two ints, optional): Rows and columns of the tokens.

        Returns:
            dict: ``loss_dino``, which carries the gradient, and ``forward``'s logs, whose names do not contain "loss".
            From the schedule's ``stop_step`` on ``loss_dino`` alone, an exact zero.

        Raises:
            ValueError: If an input does not fit. The message names it.
            TypeError: If an input is no tensor.
        """
        if self.training:
            warn_if_unsynchronised(self)
        options = {"features": features, "weight": weight, "index": index, "token_grid": token_grid}
        calls = self._calls(images, students, **options)
        return self._scheduled(partial(self, images, students, **options), step, calls, *students_of(calls))

    def _calls(
        self, images: Any, students: Any, features: Any, weight: Any, index: Any, token_grid: Any
    ) -> dict[str, Call]:
        """Check a call, and return those of its terms."""
        terms: dict[str, Any] = dict(self.terms.items())
        if not isinstance(students, Mapping) or students.keys() != terms.keys():
            got = sorted(map(str, students)) if isinstance(students, Mapping) else type(students).__name__
            raise ValueError(f"students must be a dict with a tensor for each of the terms {sorted(terms)}, got {got}")
        batch = self._check_images(images, features, "images")
        shares = share_out(terms, weight=weight, index=index, token_grid=token_grid)
        for name, term in terms.items():
            term.check(f"students[{name!r}]", students[name], batch, **shares[name])
        return {name: Call(term, students[name], shares[name], term.weight) for name, term in terms.items()}

    def extra_repr(self) -> str:
        return f"teacher={type(self.teacher).__name__} (frozen, not a submodule)"


def students_of(calls: Mapping[str, Call]) -> list[Tensor]:
    return [call.student for call in calls.values()]


def check_terms(terms: Any) -> None:
    """Check terms by name. Trainers add up every log that contains "loss", so that no name may."""
    if not isinstance(terms, Mapping) or not terms:
        raise ValueError(f"terms must be a dict of at least one term by name, got {terms!r}")
    for name, term in terms.items():
        if not isinstance(name, str) or not name.isidentifier() or "loss" in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"terms must have names that are identifiers without 'loss', and no dict's, got {name!r}")
        if not isinstance(term, Term):
            raise TypeError(f"terms[{name!r}] must be a Term, got {type(term).__name__}")


def check_schedule(schedule: Schedule, terms: Mapping[str, Term]) -> None:
    """Check that the terms have the similarity that a schedule follows, and that no log has the name of its."""
    taken = schedule.logs(0.0, torch.zeros(())).keys() & terms.keys()
    if taken:
        raise ValueError(f"terms must not have the names of the schedule's logs: {', '.join(sorted(taken))}")
    if schedule.watch is None:
        return
    term = schedule.watch.stop.term
    if term is not None and term not in terms:
        raise ValueError(f"BySimilarity's term must be one of {', '.join(terms)}, got {term!r}")
    for name in terms if term is None else (term,):
        try:
            terms[name].similarity(torch.zeros(()))
        except ValueError as error:
            raise ValueError(f"BySimilarity cannot follow the term {name!r}: {error}; give term= another") from None


def share_out(terms: Mapping[str, Term], **options: Any) -> dict[str, dict[str, Any]]:
    """Return the options of a call by term. One that is a dict names its terms; else it goes to all that take it.

    Weights leave images out of the loss, so that a term without them would have to be told.
    """
    shares: dict[str, dict[str, Any]] = {name: {} for name in terms}
    for option, value in options.items():
        takers = [name for name, term in terms.items() if option in term.takes]
        if value is None:
            continue
        if not takers:
            raise ValueError(f"{option} must be left out: none of the terms {', '.join(terms)} takes it")
        if not isinstance(value, Mapping):
            if option == "weight" and len(takers) < len(terms):
                others = ", ".join(name for name in terms if name not in takers)
                raise ValueError(f"weight must be a dict by term, since {others} takes none")
            if option == "index" and len(takers) > 1:
                raise ValueError(f"index must be a dict by term, since several take one: {', '.join(takers)}")
            value = dict.fromkeys(takers, value)
        for name, its in value.items():
            if name not in takers:
                raise ValueError(f"{option} is given to {name!r}; the terms that take it are {', '.join(takers)}")
            if its is not None:
                shares[name][option] = its
    return shares
