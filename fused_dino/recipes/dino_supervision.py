"""DinoSupervision: the seed's constructor, names and logs over the terms of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..calls import share_out
from ..distributed import warn_if_unsynchronised
from ..functional import Backend
from ..legacy_checkpoint import Legacy
from ..losses import CosineLoss
from ..schedule import Schedule
from ..sizes import SizeRule, check_img_size
from ..supervised import Call, Supervised
from ..teacher.factories import make_preprocess, make_teacher
from ..terms.base import Parts
from ..terms.projector import Projector
from ..terms.regions import PATCH_TARGETS, Patches, RegionTerm, check_latent_shape
from ..terms.token_grids import TokenGrids
from ..terms.token_projectors import check_projector
from ..terms.tokens import TokenTerm
from ..terms.whole import GlobalTerm
from ..validation import check_choice, check_flag, check_number, check_size
from .arguments import check_token_dim, check_tokens, check_z_text, make_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DinoSupervision(Supervised):
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
    tokens g. ``loss_dict`` multiplies it: ``loss_dino = alpha * min(1, step / warmup_steps) * loss``.

    The teacher is frozen, in eval mode, and in no ``modules()``, ``parameters()`` or ``state_dict()``: no optimizer,
    EMA, DDP or checkpoint has it. ``.to()``, deepcopy and pickle take it along. A deep copy, such as an EMA's, shares
    its memory until one of the two is moved, cast or loaded. Writing a weight in place changes both.

    Args:
        in_dim (int, optional): Width of ``z_text``. None aligns tokens alone. Default: 8192.
        teacher (str or nn.Module): A DINOv2 variant (see DINOv2Backbone), another model in timm by name, or a module. A
            module has ``embed_dim`` and returns {'global': [B, D], 'patch': [B, N, D] or None}. Its ``mean``, ``std``
            and ``patch_size`` are used if it has them, else ImageNet's and 14. Default: ``"vitl14"``.
        img_size (int, sequence of two ints or callable): Height and width of the teacher's input, multiples of its
            patch size. For batches of any size a rule (h, w, patch) -> (h, w), such as ``Scaled(7 / 8)``. Default: 224.
        loss_type (str or nn.Module): Loss of the global term: ``"cosine"``, ``"mse"`` (normalised), ``"vicreg"``, or a
            module (student [B, D], target [B, D]) -> scalar. Default: ``"cosine"``.
        alpha (float): Weight of the loss in ``loss_dict``. Default: 0.2.
        warmup_steps (int): Steps over which that weight rises linearly. Default: 5000.
        stop_step (int, optional): Step from which the loss is an exact zero and the teacher does not run. Every
            parameter then gets a zero gradient. Default: never.
        w_global (float): Weight of the global term. Default: 1.
        use_patch (bool): Aligns regions, too: ``z_text`` is read as a map, and pooled to ``patch_grid``. Default:
            ``False``.
        w_patch (float): Weight of the term of regions. Default: 0.2.
        patch_grid (sequence of two ints): Rows and columns of regions. Default: (2, 2).
        latent_shape (sequence of three ints): Channels, rows and columns of ``z_text`` as a map. Default: (4, 32, 32).
        patch_target (str): Target of a region: ``"region"`` is the mean of the teacher's tokens in the region,
            ``"mean"`` that of all tokens, and ``"nearest"`` the most similar token. ``"attention"`` is a mean by learnt
            queries, which may collapse onto tokens that are easy to match. Default: ``"region"``.
        token_dim (int, optional): Width of hidden tokens [B, N, token_dim], which are aligned with the teacher's patch
            tokens. Default: no tokens.
        w_token (float): Weight of the term of tokens. Default: 0.5.
        token_projector (str or nn.Module): ``"mlp"`` (REPA's, arXiv 2410.06940), ``"conv"`` (a 3 x 3 convolution over
            the grid), or a module [B, N, token_dim] -> [B, N, D]. Default: ``"mlp"``.
        token_grid (sequence of two ints, optional): Rows and columns of the tokens. Default: the grid of the images'
            aspect ratio, else the teacher's, whichever has N positions. The smaller grid is resampled bilinearly to
            the larger.
        token_standardize (bool): Brings each channel of the teacher's tokens to mean 0 and deviation 1 over an image's
            positions, with 1e-6 added to the deviation. Default: ``False``.
        stopgrad_image (bool): False lets the gradient pass through the teacher to the image, which must be floats.
            Default: ``True``.
        hidden_dim (int): Hidden width of the projector. The local projector's is 256, the tokens' 2048. Default: 4096.
        pretrained (bool): Weights of a teacher given by name; False gives random ones. Default: ``True``.
        teacher_dtype (torch.dtype, optional): Dtype to cast the teacher to. Default: the dtype of its weights.
        group (ProcessGroup or str, optional): Ranks over whose rows VICReg's statistics are taken: ``"auto"`` (all
            processes once torch.distributed is initialised), None (this process) or a group. A module as ``loss_type``
            has its own group. Default: ``"auto"``.
        preprocess (str or nn.Module): ``"bilinear"``, ``"bicubic"``, or a module (images) -> the teacher's input, such
            as ``Preprocess(224, antialias=True)``. Default: ``"bilinear"``.
        input_range (sequence of two floats, optional): Values that mean black and white in the images; a module as
            ``preprocess`` has its own. ``check(images)`` says whether a batch lies in it. Default: ``(-1, 1)`` for
            floats, ``(0, 255)`` for uint8.
        backend (str, optional): Backend of every op, but for modules that are given: ``"auto"``, ``"reference"``,
            ``"torch"`` or ``"triton"``. Default: see ``use_backend``.

    Shape:
        - z_text: :math:`(B, in\_dim)`; x_img: :math:`(B, 3, H, W)` of any size; tokens: :math:`(B, N, token\_dim)`, or
          as TokenTerm takes them
        - Output: a scalar, and a dict of detached scalars, in float32, or float64 if an input or the projector is

    Raises:
        ValueError: If an argument is out of range. The message names it, what came and what would do.
        TypeError: If an argument is of a wrong type.
    """

    legacy = Legacy("the seed", {"dino_t_head": "projector", "dino_local_head": "local_projector"}, "dino_model")
    projector: Projector
    local_projector: Projector
    token_projector: nn.Module

    def __init__(
        self,
        in_dim: int | None = 8192,
        *,
        teacher: str | nn.Module = "vitl14",
        img_size: int | Sequence[int] | SizeRule = 224,
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
        self.img_size = check_img_size(img_size)
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
        self.latent_shape = check_latent_shape(latent_shape, in_dim if use_patch else None)

        self.teacher = make_teacher(teacher, self.img_size, pretrained, teacher_dtype)
        self.preprocess = make_preprocess(preprocess, self.img_size, input_range, self.teacher, backend)
        self.teacher_grid = self._find_grid(img_size)
        # For regions and tokens. Their targets are detached already, except for the queries, which need a gradient.
        self.row_loss = CosineLoss(detach_teacher=False, backend=backend)

        # The terms are no submodules: this module registers what they compute with, under the seed's names.
        width = int(self.teacher.embed_dim)
        self._terms: dict[str, Any] = {}
        self.patch_queries: nn.Parameter | None = None
        if in_dim is not None:
            term = self._terms["global"] = GlobalTerm(in_dim, hidden_dim=hidden_dim, out_dim=width, loss=self.loss)
            term.loss_name = "loss_type"
            self.projector = take_projector(term)
        if use_patch:
            options: dict[str, Any] = {
                "grid": self.patch_grid,
                "target": patch_target,
                "out_dim": width,
                "loss": self.row_loss,
            }
            region = self._terms["patch"] = RegionTerm(self.latent_shape, **options)
            self.local_projector = take_projector(region)
            self.patches = Patches(self.patch_target, self.latent_shape, self.patch_grid, self.teacher_grid)
            self.patch_queries, region.queries = region.queries, None
        if token_dim is not None:
            check_projector("token_projector", token_projector)
            self.token_grids = TokenGrids(token_grid, self.teacher_grid, token_standardize)
            token = TokenTerm(token_dim, projector=token_projector, out_dim=width, loss=self.row_loss)
            token.projector_name = "token_projector"
            self._terms["token"] = token
            self.token_projector = take_projector(token)

    def forward(
        self,
        z_text: Tensor | None = None,
        x_img: Tensor | None = None,
        *,
        features: Mapping[str, Any] | None = None,
        tokens: Tensor | None = None,
        weight: Tensor | Mapping[str, Tensor] | None = None,
        index: Tensor | Mapping[str, Tensor] | None = None,
        token_grid: Sequence[int] | None = None,
        alpha: float | Tensor | None = None,
        as_dict: bool = False,
        step: int | None = None,
    ) -> Any:
        """Returns the loss without alpha and warm-up, and its terms; or with ``as_dict`` what ``loss_dict`` returns.

        Wrappers such as DistributedDataParallel reach this method alone: ``DDP(dino)(z_text, x_img, as_dict=True)``.

        Args:
            z_text (Tensor, optional): Latents [B, in_dim], cast to the projector's dtype. None with ``tokens`` leaves
                the loss of the tokens alone. All other parameters then get an exact zero gradient.
            x_img (Tensor, optional): Images, as for ``encode``.
            features (dict, optional): What ``encode`` returned, in place of ``x_img``.
            tokens (Tensor, optional): Hidden tokens [B, N, token_dim], cast to the token projector's dtype; or a map,
                or frames, as TokenTerm takes them.
            weight (Tensor or dict, optional): Weights of the images [B], or a dict by term (``"global"``, ``"patch"``,
                ``"token"``), for tokens [B] or [B, N]. A row of weight 0 is left out.
            index (Tensor, optional): Positions [B, N] of the tokens on ``token_grid``, else on the teacher's grid.
            token_grid (sequence of two ints, optional): Rows and columns of the tokens in this call.
            alpha (float or Tensor, optional): Scale of the loss, a number or a scalar tensor. Default: ``None``.
            as_dict (bool): Returns ``loss_dict``'s result, and counts a step as it does. Default: ``False``.
            step (int, optional): As in ``loss_dict``; only with ``as_dict``.

        Returns:
            tuple or dict: The loss, and detached logs: dino_global; dino_patch with ``use_patch``; dino_token with
            ``token_dim``; dino_vic_inv, dino_vic_var, dino_vic_cov with VICReg. If the teacher gives no patch tokens,
            the global token is used in their place, and dino_patch_is_global and dino_token_is_global are 1.

        Raises:
            ValueError: If an input does not fit. The message names it.
            TypeError: If an input is no tensor.
        """
        self._check_alpha(alpha, as_dict, step)
        calls = self._calls(z_text, x_img, features, tokens, weight, index, token_grid)
        zeros = [self._zero(without="token_projector")] if z_text is None else []

        def run(alpha: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return self._sum(calls, x_img, features, alpha, zeros)

        return self._scheduled(run, step, calls, z_text, tokens) if as_dict else run(alpha)

    def loss_dict(
        self,
        z_text: Tensor | None = None,
        x_img: Tensor | None = None,
        step: int | None = None,
        *,
        features: Mapping[str, Any] | None = None,
        tokens: Tensor | None = None,
        weight: Tensor | Mapping[str, Tensor] | None = None,
        index: Tensor | Mapping[str, Tensor] | None = None,
        token_grid: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the weighted loss and its logs, for trainers that add up every key that contains "loss".

        Args:
            z_text (Tensor, optional): As in ``forward``.
            x_img (Tensor, optional): As in ``forward``.
            step (int, optional): The training step. Default: the buffer ``step``, which counts the calls of this method
                in training mode with gradients enabled. The first is 1. A call that raises does not count.
            features (dict, optional): As in ``forward``, and so are the arguments that follow.
            tokens (Tensor, optional): Hidden tokens.
            weight (Tensor or dict, optional): Weights of rows.
            index (Tensor, optional): Positions of tokens.
            token_grid (sequence of two ints, optional): Rows and columns of the tokens.

        Returns:
            dict: ``loss_dino``, which carries the gradient, and ``forward``'s logs, whose names do not contain "loss".
            A step from ``stop_step`` on gives ``loss_dino`` alone, an exact zero.

        Raises:
            ValueError: If an input does not fit. The message names it.
            TypeError: If an input is no tensor.
        """
        if self.training and self.group is not None:
            warn_if_unsynchronised(self)
        options: dict[str, Any] = {"features": features, "tokens": tokens, "weight": weight}
        options.update(index=index, token_grid=token_grid)
        calls = self._calls(z_text, x_img, **options)
        return self._scheduled(partial(self, z_text, x_img, **options), step, calls, z_text, tokens)

    def _calls(
        self, z_text: Any, x_img: Any, features: Any, tokens: Any, weight: Any, index: Any, token_grid: Any
    ) -> dict[str, Call]:
        """Check a call, and return the calls of its terms."""
        check_tokens(tokens, self.token_dim)
        if z_text is not None or tokens is None:
            check_z_text(z_text, self.in_dim)
        batch = self._check_images(x_img, features)
        students = {"token": ("tokens", tokens)} if tokens is not None else {}
        if z_text is not None:
            latents = {name: ("z_text", z_text) for name in ("global", "patch") if name in self._terms}
            students = latents | students
        terms = {name: self._terms[name] for name in students}
        shares = share_out(terms, weight=weight, index=index, token_grid=token_grid)
        calls = {}
        for name, (argument, student) in students.items():
            terms[name].check(argument, student, batch, **shares[name])
            factor, parts = self._parts(name)
            calls[name] = Call(terms[name], student, shares[name], factor, parts)
        return calls

    def _parts(self, name: str) -> tuple[float, Parts]:
        """Return a term's factor, and its parts: the modules that are registered here now."""
        if name == "global":
            return self.w_global, Parts(self.projector, self.loss)
        if name == "patch":
            return self.w_patch, Parts(self.local_projector, self.row_loss, self.patches, self.patch_queries)
        return self.w_token, Parts(self.token_projector, self.row_loss, self.token_grids)

    def _log_name(self, name: str, key: str) -> str:
        return f"dino_{key}" if key.startswith("vic_") else super()._log_name(name, key)

    def extra_repr(self) -> str:
        return f"teacher={type(self.teacher).__name__} (frozen, not a submodule), w_global={self.w_global}"


def take_projector(term: Any) -> Any:
    """Take the projector out of a term: another module registers it, where a wrapper may replace it."""
    projector, term.projector = term.projector, None
    return projector
