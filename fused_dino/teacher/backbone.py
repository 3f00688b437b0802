"""The frozen teacher, which makes {'global': [B, D], 'patch': [B, N, D], 'grid': ...} of normalised images."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..features import Features, Grid
from ..live import dtype_of
from ..sizes import Size, SizeRule, check_img_size
from ..validation import check_flag, check_int, check_tensor
from .embedding import PatchProjection, from_patches, from_raw, take_patches
from .layers import Layers, find_layers, run_layers, wants, wants_last
from .outputs import split_features
from .pixels import Raw, folded
from .positions import resampling_of, take_any_size
from .reading import check_fixed_size, read_embed_dim, read_patch_size, read_prefix_tokens, read_statistic
from .rewritten import Rewritten
from .running import check_compile, joined
from .transformers_model import call_options, without_head
from .weights import PATCH_SIZE, canonical, create_timm, load_dinov2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class DINOv2Backbone(Rewritten):
    """A frozen DINOv2, or any other vision model in its place, as a source of features.

    The model stays frozen and in eval mode, whatever a parent does with ``train()``. Its weights are in
    ``backbone.model.state_dict()``, not in ``state_dict()``. A parent's checkpoint without them leaves them as they
    are; a checkpoint with them under ``model.`` loads them.

    Args:
        variant (str): vits14, vitb14, vitl14 or vitg14; with four registers ``*_reg``. The names of hub
            (dinov2_vits14), timm (vit_small_patch14_dinov2.lvd142m), transformers (facebook/dinov2-small,
            facebook/dinov2-with-registers-small) and REPA (dinov2-vit-s, dinov2reg-vit-s) are known, too, in any case.
            Default: ``"vitl14"``.
        img_size (int, sequence of two ints or callable): Height and width in pixels, multiples of the patch size. With
            a rule ``(h, w, patch) -> (h, w)``, such as ``Scaled(7 / 8)`` or ``Area(224 * 224)``, every call may have
            its own size, and a supervision applies the rule to the size of its images. Default: 224.
        use_timm_fallback (bool): Whether ``"auto"`` tries timm where hub fails. Default: ``True``.
        source (str): ``"hub"`` is the official model from torch hub, which RUNS THE CODE of
            github.com/facebookresearch/dinov2 at a pinned revision in this process. ``"timm"`` is timm's model with the
            weights that timm publishes, ``"local"`` the same with those of ``weights``. These never fall back.
            ``"auto"`` is ``"local"`` if ``weights`` is given, else hub and then timm; the one in the cache comes first.
            A full cache is read without network. One of several processes downloads. Default: ``"auto"``.
        weights (path, optional): A .safetensors file, a checkpoint of torch.save (read with ``weights_only=True``), or
            a folder or index of shards as transformers' ``save_pretrained`` writes them. The parameter names are the
            official ones, timm's or transformers', the training resolution any square one. ``mean`` and ``std`` come
            from a preprocessor_config.json beside it. A path may start with ``~``.
        pretrained (bool): False gives random weights without network, through timm unless ``source="hub"``. Default:
            ``True``.
        dtype (torch.dtype, optional): Dtype of the weights. Default: the one in which they are stored.
        pos_embed (str): Code whose resampling of position embeddings is used: ``"official"``, ``"timm"`` or
            ``"transformers"``. timm's is antialiased, and moves patch features by some percent at 224. The last two
            need a ``source`` other than hub. Default: ``"official"``.
        layers (sequence of ints, optional): Blocks whose features are returned, too, as ``features["layers"][n]``.
            Blocks count from 0, and negative numbers from the end. The last norm is applied, as in the official
            ``get_intermediate_layers``.
            Default: none.
        engine (bool): Whether an engine computes the model by exact rewrites. Attention is one op, LayerNorm's affine
            and LayerScale are folded into the weights, and tokens that are not read are not computed. ``explain()``
            lists the rewrites, and ``check(images)`` compares features with the published model's. A model that the
            engine does not know runs as it was published. Default: ``True``.
        micro_batch (int, optional): Most images that are computed at a time. A batch is computed in slices, and
            activations take the memory of one slice. Default: the whole batch.
        grad_checkpointing (bool): Whether each block keeps its input alone for a gradient of the image, and the
            backward computes the block again. It needs the engine. Default: ``False``.
        compile (bool or str): Whether torch.compile compiles the forward, at the first call of each size. A string is
            its mode: ``"reduce-overhead"``, ``"max-autotune"``, ``"max-autotune-no-cudagraphs"`` or ``"default"``. If
            the mode replays CUDA graphs, features are copies. Default: ``False``.
        model (nn.Module or str, optional): Another model in place of variant, source and weights: a timm model's name
            or any module. ``forward_features`` is called if it has one. It returns a dict of {'global', 'patch'}, of
            the official names or of {'cls_token', 'patch_tokens'}; tokens [B, P + N, D] (P is its num_prefix_tokens,
            else 1); a map [B, D, h, w] (or NHWC by its output_fmt); or pooled features [B, D], with which 'patch' is
            None. If it has no class token, 'global' is what its head pools, else the mean of the patches. transformers'
            Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel and SiglipVisionModel work as they are, alone or in a
            module that returns their output or tokens. Width, patch size, registers, mean and std are read from them.

    Attributes:
        model (nn.Module): The frozen model, as it was published. With an engine it is no submodule, and its weights
            stay on the host in their stored dtype. ``model.load_state_dict`` folds them anew. After a write in place,
            or a load into a part of the model, call ``refold()``.
        engine (nn.Module or None): The module that computes the features in place of the model.
        embed_dim (int): Width D of the features.
        patch_size (int): Side of a patch in pixels.
        mean (tuple of three floats): Mean of images in 0..1 that the model was trained with.
        std (tuple of three floats): Their deviation.
        grid (tuple of two ints): Rows and columns of patch tokens, or None where ``img_size`` is a rule.
        source (str): Where the weights came from: hub, timm, local, random or model.

    Shape:
        - x: :math:`(B, 3, H, W)`, normalised with mean and std; or patches :math:`(B, N, 3 p^2)`, as
          ``preprocess(patch_size=p)`` writes them for a fixed ``img_size``
        - Output: a dict. ``'global'`` is :math:`(B, D)`, the normalised class token. ``'patch'`` is :math:`(B, N, D)`,
          the normalised patch tokens row by row, without class and register tokens. ``'grid'`` has the rows and columns
          of patches in x. With ``layers`` there is ``'layers'``, a dict with ``'global'`` and ``'patch'`` for each
          given int. If a model has no class token, the mean of a layer's patch tokens is its ``'global'``

    Raises:
        ValueError: If an argument is out of range, or if ``img_size`` is a rule and the model was built for one size.
            The message names it.
        TypeError: If ``dtype`` is no floating dtype, or ``model`` no name or module.
        FileNotFoundError: If ``weights`` is missing.
        RuntimeError: If no source gives the weights. The message has each attempt with its cause.

    Example:
        >>> backbone = DINOv2Backbone("vits14", pretrained=False)
        >>> features = backbone(torch.zeros(1, 3, 224, 224))
        >>> features["global"].shape, features["patch"].shape, features["grid"]
        (torch.Size([1, 384]), torch.Size([1, 256, 384]), (16, 16))

    Source: DINOv2 (arXiv 2304.07193), registers (arXiv 2309.16588).
    """

    img_size: Any  # Size or SizeRule
    grid: Any  # Grid, or None with a rule
    layers: Layers | None

    def __init__(
        self,
        variant: str = "vitl14",
        img_size: int | Sequence[int] | SizeRule = 224,
        use_timm_fallback: bool = True,
        *,
        source: str = "auto",
        weights: str | os.PathLike[str] | None = None,
        pretrained: bool = True,
        dtype: torch.dtype | None = None,
        pos_embed: str = "official",
        layers: Sequence[int] | None = None,
        engine: bool = True,
        micro_batch: int | None = None,
        grad_checkpointing: bool = False,
        compile: bool | str = False,
        model: nn.Module | str | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype must be None or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        check_flag("use_timm_fallback", use_timm_fallback)
        check_flag("pretrained", pretrained)
        self.takes_raw = check_flag("engine", engine)
        self.grad_checkpointing = check_flag("grad_checkpointing", grad_checkpointing)
        self.micro_batch = None if micro_batch is None else check_int("micro_batch", micro_batch)
        self.compiled = check_compile(compile)
        if model is not None and not isinstance(model, (str, nn.Module)):
            raise TypeError(f"model must be None, a timm model's name or a module, got {type(model).__name__}")
        if model is not None and (source, weights, pos_embed) != ("auto", None, "official"):
            raise ValueError(
                "model brings its own weights and position embeddings: leave out source, weights, pos_embed"
            )
        self.img_size = check_img_size(img_size, PATCH_SIZE if model is None else 1)
        size = None if callable(self.img_size) else self.img_size
        if model is None:
            self.variant = canonical(variant)
            self.model, self.source = load_dinov2(
                self.variant,
                size,
                use_timm_fallback=use_timm_fallback,
                source=source,
                weights=weights,
                pretrained=pretrained,
                pos_embed=pos_embed,
            )
        else:
            self.variant = model if isinstance(model, str) else type(model).__name__
            found = create_timm(model, size, pretrained) if isinstance(model, str) else model
            self.model = without_head(found)
            self.source = "model"
        self.embed_dim = read_embed_dim(self.model)
        self.patch_size = read_patch_size(self.model)
        self.call_options = call_options(self.model, size)
        self.prefix_tokens = read_prefix_tokens(self.model)
        self.layers = find_layers(layers, self.model)
        self.mean = read_statistic(self.model, "mean", IMAGENET_MEAN)
        self.std = read_statistic(self.model, "std", IMAGENET_STD)
        self.grid = None
        if size is None:
            own = resampling_of("timm" if model is not None else pos_embed, self.variant.endswith("_reg"))
            take_any_size(self.model, self.img_size, own)
        else:
            check_img_size(size, self.patch_size)
            check_fixed_size(self.model, size)
            self.grid = size[0] // self.patch_size, size[1] // self.patch_size
        take_patches(self.model, self.patch_size)
        self.rewrite(engine, dtype)
        if self.engine is not None:
            self.prefix_tokens = self.engine.prefix
        elif grad_checkpointing:
            raise ValueError(f"grad_checkpointing needs the engine, which does not run: {self.refused}")
        self.requires_grad_(False).eval()

    @property
    def projection(self) -> PatchProjection | None:
        """The patch embedding in use, if it is a convolution by patches."""
        return take_patches(self.computing, self.patch_size)

    def input_size(self, size: Size) -> Size:
        """Return the one size that this model takes, or `size` where it takes any."""
        return size if self.grid is None else (self.grid[0] * self.patch_size, self.grid[1] * self.patch_size)

    def forward(self, x: Tensor, needs: frozenset[str] | None = None, raw: Raw | None = None) -> Features:
        """Return {'global': [B, D], 'patch': [B, N, D] or None, 'grid': (rows, columns)} of normalised floats x.

        x: [B, 3, H, W]; if img_size is a rule, of any multiples of the patch size. Or patches [B, N, 3 p p] of
        img_size's grid, row by row, each in the order of a Conv2d's weight. They need a patch embedding that is a
        convolution by patches, as in a ViT, and it becomes one matrix product.
        needs: the features that are read, of 'global', 'patch' and 'layers'; None means all. A 'patch' that is not
        needed is None, and if 'layers' alone is needed, there is no 'global' either. The engine computes no more.
        raw: the preprocessing that is folded into that convolution, if x are raw images.
        It raises ValueError if x is anything else, or if the model's features do not fit embed_dim and the grid.
        """
        check_tensor("x", x)
        weights = None
        if raw is not None and self.projection is not None:
            weights = folded(self.projection, x, raw)  # outside of a compiled forward, which takes them as they are
        slices = [x] if self.micro_batch is None else x.split(self.micro_batch)
        run = DINOv2Backbone.compute if self.compiled is None else partial(self.compiled, DINOv2Backbone.compute)
        parts = [run(self, part, needs, raw, weights) for part in slices]
        return parts[0] if len(parts) == 1 else joined(parts)

    def compute(
        self, x: Tensor, needs: frozenset[str] | None, raw: Raw | None, weights: tuple[Tensor, Tensor] | None
    ) -> Features:
        """Return the features of one slice. weights: those of the patch embedding, with raw folded in."""
        h, w = self.size_of(x) if raw is None else raw.size
        p = self.patch_size
        grid = h // p, w // p
        run = partial(self.run, needs=needs)
        if raw is not None and weights is not None and self.projection is not None:
            out, layers = from_raw(self.projection, run, x, raw, weights)
        else:
            x = x.to(dtype_of(self.computing) or x.dtype)
            out, layers = from_patches(self.computing, run, x, (h, w), p) if x.ndim == 3 else run(x)
        features: Features = {"grid": grid}
        if wants_last(needs, self.layers):
            pooled, patch = split_features(out, self.computing, self.prefix_tokens)
            features = {**self.fit(pooled, patch if wants("patch", needs) else None, grid), "grid": grid}
        if self.layers is not None and wants("layers", needs):
            features["layers"] = {n: self.fit(token, patch, grid) for n, (token, patch) in layers.items()}
        return features

    def run(self, x: Tensor, needs: frozenset[str] | None) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
        """Return the model's features of pixels x, and (global, patch) of each of the layers, from one forward."""
        if self.engine is not None:
            layers = self.layers.blocks if self.layers is not None and wants("layers", needs) else {}
            asked = wants_last(needs, self.layers), wants("patch", needs)
            return self.engine(x, layers, *asked, self.grad_checkpointing)
        if self.layers is not None:
            return run_layers(self.model, self.layers, self.prefix_tokens, self.call_options, x)
        return getattr(self.model, "forward_features", self.model)(x, **self.call_options), {}

    def fit(self, pooled: Tensor, patch: Tensor | None, grid: Grid) -> Features:
        """Return features of the model, or raise ValueError if they do not fit embed_dim and the grid of x."""
        rows, columns = grid
        if pooled.shape[1:] != (self.embed_dim,):
            raise ValueError(f"model gave global features {list(pooled.shape)} where embed_dim is {self.embed_dim}")
        if patch is not None and patch.shape[1:] != (rows * columns, self.embed_dim):
            raise ValueError(
                f"model gave patch tokens {list(patch.shape)} where images of {rows * self.patch_size} x "
                f"{columns * self.patch_size} at patch_size {self.patch_size} have {rows} x {columns} of width "
                f"{self.embed_dim}"
            )
        # A view would keep all tokens for as long as a loss keeps the global one.
        return {"global": pooled.contiguous(), "patch": patch}

    def size_of(self, x: Tensor) -> Size:
        """Return the height and width of images or patches x, or raise ValueError if this model does not take them."""
        p, grid = self.patch_size, self.grid
        if grid is None:
            fits = x.ndim == 4 and x.shape[1] == 3 and all(side > 0 and side % p == 0 for side in x.shape[2:])
            expected = f"[B, 3, H, W] with multiples of {p} as H and W, since img_size is a rule"
        else:
            h, w = size = grid[0] * p, grid[1] * p
            fits = x.shape[1:] == ((grid[0] * grid[1], 3 * p * p) if x.ndim == 3 else (3, h, w))
            expected = f"[B, 3, {h}, {w}], or patches [B, {grid[0] * grid[1]}, {3 * p * p}]"
        if not fits or not x.is_floating_point():
            raise ValueError(f"x must be floating of shape {expected}, got {x.dtype} of shape {list(x.shape)}")
        return (x.shape[2], x.shape[3]) if grid is None else size

    def train(self, mode: bool = True) -> DINOv2Backbone:
        """Keep the model in eval mode, whatever the argument."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> DINOv2Backbone:
        """Keep the model frozen, whatever the argument."""
        return super().requires_grad_(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return no weights: a checkpoint need not hold the teacher. `backbone.model.state_dict()` has them."""
        destination = args[0] if args else destination
        return OrderedDict() if destination is None else destination

    def extra_repr(self) -> str:
        return f"{self.variant}, img_size={self.img_size}, embed_dim={self.embed_dim}, source={self.source}, frozen"
