"""The corridor: images through preprocessing and the teacher, latents through the projector, both into the loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .losses import CosineLoss, MSELoss, VICRegLoss, VICRegOutput
from .preprocess import Preprocess
from .projector import Projector
from .recipe import adopt, watch_parents
from .schedule import Schedule, check_step
from .teacher import DINOv2Backbone
from .validation import check_choice, check_number, check_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Features = dict[str, Any]  # {'global': [B, D], 'patch': [B, N, D] or None}

LOCAL_HIDDEN_DIM = 256


class DinoSupervision(nn.Module):
    """Pulls a student's latent to the features that a frozen teacher sees in the real image.

        loss = w_global * loss_type(projector(z_text), teacher.global)
             + w_patch  * mean(1 - cos(local_projector(pool(z_map)), pool(teacher.patch)))      with use_patch
        loss_dino = alpha * min(1, step / warmup_steps) * loss

    in_dim: the width of z_text, [B, in_dim].
    teacher: a DINOv2 variant (see DINOv2Backbone), or any module with `embed_dim` that returns {'global': [B, D],
        'patch': [B, N, D] or None}; its `mean`, `std` and `patch_size` are read where it has them, else ImageNet's
        and 14. It is frozen, put in eval mode and kept out of modules(), parameters() and state_dict(), so that no
        optimizer, EMA, DDP or checkpoint sees it, while .to(), deepcopy and pickle carry it along.
    img_size: of the teacher's input, an int or (h, w), multiples of the teacher's patch size.
    loss_type: "cosine", "mse" (normalised), "vicreg", or any module (student [B, D], teacher [B, D]) -> a scalar.
    alpha, warmup_steps: the weight of the loss in loss_dict, and the steps over which it rises to it linearly.
    stop_step: from this step on loss_dict gives an exact zero that still reaches every projector parameter, and the
        teacher does not run. None: never.
    w_global, w_patch: the weights of the two terms.
    use_patch: also align regions: z_text, read as a map of latent_shape (C, h, w), is pooled to patch_grid (rows,
        columns).
    patch_target: "region" pools the teacher's tokens on the same grid; "mean" takes the mean of all tokens for each.
    stopgrad_image: False lets the gradient of the loss pass through the teacher to the image.
    hidden_dim: of the projector. The local projector's is 256.
    pretrained, teacher_dtype: of a teacher given by name; teacher_dtype also casts a module. None keeps the weights'.
    group: whose rows VICReg's statistics are taken over: "auto" (all processes once torch.distributed is initialised),
        None (this process) or a ProcessGroup.
    preprocess: "bilinear", "bicubic", or any module (images) -> the teacher's input, such as
        Preprocess(224, antialias=True, mean=..., std=...).
    backend: of every op in it: auto, reference, torch or triton; None: see use_backend.

    Raises ValueError (TypeError for a wrong type) at construction, naming the argument.
    """

    loads_recipes = True
    teacher: Any  # no submodule: see __setattr__
    local_projector: Projector

    def __init__(
        self,
        in_dim: int = 8192,
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
        stopgrad_image: bool = True,
        hidden_dim: int = 4096,
        pretrained: bool = True,
        teacher_dtype: torch.dtype | None = None,
        group: ProcessGroup | str | None = "auto",
        preprocess: str | nn.Module = "bilinear",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        watch_parents()
        self.img_size = check_size(img_size, "img_size")
        self.w_global = check_number("w_global", w_global)
        self.w_patch = check_number("w_patch", w_patch)
        self.schedule = Schedule(alpha, warmup_steps, stop_step)
        self.patch_target = check_choice("patch_target", patch_target, ("region", "mean"))
        self.patch_grid = check_size(patch_grid, "patch_grid")
        self.use_patch = use_patch
        self.stopgrad_image = stopgrad_image
        self.in_dim = in_dim
        self.loss = make_loss(loss_type, stopgrad_image, group, backend)
        self.latent_shape = check_latent_shape(latent_shape, in_dim) if use_patch else tuple(latent_shape)

        self.teacher = make_teacher(teacher, self.img_size, pretrained, teacher_dtype)
        self.preprocess = make_preprocess(preprocess, self.img_size, self.teacher, backend)
        patch: int = getattr(self.teacher, "patch_size", 14)
        if self.img_size[0] % patch or self.img_size[1] % patch:
            raise ValueError(f"img_size must be a multiple of the teacher's patch size {patch}, got {img_size!r}")
        if getattr(self.teacher, "img_size", self.img_size) != self.img_size:
            raise ValueError(f"img_size is {self.img_size} and the teacher was built for {self.teacher.img_size}")
        self.token_grid = self.img_size[0] // patch, self.img_size[1] // patch

        width = int(self.teacher.embed_dim)
        self.projector = Projector(in_dim, hidden_dim, width)
        if use_patch:
            self.local_projector = Projector(self.latent_shape[0], LOCAL_HIDDEN_DIM, width)
            self.patch_loss = CosineLoss(detach_teacher=stopgrad_image, backend=backend)
        self._warned = False

    # --- the teacher, invisible to the trainer ------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":
            # Past nn.Module's own __setattr__, which would register it as a submodule.
            self.__dict__[name] = value.requires_grad_(False).eval()
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DinoSupervision:
        super()._apply(fn, recurse)
        self.teacher._apply(fn)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        adopt(self, state_dict, prefix, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --- features -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x_img: Tensor) -> Features:
        """The teacher's {'global': [B, D], 'patch': [B, N, D] or None}, detached: to cache, or to compute ahead.

        x_img: [B, 3, H, W], floats in -1..1 or uint8 in 0..255, any size, unless `preprocess` says otherwise.
        """
        return self._teach(x_img)

    def _teach(self, x_img: Tensor) -> Features:
        weight = next((p for p in self.teacher.parameters() if p.is_floating_point()), None)
        if weight is not None:
            x_img = x_img.to(weight.device, non_blocking=True)
        dtype = None if weight is None else weight.dtype
        x = self.preprocess(x_img, dtype) if isinstance(self.preprocess, Preprocess) else self.preprocess(x_img)
        return check_features("teacher's result", self.teacher(x if dtype is None else x.to(dtype)))

    def _features(self, x_img: Tensor | None, features: Features | None) -> Features:
        if features is not None and x_img is not None:
            raise ValueError("give x_img or features, not both: features are what encode(x_img) returned")
        if features is not None:
            return check_features("features", features)
        if x_img is None:
            raise ValueError("give x_img, the images, or features, what encode returned for them; got neither")
        return self.encode(x_img) if self.stopgrad_image else self._teach(x_img)

    def _tokens(self, features: Features) -> Tensor:
        """The teacher's side of the patch loss: [B, K, D] for the K regions of patch_grid."""
        rows, columns = self.patch_grid
        tokens = features.get("patch")
        if tokens is None:
            return features["global"].unsqueeze(1).expand(-1, rows * columns, -1)
        h, w = self.token_grid
        if tokens.shape[1] != h * w:
            raise ValueError(
                f"teacher returned {tokens.shape[1]} patch tokens where img_size={self.img_size} has {h} x {w}: "
                "give its patch_size, and strip class and register tokens"
            )
        if self.patch_target == "mean":
            return tokens.mean(1, keepdim=True).expand(-1, rows * columns, -1)
        regions = F.adaptive_avg_pool2d(rearrange(tokens, "b (h w) d -> b d h w", h=h), self.patch_grid)
        return rearrange(regions, "b d h w -> b (h w) d")

    # --- losses -------------------------------------------------------------------------------------------------------

    def forward(
        self, z_text: Tensor, x_img: Tensor | None = None, *, features: Features | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, logs): the loss without alpha, and its terms detached.

        z_text: [B, in_dim], cast to the projector's dtype. x_img: as for encode; or `features`, what encode returned.
        logs: dino_global; dino_patch with use_patch; dino_vic_inv, dino_vic_var and dino_vic_cov with VICReg.
        """
        self._check(z_text, x_img)
        features = self._features(x_img, features)
        z_text = z_text.to(self.projector.dtype)
        out = self.loss(self.projector(z_text), features["global"])
        logs = {}
        if isinstance(out, VICRegOutput):
            out, *terms = out
            logs = dict(zip(("dino_vic_inv", "dino_vic_var", "dino_vic_cov"), terms, strict=True))
        if not isinstance(out, Tensor) or out.ndim:
            raise TypeError(f"loss_type must return a scalar tensor, got {getattr(out, 'shape', type(out).__name__)}")
        loss = self.w_global * out
        logs = {"dino_global": out.detach(), **logs}
        if self.use_patch:
            z_map = rearrange(z_text, "b (c h w) -> b c h w", **dict(zip("chw", self.latent_shape, strict=True)))
            regions = rearrange(F.adaptive_avg_pool2d(z_map, self.patch_grid), "b c h w -> b (h w) c")
            loss_patch = self.patch_loss(self.local_projector(regions), self._tokens(features))
            loss = loss + self.w_patch * loss_patch
            logs["dino_patch"] = loss_patch.detach()
            if features.get("patch") is None:
                logs["dino_patch_is_global"] = torch.ones_like(logs["dino_patch"])
                self._warn_once()
        return loss, logs

    def loss_dict(
        self,
        z_text: Tensor,
        x_img: Tensor | None = None,
        step: int | None = None,
        *,
        features: Features | None = None,
    ) -> dict[str, Tensor]:
        """{'loss_dino': alpha * min(1, step / warmup_steps) * loss, ...}: forward's logs beside the weighted loss.

        Made for trainers that add up every key that contains "loss": no other key does, and no other value has a
        gradient. step: the training step; None counts the calls of this method in training mode with gradients enabled,
        the first being 1, in the buffer `step`. From stop_step on the dict holds loss_dino alone, an exact zero.
        """
        if step is None:
            self.schedule.advance()
        else:
            check_step("step", step)
        if self.schedule.stopped(step):
            return {"loss_dino": self._zero()}
        loss, logs = self(z_text, x_img, features=features)
        return {"loss_dino": self.schedule.scale(loss, step), **logs}

    def _zero(self) -> Tensor:
        """0 by way of every parameter, for trainers that want a gradient in each: the projectors of an empty batch."""
        zero = self.projector.nothing().sum()
        return zero + self.local_projector.nothing().sum() if self.use_patch else zero

    # --- small print --------------------------------------------------------------------------------------------------

    def _check(self, z_text: Tensor, x_img: Tensor | None) -> None:
        if not isinstance(z_text, Tensor):
            raise TypeError(f"z_text must be a tensor [B, {self.in_dim}], got {type(z_text).__name__}")
        if z_text.ndim != 2 or z_text.shape[1] != self.in_dim or not z_text.is_floating_point():
            raise ValueError(
                f"z_text must be floats of shape [B, {self.in_dim}], got {z_text.dtype} of {list(z_text.shape)}"
            )
        if x_img is not None and len(x_img) != len(z_text):
            raise ValueError(f"x_img must have z_text's batch size {len(z_text)}, got shape {list(x_img.shape)}")

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "the teacher gives no patch tokens: every region is aligned with its global token", stacklevel=3
            )

    def extra_repr(self) -> str:
        return f"teacher={type(self.teacher).__name__} (frozen, not a submodule), w_global={self.w_global}"


def make_teacher(
    teacher: str | nn.Module, img_size: tuple[int, int], pretrained: bool, dtype: torch.dtype | None
) -> nn.Module:
    if isinstance(teacher, str):
        return DINOv2Backbone(teacher, img_size, pretrained=pretrained, dtype=dtype)
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a variant's name or a module, got {type(teacher).__name__}")
    if not isinstance(getattr(teacher, "embed_dim", None), int):
        raise ValueError(f"teacher {type(teacher).__name__} must have an int embed_dim, the width of its features")
    return teacher if dtype is None else teacher.to(dtype)


def make_loss(
    loss_type: str | nn.Module, stopgrad_image: bool, group: ProcessGroup | str | None, backend: str | None
) -> nn.Module:
    if isinstance(loss_type, nn.Module):
        if not stopgrad_image and getattr(loss_type, "detach_teacher", False):
            raise ValueError("stopgrad_image=False needs a loss_type with detach_teacher=False")
        return loss_type
    options: dict[str, Any] = {"detach_teacher": stopgrad_image, "backend": backend}
    check_choice("loss_type", loss_type, ("cosine", "mse", "vicreg"))
    if loss_type == "vicreg":
        return VICRegLoss(group=group, **options)
    return CosineLoss(**options) if loss_type == "cosine" else MSELoss(**options)


def make_preprocess(
    preprocess: str | nn.Module, img_size: tuple[int, int], teacher: nn.Module, backend: str | None
) -> nn.Module:
    if isinstance(preprocess, nn.Module):
        return preprocess
    check_choice("preprocess", preprocess, ("bilinear", "bicubic"))
    statistics = {name: getattr(teacher, name) for name in ("mean", "std") if hasattr(teacher, name)}
    return Preprocess(img_size, interpolation=preprocess, backend=backend, **statistics)


def check_features(name: str, features: Any) -> Features:
    if not isinstance(features, dict) or not isinstance(features.get("global"), Tensor):
        raise TypeError(
            f"{name} must be {{'global': [B, D], 'patch': [B, N, D] or None}}, got {type(features).__name__}"
        )
    return features


def check_latent_shape(latent_shape: Sequence[int], in_dim: int) -> tuple[int, ...]:
    if len(latent_shape) != 3 or not all(isinstance(x, int) and x > 0 for x in latent_shape):
        raise ValueError(f"latent_shape must be three positive ints (C, h, w), got {latent_shape!r}")
    if math.prod(latent_shape) != in_dim:
        sides = [side for side in range(math.isqrt(in_dim), 1, -1) if in_dim % side**2 == 0]
        fitting = ", ".join(f"({in_dim // side**2}, {side}, {side})" for side in sides) or f"({in_dim}, 1, 1)"
        raise ValueError(
            f"latent_shape {tuple(latent_shape)} has {math.prod(latent_shape)} elements and in_dim is {in_dim}; "
            f"square maps that fit: {fitting}"
        )
    return tuple(latent_shape)
