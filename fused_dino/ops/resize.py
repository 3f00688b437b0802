"""Resize and normalise: closed form, Triton launcher, dispatcher ops, autograd.Function.

out = clip(Wy images Wx^T) * scale + shift
d images = Wy^T (grad * scale, 0 where clipped) Wx

with the weights of the resize as matrices Wy [h, H] and Wx [w, W], whose rows sum to one, and per channel
scale = 1 / ((high - low) std) and shift = -(low / (high - low) + mean) / std.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..reference import resize as reference
from ..reference.dtypes import acc_dtype, upcast, without_autocast
from .blocks import by_rows
from .dispatch import launched
from .function import batched_rows, make_function
from .plain import launch
from .taps import antialias_sums, launch_options

CPU_PIXELS = 2**21  # of a block of images: few enough for a cache, and so many that threads seldom wait for each other
LONGEST_AXIS = 2**18  # of an output: on longer ones float32 does not find for certain which elements read a pixel


class Options(NamedTuple):
    """The arguments of the specification."""

    size: tuple[int, int]
    input_range: tuple[float, float]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    antialias: bool
    clamp: bool
    out_dtype: torch.dtype
    patch_size: int | None

    @property
    def scale(self) -> list[float]:
        low, high = self.input_range
        return [1 / ((high - low) * s) for s in self.std]

    @property
    def shift(self) -> list[float]:
        low, high = self.input_range
        return [-(low / (high - low) + m) / s for m, s in zip(self.mean, self.std, strict=True)]

    @property
    def clip(self) -> list[float]:
        """The bounds, or none."""
        return list(self.input_range) if self.clamp else []

    @property
    def geometry(self) -> tuple[tuple[int, int], str, bool, int]:
        return self.size, self.interpolation, self.antialias, self.patch_size or 0


# --- closed form in plain torch ---------------------------------------------------------------------------------------


def aten(options: Options, suffix: str = "") -> Any:
    """The op under F.interpolate, for its result to be written in place, or its gradient."""
    name = f"upsample_{options.interpolation}2d{suffix}"
    return getattr(torch.ops.aten, f"_upsample_{options.interpolation}2d_aa{suffix}" if options.antialias else name)


def interpolate(pixels: Tensor, size: Sequence[int], options: Options) -> Tensor:
    return reference.interpolate(pixels, list(size), options.interpolation, options.antialias)


def clamp_(pixels: Tensor, options: Options) -> Tensor:
    return pixels.clamp_(*options.input_range) if options.clamp else pixels


def patches(pixels: Tensor, patch_size: int | None) -> Tensor:
    if patch_size is None:
        return pixels
    return rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatched(grad: Tensor, options: Options) -> Tensor:
    if options.patch_size is None:
        return grad
    p, h = options.patch_size, options.size[0] // options.patch_size
    return rearrange(grad, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=p, q=p)


def images_a_block(images: Tensor, options: Options) -> int:
    return max(1, CPU_PIXELS // max(images.shape[2] * images.shape[3], options.size[0] * options.size[1]))


def by_aten(x: Tensor) -> bool:
    """Whether ATen's own ops serve: on a GPU their gradient adds in no fixed order, and a compiler fuses others."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def resize_fwd_torch(images: Tensor, options: Options) -> Tensor:
    """On a CPU in blocks of images, each resized and normalised while it is in the cache."""
    dtype, (h, w) = acc_dtype(images), options.size
    if not by_aten(images):
        pixels = clamp_(interpolate(images.to(dtype), options.size, options), options)
        # Channel by channel with Python numbers: a tensor of constants would be copied to the device in every call.
        # Not in place: a compiler would make a program for each batch size.
        channels = zip(pixels.unbind(1), options.scale, options.shift, strict=True)
        pixels = torch.stack([channel * factor + term for channel, factor, term in channels], 1)
        out = patches(pixels, options.patch_size)
        # By no call that may return its argument: torch 2.11 loses the gradient of what a compiled Function has twice.
        out = out if out.dtype == options.out_dtype else out.to(options.out_dtype)
        return out if out.is_contiguous() else out.contiguous()
    shift = torch.tensor(options.shift, dtype=dtype, device=images.device).unbind()
    out = resize_fwd_empty(images, options)
    step = images_a_block(images, options)
    direct = options.patch_size is None and options.out_dtype == dtype
    scratch = out if direct else images.new_empty(min(step, images.shape[0]), 3, h, w, dtype=dtype)
    for start in range(0, images.shape[0], step):
        block = images[start : start + step].to(dtype)
        pixels = scratch[start : start + step] if direct else scratch[: block.shape[0]]
        if options.antialias and w == 1:  # where aten is wrong: see reference.interpolate
            pixels.copy_(interpolate(block, options.size, options))
        else:
            aten(options).out(block, options.size, False, out=pixels)
        for channel, factor, term in zip(clamp_(pixels, options).unbind(1), options.scale, shift, strict=True):
            torch.add(term, channel, alpha=factor, out=channel)  # one pass
        if not direct:
            out[start : start + step] = patches(pixels, options.patch_size)
    return out


def backward_images(grad: Tensor, images: Tensor, *, options: Options) -> tuple[Tensor]:
    (grad,) = upcast(unpatched(grad, options).to(acc_dtype(images)))
    grad = torch.stack([g * s for g, s in zip(grad.unbind(1), options.scale, strict=True)], 1)
    if options.clamp:
        low, high = options.input_range
        pixels = interpolate(images.to(grad.dtype), options.size, options)
        grad = torch.where((pixels > low) & (pixels < high), grad, 0)
    return (adjoint(grad, images.shape, options),)


def adjoint(grad: Tensor, shape: Sequence[int], options: Options) -> Tensor:
    """Wy^T grad Wx. Where it takes matrices, what is not finite spreads over its row and column."""
    if by_aten(grad):
        return aten(options, "_backward")(grad, options.size, list(shape), False)
    (h, w), (H, W) = options.size, shape[2:]
    rows, columns = (torch.eye(side, dtype=grad.dtype, device=grad.device)[None, None] for side in (H, W))
    rows = interpolate(rows, (h, H), options)[0, 0]
    columns = interpolate(columns, (W, w), options)[0, 0]
    with without_autocast(grad):
        return rows.T @ (grad @ columns.T)


def resize_bwd_torch(grad: Tensor, images: Tensor, options: Options) -> Tensor:
    out = images.new_empty(images.shape)
    return by_rows(
        partial(backward_images, options=options), (out,), grad, images, block=images_a_block(images, options)
    )[0]


# --- Triton -----------------------------------------------------------------------------------------------------------


def resize_fwd_empty(images: Tensor, options: Options) -> Tensor:
    """[B, 3, h, w], or patches [B, (h/p) (w/p), 3 p p]."""
    (h, w), p = options.size, options.patch_size
    shape = (h // p * (w // p), 3 * p * p) if p else (3, h, w)
    return images.new_empty((images.shape[0], *shape), dtype=options.out_dtype)


def resize_bwd_empty(grad: Tensor, images: Tensor, options: Options) -> Tensor:
    return images.new_empty(images.shape)


def launch_forward(
    images: Tensor, out: Tensor | None, inside: Tensor | None, sums: Tensor | None, options: Options
) -> None:
    from ..kernels.resize import resize_fwd_kernel

    arguments, constants, grid = launch_options(images, *options.geometry, False)
    launch(resize_fwd_kernel, grid,
        images, sums, out, inside, *images.stride(), *arguments,
        SCALE=tuple(options.scale), SHIFT=tuple(options.shift), CLIP=tuple(options.clip) or None,
        INTERLEAVED=images.stride(1) == 1 and images.stride(3) == 3, **constants,
    )  # fmt: skip


def launch_sums(images: Tensor, options: Options) -> Tensor | None:
    return antialias_sums(images, options.size, options.interpolation) if options.antialias else None


def launch_resize_fwd(out: Tensor, images: Tensor, options: Options) -> None:
    if images.shape[0]:
        with torch.cuda.device_of(images):  # the tensor's GPU need not be the current one; no-op on a CPU
            launch_forward(images, out, None, launch_sums(images, options), options)


def launch_resize_bwd(out: Tensor, grad: Tensor, images: Tensor, options: Options) -> None:
    """With a clamp the images are resized once more, to see what it clipped: nothing is kept for that."""
    from ..kernels.resize import resize_bwd_kernel

    grad = grad.contiguous()
    if images.shape[0]:
        with torch.cuda.device_of(images):
            sums = launch_sums(images, options)
            inside = grad.new_empty(grad.shape, dtype=torch.bool) if options.clamp else None
            if options.clamp:
                launch_forward(images, None, inside, sums, options)
            arguments, constants, grid = launch_options(images, *options.geometry, True)
            launch(
                resize_bwd_kernel, grid, grad, inside, sums, out, *arguments, SCALE=tuple(options.scale), **constants
            )


resize_fwd = launched("resize_fwd", resize_fwd_empty, launch_resize_fwd)
resize_bwd = launched("resize_bwd", resize_bwd_empty, launch_resize_bwd)


# --- autograd ---------------------------------------------------------------------------------------------------------


def forward(images: Tensor, options: Options, backend: str) -> Tensor:
    return (resize_fwd if backend == "triton" else resize_fwd_torch)(images, options)


def backward(ctx: Any, saved: tuple[Tensor], grads: tuple[Tensor], needs_grad: tuple[bool]) -> tuple[Tensor]:
    run = resize_bwd if ctx.backend == "triton" else resize_bwd_torch
    return (run(*grads, *saved, ctx.options),)


def formula(images: Tensor, options: Options) -> Tensor:
    return reference.preprocess(images, **options._asdict())


def vmap(
    apply: Callable, info: Any, in_dims: tuple, images: Tensor, options: Options, backend: str
) -> tuple[Tensor, int]:
    count = images.shape[1 if in_dims[0] == 0 else 0]
    (images,) = batched_rows(info.batch_size, in_dims[:1], images)
    out = apply(images, options, backend)
    return out.unflatten(0, (info.batch_size, count)), 0


resize_function = make_function(
    "ResizeFunction", forward, backward, formula, inputs=1, vmap=vmap, linear=lambda options: not options.clamp
)


def preprocess(
    images: Tensor,  # [B, 3, H, W]
    size: tuple[int, int],
    *,
    backend: str,
    **options: Any,
) -> Tensor:
    if backend == "triton" and max(size) > LONGEST_AXIS:
        raise ValueError(f"size must be at most {LONGEST_AXIS} a side for the kernels, got {tuple(size)}")
    return resize_function(images, Options(size, **options), backend)
