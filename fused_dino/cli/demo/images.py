"""Images as people have them, read as a viewer shows them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CommandError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
LONGEST_SIDE = 640  # larger images are reduced once; a crop then costs the same whatever the camera
PANORAMA_SIDE = 224  # the shorter side of a panorama, which is reduced less: the side of a crop
SHORTEST_SIDE = 32
LONGEST_SHAPE = 20  # times as long as wide, or as wide as long
# Tags of a TIFF, and the values that matter.
BITS, SAMPLE_FORMAT, UNSIGNED = 258, 339, 1
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0


def read_image(path: Path) -> Tensor:
    """Read an image as a viewer shows it: uint8 [3, H, W], upright, in sRGB, on white, the first frame.

    It is reduced to at most `LONGEST_SIDE` a side, a panorama to `PANORAMA_SIDE` of its shorter side.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a viewer shows a large image, or one with broken metadata, in silence
            # Given a name, Pillow maps a TIFF into memory, and shears one that is to be turned by a quarter.
            with path.open("rb") as file, Image.open(file) as image:
                shown = as_shown(image)
    except UnidentifiedImageError:
        what = "Pillow knows no such image" if path.stat().st_size else "it is empty"
        raise CommandError(f"cannot read the image {path}: {what}") from None
    except Exception as error:  # Pillow's readers raise many kinds, SyntaxError among them
        raise CommandError(f"cannot read the image {path}: {' '.join(str(error).split())}") from None
    shorter, longer = sorted(shown.size)
    if shorter < SHORTEST_SIDE or longer > LONGEST_SHAPE * shorter:
        fault = "too small" if shorter < SHORTEST_SIDE else "too long"
        raise CommandError(f"the image {path} is {shown.width}x{shown.height}: {fault} to cut crops from")
    side = max(LONGEST_SIDE, PANORAMA_SIDE * longer // shorter)
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1).contiguous()  # HWC -> CHW


def as_shown(image: Image) -> Image:
    from PIL import ImageOps

    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    tiles: Sequence[Any] = getattr(image, "tile", ())
    if 16 in tags.get(BITS, ()) and len(tiles) > 1 and tiles[0].args[0] == "R":
        raise ValueError("Pillow misreads planes of 16 bits, one of each colour; save them as RGB by pixel")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        unsigned = tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED
        upright = eight_bits(upright, unsigned, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    return in_srgb(on_white(upright))


def eight_bits(image: Image, unsigned: bool, white_is_zero: bool) -> Image:
    """Return 16-bit, 32-bit or float grey as 8-bit grey.

    16 bits are shown on their full scale. Others are shown on that of 8 bits, of 16 bits (integers) or of 0..1 (floats)
    if they lie in it, else from the least to the greatest value. NaN is black.
    """
    import numpy as np
    from PIL import Image

    stored = np.array(image)
    values = stored.astype(np.float64)
    if image.mode == "I" and unsigned:
        values %= 2**32  # Pillow reads them as signed
    finite = values[np.isfinite(values)]
    least, greatest = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    scales = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
    low, high = next(((0, top) for top in scales if least >= 0 and greatest <= top), (least, greatest))
    values = (values - low) / max(high - low, 1e-300)
    values = np.nan_to_num(1 - values if white_is_zero else values, nan=0.0).clip(0, 1)
    shown = (255 * values).round().astype(np.uint8)
    if "transparency" in image.info:
        shown[stored == image.info["transparency"]] = 255
    return Image.fromarray(shown)


def on_white(image: Image) -> Image:
    from PIL import Image

    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple):  # of 16 bits a channel, where Pillow keeps the upper 8 of pixels
        image.info["transparency"] = tuple(value >> 8 for value in key) if max(key) > 255 else key
    over = image.convert("RGBA")
    white = Image.new("RGBA", over.size, "white")
    flat = Image.alpha_composite(white, over).convert("RGB")
    flat.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    return flat


def in_srgb(image: Image) -> Image:
    """Return `image` in sRGB by its colour profile, if it has one that fits."""
    from PIL import ImageCms

    profile: Any = image.info.get("icc_profile")
    coloured = image if image.mode in ("L", "CMYK") else image.convert("RGB")
    if profile:
        srgb = ImageCms.createProfile("sRGB")
        with suppress(ImageCms.PyCMSError, OSError):  # of a broken profile, or of other channels: viewers pass it over
            managed = ImageCms.profileToProfile(coloured, io.BytesIO(profile), srgb, outputMode="RGB")
            if managed is not None:
                return managed
    return coloured.convert("RGB")
