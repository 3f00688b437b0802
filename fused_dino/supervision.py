"""A supervision: a teacher, its terms and a schedule, and what a trainer calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .calls import check_batch, check_terms, layers_of, share_out, take_targets, width_of
from .distributed import warn_if_unsynchronised
from .functional import Backend
from .schedule import Schedule
from .sizes import SizeRule
from .supervised import Call, Supervised, students_of
from .terms.base import Term
from .validation import check_flag


class Supervision(Supervised):
    r"""Adds a loss that aligns your model with a frozen teacher's features: the sum of terms under a schedule.

    Example:
        >>> teacher = DINOv2Backbone("vits14", pretrained=False)  # random weights; leave pretrained out for DINOv2's
        >>> supervision = Supervision(teacher, {"token": TokenTerm(in_dim=48, weight=0.5)})
        >>> images, hidden = torch.rand(2, 3, 256, 256) * 2 - 1, torch.randn(2, 64, 48)
        >>> list(supervision.loss_dict(images, {"token": hidden}))
        ['loss_dino', 'dino_token']

    .. math:: loss = \alpha(step) \sum_t w_t L_t

    Optimizers and checkpoints do not see the teacher, as in DinoSupervision.

    Args:
        teacher (str, nn.Module, dict or None): As in DinoSupervision. A dict has such teachers by name, and each term
            picks one by its ``teacher=``. None needs the ``targets`` of all terms in every call. A teacher that no term
            needs does not run. ``teachers[name]`` holds one of several, with its preprocessing.
        terms (dict of str to Term): The terms by name, such as ``{"token": TokenTerm(1152)}``. Their parameters are
            ``terms.<name>.*`` in a checkpoint.
        schedule (Schedule, optional): When the loss counts, and how much. Default: always, with a weight of 1.
        img_size (int, sequence of two ints or callable, optional): The teacher's input, as in DinoSupervision. For
            several teachers this and the two that follow are one value for all, or a dict by name. Default: the
            teacher's own, else 224.
        preprocess (str or nn.Module): As in DinoSupervision, and so are the options that follow.
        input_range (sequence of two floats, optional): Values that mean black and white.
        stopgrad_image (bool): False lets the gradient pass to the images, features and targets. Default: ``True``.
        backend (str, optional): Backend of the preprocessing; a term has its own. Default: see ``use_backend``.

    Shape:
        - images: :math:`(B, 3, H, W)` of any size; students: a dict of each term's tensor
        - Output: a scalar, and a dict of detached scalars, in float32, or float64 if an input or a projector is

    Raises:
        ValueError: If an argument is out of range. The message names it, what came and what would do.
        TypeError: If an argument is of a wrong type.
    """

    def __init__(
        self,
        teacher: str | nn.Module | Mapping[str, str | nn.Module] | None,
        terms: Mapping[str, Term],
        schedule: Schedule | None = None,
        *,
        img_size: int | Sequence[int] | SizeRule | Mapping[str, Any] | None = None,
        preprocess: str | nn.Module | Mapping[str, str | nn.Module] = "bilinear",
        input_range: Sequence[float] | Mapping[str, Sequence[float] | None] | None = None,
        stopgrad_image: bool = True,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        check_terms(terms)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be None or a Schedule, got {type(schedule).__name__}")
        self.stopgrad_image = check_flag("stopgrad_image", stopgrad_image)
        self.schedule = Schedule(1.0, 0) if schedule is None else schedule
        self.hold_all(
            teacher, layers_of(terms), backend, img_size=img_size, preprocess=preprocess, input_range=input_range
        )
        for name, term in terms.items():
            if not stopgrad_image and any(getattr(part, "detach_teacher", False) for part in term.modules()):
                raise ValueError(f"stopgrad_image=False needs a loss of {name} with detach_teacher=False")
            if (width := width_of(name, term, self.sources())) is not None:
                term.build(width)
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
        targets: Mapping[str, Any] | None = None,
        alpha: float | Tensor | None = None,
        as_dict: bool = False,
        step: int | None = None,
    ) -> Any:
        """Returns the loss without alpha and warm-up, and its logs; or with ``as_dict`` what ``loss_dict`` returns.

        Wrappers such as DistributedDataParallel reach this method alone.

        Args:
            images (Tensor, optional): Images, as for ``encode``.
            students (dict of str to Tensor): Each term's tensor, or list of tensors, of the same images.
            features (dict, optional): What ``encode`` returned, in place of ``images``. Teachers that no term needs may
                be left out.
            weight (Tensor or dict, optional): Weights of the images [B], or a dict by term, for tokens [B] or [B, N]. A
                row of weight 0 is left out.
            index (Tensor or dict, optional): Positions [B, N] of the tokens on ``token_grid``, else on the teacher's
                grid; a dict by term where several terms take one.
            token_grid (sequence of two ints, optional): Rows and columns of the tokens in this call.
            targets (dict, optional): Tensors by term in place of the teacher's features, such as an EMA's hidden
                states: [B, D] for a GlobalTerm, [B, N, D] for tokens and regions. Tokens may be frames [B, T, N, D], a
                map [B, D, h, w] or a dict with ``'patch'`` and ``'grid'``. As many tokens as the student's are compared
                one by one. Other tokens need a grid of their own, or ``token_grid``, whose aspect ratio they take.
                Targets are detached, unless ``stopgrad_image=False``. D is the term's ``out_dim``, else the teacher's.
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
        calls = self._calls(images, students, features, weight, index, token_grid, targets)
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
        targets: Mapping[str, Any] | None = None,
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
            targets (dict, optional): Tensors in place of the teacher's features.

        Returns:
            dict: ``loss_dino``, which carries the gradient, and ``forward``'s logs, whose names do not contain "loss".
            After the schedule's stop it is an exact zero, without the logs of the terms. The schedule may add logs of
            its own.

        Raises:
            ValueError: If an input does not fit. The message names it.
            TypeError: If an input is no tensor.
        """
        if self.training:
            warn_if_unsynchronised(self)
        options: dict[str, Any] = {"features": features, "weight": weight, "index": index, "token_grid": token_grid}
        options["targets"] = targets
        calls = self._calls(images, students, **options)
        return self._scheduled(partial(self, images, students, **options), step, calls, *students_of(calls))

    def _calls(
        self, images: Any, students: Any, features: Any, weight: Any, index: Any, token_grid: Any, targets: Any
    ) -> dict[str, Call]:
        """Check a call, and return the calls of its terms."""
        terms: dict[str, Any] = dict(self.terms.items())
        if not isinstance(students, Mapping) or students.keys() != terms.keys():
            got = sorted(map(str, students)) if isinstance(students, Mapping) else type(students).__name__
            raise ValueError(f"students must be a dict with a tensor for each of the terms {sorted(terms)}, got {got}")
        given = take_targets(terms, targets, self.sources())
        needed = {term.teacher for name, term in terms.items() if name not in given}
        batch = check_batch(self.check_inputs(images, features, needed, "images"), given)
        shares = share_out(terms, weight=weight, index=index, token_grid=token_grid)
        for name, term in terms.items():
            term.check(f"students[{name!r}]", students[name], batch, **shares[name])
            if name in given:
                term.check_target(f"targets[{name!r}]", given[name], students[name], **shares[name])
        return {
            name: Call(term, students[name], shares[name], term.weight, target=given.get(name))
            for name, term in terms.items()
        }

    def extra_repr(self) -> str:
        kinds = [type(source.teacher).__name__ for source in self.sources().values()]
        return f"teacher={', '.join(kinds) or None} (frozen, not a submodule)"


def check_schedule(schedule: Schedule, terms: Mapping[str, Term]) -> None:
    """Check that the terms have the similarity that a schedule follows, and that no term logs under its names."""
    taken = terms.keys() & set(schedule.log_names)
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
