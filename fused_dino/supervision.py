"""DinoSupervision: it aligns projected latents and tokens with a frozen teacher's features of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .distributed import warn_if_unsynchronised
from .factories import check_latent_shape, check_latents, make_loss, make_preprocess, make_teacher
from .features import Features
from .functional import Backend
from .legacy_checkpoint import adopt, watch_parents
from .live import dtype_of, live_tensors, reach
from .losses import CosineLoss, logs_of, weighed
from .schedule import Schedule
from .teacher.held import Taught
from .terms.projector import Projector
from .terms.regions import LOCAL_HIDDEN_DIM, PATCH_TARGETS, Patches
from .terms.tokens import TokenGrids, check_token_dim, check_tokens, make_token_projector, project
from .validation import check_choice, check_flag, check_int, check_number, check_scalar, check_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATCH_LOGS = ("dino_patch", "dino_token")  # of the terms that use the teacher's patch tokens


class DinoSupervision(Taught):
    r"""Adds a loss that aligns your model's latent, or its hidden tokens, with a frozen teacher's features.

    Example:
        >>> teacher = DINOv2Backbone("vits14", pretrained=False)  # random weights; leave pretrained out for DINOv2's
        >>> dino = DinoSupervision(in_dim=64, teacher=teacher, hidden_dim=32, input_range=(-1, 1))
        >>> z_text, images = torch.randn(2, 64), torch.rand(2, 3, 256, 256) * 2 - 1
        >>> losses = dino.loss_dict(z_text, images)
        >>> losses["loss_dino"].backward()
        >>> list(losses)
        ['loss_dino', 'dino_global']

    .. math::
        loss = w_{global} \, L(P(z), g) + w_{patch} \operatorname{mean}(1 - \cos(P_l(z_k), g_k))
        + w_{token} \operatorname{mean}(1 - \cos(P_t(h_n), g_n))

    with the projectors P, the latent z and its regions, hidden tokens h, and the teacher's global token and patch
    tokens g. ``loss_dict`` weighs it: ``loss_dino = alpha * min(1, step / warmup_steps) * loss``.

    The teacher is frozen, in eval mode, and in no ``modules()``, ``parameters()`` or ``state_dict()``: no optimizer,
    EMA, DDP or checkpoint sees it. ``.to()``, deepcopy and pickle carry it along. A deep copy, such as an EMA's, shares
    its memory until one of the two is moved, cast or loaded. A weight that is written in place is written in both.

    Args:
        in_dim (int, optional): Width of ``z_text``. None aligns tokens alone. Default: 8192.
        teacher (str or nn.Module): A DINOv2 variant (see DINOv2Backbone), another model of timm's by name,
            or a module with ``embed_dim`` that returns {'global': [B, D], 'patch': [B, N, D] or None}. Its ``mean``,
            ``std`` and ``patch_size`` are read where it has them, else ImageNet's and 14. Default: ``"vitl14"``.
        img_size (int or sequence of two ints): The teacher's input, multiples of its patch size. Default: 224.
        loss_type (str or nn.Module): Loss of the global term: ``"cosine"``, ``"mse"`` (normalised), ``"vicreg"``, or a
            module (student [B, D], target [B, D]) -> scalar. Default: ``"cosine"``.
        alpha (float): Weight of the loss in ``loss_dict``. Default: 0.2.
        warmup_steps (int): Steps over which that weight rises linearly. Default: 5000.
        stop_step (int, optional): Step from which ``loss_dict`` gives an exact zero that still reaches every parameter,
            and the teacher does not run. Default: never.
        w_global (float): Weight of the global term. Default: 1.
        use_patch (bool): Aligns regions too: ``z_text``, read as a map, pooled to ``patch_grid``. Default: ``False``.
        w_patch (float): Weight of the regions' term. Default: 0.2.
        patch_grid (sequence of two ints): Rows and columns of regions. Default: (2, 2).
        latent_shape (sequence of three ints): Channels, rows and columns of ``z_text`` as a map. Default: (4, 32, 32).
        patch_target (str): Target of a region: ``"region"`` pools the teacher's tokens in it, ``"mean"`` all tokens,
            ``"nearest"`` takes the most similar token, ``"attention"`` a mean by learnt queries, which may collapse
            onto tokens that are easy to match. Default: ``"region"``.
        token_dim (int, optional): Width of hidden tokens [B, N, token_dim], to be aligned with the teacher's patch
            tokens. Default: there are none.
        w_token (float): Weight of the tokens' term. Default: 0.5.
        token_projector (str or nn.Module): ``"mlp"`` (REPA's, arXiv 2410.06940), ``"conv"`` (a 3 x 3 convolution over
            the grid), or a module [B, N, token_dim] -> [B, N, D]. Default: ``"mlp"``.
        token_grid (sequence of two ints, optional): Rows and columns of the tokens. Default: the teacher's where N is
            its count, else a square. The smaller grid is resampled bilinearly to the larger.
        token_standardize (bool): Brings each channel of the teacher's tokens to mean 0 and deviation 1 over an image's
            positions, with 1e-6 added to the deviation. Default: ``False``.
        stopgrad_image (bool): False lets the gradient pass through the teacher to the image, which must be floats.
            Default: ``True``.
        hidden_dim (int): Hidden width of the projector. The local projector's is 256, the tokens' 2048. Default: 4096.
        pretrained (bool): Weights of a teacher given by name; False gives random ones. Default: ``True``.
        teacher_dtype (torch.dtype, optional): Dtype to cast the teacher to. Default: the one of its weights.
        group (ProcessGroup or str, optional): Ranks over whose rows VICReg's statistics are taken: ``"auto"`` (all
            processes once torch.distributed is initialised), None (this process) or a group. A ``loss_type`` that is a
            module has its own. Default: ``"auto"``.
        preprocess (str or nn.Module): ``"bilinear"``, ``"bicubic"``, or a module (images) -> the teacher's input, such
            as ``Preprocess(224, antialias=True)``. Default: ``"bilinear"``.
        input_range (sequence of two floats, optional): Values that mean black and white in the images; a preprocess
            module has its own. ``check(images)`` says whether a batch lies in it. Default: ``(-1, 1)`` for floats,
            ``(0, 255)`` for uint8.
        backend (str, optional): Backend of every op but those of given modules: ``"auto"``, ``"reference"``,
            ``"torch"`` or ``"triton"``. Default: see ``use_backend``.

    Shape:
        - z_text: :math:`(B, in\_dim)`; x_img: :math:`(B, 3, H, W)` of any size; tokens: :math:`(B, N, token\_dim)`
        - Output: a scalar in float32, float64 where an input or the projector is, and a dict of detached scalars

    Raises:
        ValueError: If an argument is out of range. The message names it, what came and what would do.
        TypeError: If an argument is of a wrong type.
    """

    loads_legacy = True
    projector: Projector
    local_projector: Projector
    token_projector: nn.Module

    def __init__(
        self,
        in_dim: int | None = 8192,
        *,
        teacher: str | nn.Module = "vitl14",
        img_size: int | Sequence[int] = 224,
        loss_type: str | nn.Module = "cosine",
        alpha: float = 0.2,
        warmup_steps: int = 5000,
        stop_step: int | None = None,
        w_global: float = 1.0,
        use_patch: bool = False,
        w_patch: float = 0.2,
        patch_grid: Sequence[int] = (2, 2),
        latent_shape: Sequence[int] = (4, 32, 32),
        patch_target: str = "region",
        token_dim: int | None = None,
        w_token: float = 0.5,
        token_projector: str | nn.Module = "mlp",
        token_grid: Sequence[int] | None = None,
        token_standardize: bool = False,
        stopgrad_image: bool = True,
        hidden_dim: int = 4096,
        pretrained: bool = True,
        teacher_dtype: torch.dtype | None = None,
        group: ProcessGroup | str | None = "auto",
        preprocess: str | nn.Module = "bilinear",
        input_range: Sequence[float] | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        watch_parents()
        self.img_size = check_size(img_size, "img_size")
        self.w_global = check_number("w_global", w_global)
        self.w_patch = check_number("w_patch", w_patch)
        self.w_token = check_number("w_token", w_token)
        self.schedule = Schedule(alpha, warmup_steps, stop_step)
        self.patch_target = check_choice("patch_target", patch_target, PATCH_TARGETS)
        self.patch_grid = check_size(patch_grid, "patch_grid")
        self.use_patch = check_flag("use_patch", use_patch)
        self.stopgrad_image = check_flag("stopgrad_image", stopgrad_image)
        self.in_dim = in_dim
        self.token_dim = check_token_dim(token_dim, token_projector, token_grid, token_standardize)
        self.group = group
        self.loss = make_loss(loss_type, stopgrad_image, group, backend)
        if in_dim is None and (token_dim is None or use_patch):
            raise ValueError("in_dim must be z_text's width, or None with token_dim given and use_patch=False")
        self.latent_shape = shape = check_latent_shape(latent_shape, in_dim if use_patch else None)

        self.teacher = make_teacher(teacher, self.img_size, pretrained, teacher_dtype)
        self.preprocess = make_preprocess(preprocess, self.img_size, input_range, self.teacher, backend)
        self.teacher_grid = self._find_grid(img_size)

        width = int(self.teacher.embed_dim)
        if in_dim is not None:
            self.projector = Projector(in_dim, hidden_dim, width)
        self.patch_queries: nn.Parameter | None = None
        if use_patch:
            self.local_projector = Projector(shape[0], LOCAL_HIDDEN_DIM, width)
            self.patches = Patches(self.patch_target, shape, self.patch_grid, self.teacher_grid)
            if self.patch_target == "attention":
                self.patch_queries = nn.Parameter(0.02 * torch.randn(self.patches.count, width))
        if token_dim is not None:
            self.token_grids = TokenGrids(token_grid, self.teacher_grid, token_standardize)
            grids = self.token_grids.token_grid, self.teacher_grid
            self.token_projector = make_token_projector(token_projector, token_dim, width, *grids)
        # For regions and tokens. Their targets are detached already, except for the queries, which need a gradient.
        self.row_loss = CosineLoss(detach_teacher=False, backend=backend)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        adopt(self, state_dict, prefix, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        z_text: Tensor | None = None,
        x_img: Tensor | None = None,
        *,
        features: Mapping[str, Any] | None = None,
        tokens: Tensor | None = None,
        alpha: float | Tensor | None = None,
        as_dict: bool = False,
        step: int | None = None,
    ) -> Any:
        """Returns the loss without alpha and warm-up, and its terms; or with ``as_dict`` what ``loss_dict`` returns.

        Wrappers such as DistributedDataParallel reach this method alone: ``DDP(dino)(z_text, x_img, as_dict=True)``.

        Args:
            z_text (Tensor, optional): Latents [B, in_dim], cast to the projector's dtype. None with ``tokens``: the
                loss is the tokens' alone, and all other parameters get an exact zero gradient.
            x_img (Tensor, optional): Images, as for ``encode``.
            features (dict, optional): What ``encode`` returned, in place of ``x_img``.
            tokens (Tensor, optional): Hidden tokens [B, N, token_dim], cast to the token projector's dtype.
            alpha (float or Tensor, optional): Scale of the loss, a number or a scalar tensor. Default: ``None``.
            as_dict (bool): Returns ``loss_dict``'s result, and counts a step as it does. Default: ``False``.
            step (int, optional): As in ``loss_dict``; only with ``as_dict``.

        Returns:
            tuple or dict: The loss, and detached logs: dino_global; dino_patch with ``use_patch``; dino_token with
            ``token_dim``; dino_vic_inv, dino_vic_var, dino_vic_cov with VICReg; dino_patch_is_global and
            dino_token_is_global, 1 each, where the teacher gives no patch tokens and its global token stands for them.

        Raises:
            ValueError: If an input does not fit. The message names it.
            TypeError: If an input is no tensor.
        """
        if as_dict:
            if alpha is not None:
                raise ValueError("alpha must be left out with as_dict=True, whose weight is the schedule's")
            return self._dict(self._losses, step, z_text, x_img, features, tokens)
        if step is not None:
            raise ValueError("step must be left out, or as_dict=True given: only the schedule's weight depends on it")
        return self._losses(z_text, x_img, features=features, tokens=tokens, alpha=alpha)

    def _losses(
        self, z_text: Any, x_img: Any, *, features: Mapping[str, Any] | None, tokens: Any, alpha: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._check(z_text, x_img, features, tokens)
        features = self._features(x_img, features, (tokens if z_text is None else z_text).device)
        if alpha is not None:
            alpha = check_scalar("alpha", alpha, self.schedule.step.device)
        losses, logs = [], {}
        if z_text is None:
            losses.append(self._zero(tokens=False))
        else:
            z_text, target = z_text.to(dtype_of(self.projector) or z_text.dtype), self._global_token(features)
            out, loss = weighed(self.loss, self.projector(z_text), target, self.w_global, alpha)
            losses.append(loss)
            logs.update(logs_of(out))
            if self.use_patch:
                logs["dino_patch"], loss = weighed(self.row_loss, *self._regions(z_text, features), self.w_patch, alpha)
                losses.append(loss)
        if tokens is not None:
            logs["dino_token"], loss = weighed(self.row_loss, *self._tokens(tokens, features), self.w_token, alpha)
            losses.append(loss)
        if features.get("patch") is None and (replaced := [name for name in PATCH_LOGS if name in logs]):
            logs.update({f"{name}_is_global": torch.ones_like(logs[name]) for name in replaced})
            self._warn_once()
        return sum(losses[1:], losses[0]), logs

    def loss_dict(
        self,
        z_text: Tensor | None = None,
        x_img: Tensor | None = None,
        step: int | None = None,
        *,
        features: Mapping[str, Any] | None = None,
        tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns the weighted loss and its logs, for trainers that add up every key that contains "loss".

        Args:
            z_text (Tensor, optional): As in ``forward``.
            x_img (Tensor, optional): As in ``forward``.
            step (int, optional): The training step. Default: counts the calls of this method in training mode with
                gradients enabled, the first being 1, in the buffer ``step``. A call that is refused does not count.
            features (dict, optional): As in ``forward``.
            tokens (Tensor, optional): As in ``forward``.

        Returns:
            dict: ``loss_dino``, which carries the gradient, and ``forward``'s logs, whose names do not contain "loss".
            From ``stop_step`` on ``loss_dino`` alone, an exact zero.

        Raises:
            ValueError: If an input does not fit. The message names it.
            TypeError: If an input is no tensor.
        """
        if self.training and self.group is not None:
            warn_if_unsynchronised(self)
        return self._dict(self, step, z_text, x_img, features, tokens)

    def _dict(
        self, run: Callable[..., Any], step: int | None, z_text: Any, x_img: Any, features: Any, tokens: Any
    ) -> dict[str, Tensor]:
        self._check(z_text, x_img, features, tokens)  # before the step is counted
        if step is None:
            self.schedule.advance()
        else:
            step = check_int("step", step, 0)
        if self.schedule.stopped(step):
            return {"loss_dino": self._zero(z_text, tokens)}
        loss, logs = run(z_text, x_img, features=features, tokens=tokens, alpha=self.schedule.factor(step))
        return {"loss_dino": self.schedule.cut(loss, step), **logs}

    def _regions(self, z_text: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """Return the student and the target of the patch loss, [B, K, D] each."""
        student, tokens = self.local_projector(self.patches(z_text)), self._patch_tokens(features)
        if tokens is not None:
            return student, self.patches.targets(tokens, student, self.patch_queries)
        if self.patch_queries is not None:
            student = student + reach(self.patch_queries).to(student.dtype)
        return student, self._global_token(features).unsqueeze(1).expand(-1, self.patches.count, -1)

    def _tokens(self, tokens: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """Return the student and the target of the token loss, [B, L, D] each."""
        student, target = project(self.token_projector, tokens, self.teacher.embed_dim), self._patch_tokens(features)
        if target is not None:
            return self.token_grids(student, target)
        return student, self._global_token(features).unsqueeze(1).expand(-1, tokens.shape[1], -1)

    def _zero(self, *inputs: Tensor | None, tokens: bool = True) -> Tensor:
        """Return 0 that gives inputs and parameters a zero gradient; tokens=False leaves the token projector out."""
        parts = [part for name, part in self.named_children() if tokens or name != "token_projector"]
        tensors = [x for part in parts for x in live_tensors(part) if x.is_floating_point()]
        tensors += [x for x in (self.patch_queries, *inputs) if x is not None]
        return reach(*tensors)

    def _check(self, z_text: Any, x_img: Any, features: Any, tokens: Any) -> None:
        check_tokens(tokens, self.token_dim)
        if z_text is not None or tokens is None:
            check_latents(z_text, self.in_dim)
        batch = self._check_images(x_img, features)
        for name, x in (("z_text", z_text), ("tokens", tokens)):
            if x is not None and len(x) != batch:
                raise ValueError(f"{name} must have the images' batch size {batch}, got shape {list(x.shape)}")

    def extra_repr(self) -> str:
        return f"teacher={type(self.teacher).__name__} (frozen, not a submodule), w_global={self.w_global}"
