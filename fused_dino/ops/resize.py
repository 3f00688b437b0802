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

CPU_PIXELS = 2**21  # of a block of images: few enough for a cache, and enough that threads seldom wait for each other
MAX_SIDE = 2**18  # of an output: beyond it float32 may not tell which elements read a pixel


class Options(NamedTuple):
    """The options of reference.preprocess."""

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
        """The factor of each channel."""
        low, high = self.input_range
        return [1 / ((high - low) * s) for s in self.std]

    @property
    def shift(self) -> list[float]:
        """The constant added to each channel."""
        low, high = self.input_range
        return [-(low / (high - low) + m) / s for m, s in zip(self.mean, self.std, strict=True)]

    @property
    def clip(self) -> list[float]:
        """The two bounds of a pixel, or an empty list."""
        return list(self.input_range) if self.clamp else []

    @property
    def geometry(self) -> tuple[tuple[int, int], str, bool, int]:
        """The arguments of taps.launch_options after the images."""
        return self.size, self.interpolation, self.antialias, self.patch_size or 0


# --- closed form in plain torch ---------------------------------------------------------------------------------------


def aten_op(options: Options, suffix: str = "") -> Any:
    """Return ATen's op below F.interpolate, or with the suffix "_backward" its gradient."""
    name = f"upsample_{options.interpolation}2d"
    return getattr(torch.ops.aten, f"_{name}_aa{suffix}" if options.antialias else f"{name}{suffix}")


def interpolate(pixels: Tensor, size: Sequence[int], options: Options) -> Tensor:
    """Resize as the specification does."""
    return reference.interpolate(pixels, list(size), options.interpolation, options.antialias)


def clamp_(pixels: Tensor, options: Options) -> Tensor:
    """Clip the pixels in place if the options say so."""
    return pixels.clamp_(*options.input_range) if options.clamp else pixels


def patches(pixels: Tensor, patch_size: int | None) -> Tensor:
    """Split [B, 3, h, w] into patches [B, (h/p) (w/p), 3 p p], unless patch_size is None."""
    if patch_size is None:
        return pixels
    return rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatched(grad: Tensor, options: Options) -> Tensor:
    """Join patches back into [B, 3, h, w]."""
    if options.patch_size is None:
        return grad
    p, h = options.patch_size, options.size[0] // options.patch_size
    return rearrange(grad, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=p, q=p)


def images_per_block(images: Tensor, options: Options) -> int:
    """Return how many images a CPU's cache holds."""
    return max(1, CPU_PIXELS // max(images.shape[2] * images.shape[3], options.size[0] * options.size[1]))


def uses_aten(x: Tensor) -> bool:
    """Whether ATen's own ops are used. On a GPU their gradient adds in no fixed order, and compilers fuse other ops."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def resize_fwd_torch(images: Tensor, options: Options) -> Tensor:
    """Resize and normalise. On a CPU each block of images is done while it is in the cache."""
    dtype, (h, w) = acc_dtype(images), options.size
    if not uses_aten(images):
        pixels = clamp_(interpolate(images.to(dtype), options.size, options), options)
        # Channel by channel with Python numbers: a tensor of constants would be copied to the device in every call.
        # Not in place: a compiler would make a program for each batch size.
        channels = zip(pixels.unbind(1), options.scale, options.shift, strict=True)
        pixels = torch.stack([channel * factor + term for channel, factor, term in channels], 1)
        out = patches(pixels, options.patch_size)
        # No call here may return its argument: torch 2.11 loses the gradient of a tensor that a compiled Function has
        # twice.
        out = out if out.dtype == options.out_dtype else out.to(options.out_dtype)
        return out if out.is_contiguous() else out.contiguous()
    shift = torch.tensor(options.shift, dtype=dtype, device=images.device).unbind()
    out = resize_fwd_empty(images, options)
    step = images_per_block(images, options)
    direct = options.patch_size is None and options.out_dtype == dtype
    scratch = out if direct else images.new_empty(min(step, images.shape[0]), 3, h, w, dtype=dtype)
    for start in range(0, images.shape[0], step):
        block = images[start : start + step].to(dtype)
        pixels = scratch[start : start + step] if direct else scratch[: block.shape[0]]
        if options.antialias and w == 1:  # ATen is wrong here: see reference.interpolate
            pixels.copy_(interpolate(block, options.size, options))
        else:
            aten_op(options).out(block, options.size, False, out=pixels)
        for channel, factor, term in zip(clamp_(pixels, options).unbind(1), options.scale, shift, strict=True):
            torch.add(term, channel, alpha=factor, out=channel)  # one pass
        if not direct:
            out[start : start + step] = patches(pixels, options.patch_size)
    return out


def backward_block(grad: Tensor, images: Tensor, *, options: Options) -> tuple[Tensor]:
    """Return the gradient of a block of images."""
    (grad,) = upcast(unpatched(grad, options).to(acc_dtype(images)))
    grad = torch.stack([g * s for g, s in zip(grad.unbind(1), options.scale, strict=True)], 1)
    if options.clamp:
        low, high = options.input_range
        pixels = interpolate(images.to(grad.dtype), options.size, options)
        grad = torch.where((pixels > low) & (pixels < high), grad, 0)
    return (adjoint(grad, images.shape, options),)


def adjoint(grad: Tensor, shape: Sequence[int], options: Options) -> Tensor:
    """Return Wy^T grad Wx. As a product of matrices it spreads NaN and infinity over their row and column."""
    if uses_aten(grad):
        return aten_op(options, "_backward")(grad, options.size, list(shape), False)
    (h, w), (H, W) = options.size, shape[2:]
    rows, columns = (torch.eye(side, dtype=grad.dtype, device=grad.device)[None, None] for side in (H, W))
    rows = interpolate(rows, (h, H), options)[0, 0]
    columns = interpolate(columns, (W, w), options)[0, 0]
    with without_autocast(grad):
        return rows.T @ (grad @ columns.T)


def resize_bwd_torch(grad: Tensor, images: Tensor, options: Options) -> Tensor:
    """Return the gradient of the images."""
    out = images.new_empty(images.shape)
    return by_rows(
        partial(backward_block, options=options), (out,), grad, images, block=images_per_block(images, options)
    )[0]


# --- Triton -----------------------------------------------------------------------------------------------------------


def resize_fwd_empty(images: Tensor, options: Options) -> Tensor:
    """Allocate the result, [B, 3, h, w] or patches [B, (h/p) (w/p), 3 p p]."""
    (h, w), p = options.size, options.patch_size
    shape = (h // p * (w // p), 3 * p * p) if p else (3, h, w)
    return images.new_empty((images.shape[0], *shape), dtype=options.out_dtype)


def resize_bwd_empty(grad: Tensor, images: Tensor, options: Options) -> Tensor:
    """Allocate the gradient of the images."""
    return images.new_empty(images.shape)


def launch_forward(
    images: Tensor, out: Tensor | None, inside: Tensor | None, sums: Tensor | None, options: Options
) -> None:
    """Fill `out` with the result, or `inside` with whether each pixel is inside the range."""
    from ..kernels.resize import resize_fwd_kernel

    arguments, constants, grid = launch_options(images, *options.geometry, False)
    launch(resize_fwd_kernel, grid,
        images, sums, out, inside, *images.stride(), *arguments,
        SCALE=tuple(options.scale), SHIFT=tuple(options.shift), CLIP=tuple(options.clip) or None,
        INTERLEAVED=images.stride(1) == 1 and images.stride(3) == 3, **constants,
    )  # fmt: skip


def launch_sums(images: Tensor, options: Options) -> Tensor | None:
    """Return what an antialiased resize divides its weights by, else None."""
    return antialias_sums(images, options.size, options.interpolation) if options.antialias else None


def launch_resize_fwd(out: Tensor, images: Tensor, options: Options) -> None:
    """Fill `out`, which resize_fwd_empty allocated."""
    if images.shape[0]:
        with torch.cuda.device_of(images):  # the tensor's GPU need not be the current one; no-op on a CPU
            launch_forward(images, out, None, launch_sums(images, options), options)


def launch_resize_bwd(out: Tensor, grad: Tensor, images: Tensor, options: Options) -> None:
    """Fill `out`, which resize_bwd_empty allocated. A clamp resizes the images again, to find what it clipped."""
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
    """Return what resize_fwd_empty allocates."""
    return (resize_fwd if backend == "triton" else resize_fwd_torch)(images, options)


def backward(ctx: Any, saved: tuple[Tensor], grads: tuple[Tensor], needs_grad: tuple[bool]) -> tuple[Tensor]:
    """Return the gradient of the images."""
    run = resize_bwd if ctx.backend == "triton" else resize_bwd_torch
    return (run(*grads, *saved, ctx.options),)


def formula(images: Tensor, options: Options) -> Tensor:
    """Return the result by the specification, for higher derivatives."""
    return reference.preprocess(images, **options._asdict())


def vmap(
    apply: Callable, info: Any, in_dims: tuple, images: Tensor, options: Options, backend: str
) -> tuple[Tensor, int]:
    """Run one call over the images of all batches."""
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
    """Return what reference.preprocess returns."""
    if backend == "triton" and max(size) > MAX_SIDE:
        raise ValueError(f"size must be at most {MAX_SIDE} a side for the kernels, got {tuple(size)}")
    return resize_function(images, Options(size, **options), backend)
