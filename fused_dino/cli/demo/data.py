"""Captioned photographs, embedded or from the user's folder, crops of them, and captions as vectors."""

import re
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CommandError
from ..text import printable
from .images import LONGEST_SIDE, SHORTEST_SIDE, SUFFIXES, read_image
from .photographs import PHOTOGRAPHS, Entry

__all__ = [
    "LONGEST_SIDE",
    "SHORTEST_SIDE",
    "WORD",
    "Photo",
    "bag_of_words",
    "captioned",
    "crop",
    "embedded",
    "from_folder",
    "locate",
    "read_image",
]
LEARNING_FRACTION = 0.6
# A word, or a single ideograph: Chinese and Japanese captions share characters where they share no spaces.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph with the captions to learn from and those held out."""

    name: str
    pixels: Tensor  # uint8 [3, H, W]
    learn: tuple[str, ...]
    held_out: tuple[str, ...]
    entry: Entry | None = None  # whose it is, for the embedded ones

    def part(self, held_out: bool) -> Tensor:
        """Return the part that is held out, the end of the longer side, or the rest. The two have no common pixel."""
        axis = 2 if self.pixels.shape[2] >= self.pixels.shape[1] else 1
        length = self.pixels.shape[axis]
        cut = round(LEARNING_FRACTION * length)
        return self.pixels.narrow(axis, cut, length - cut) if held_out else self.pixels.narrow(axis, 0, cut)


def embedded() -> list[Photo]:
    """Return the photographs that the wheels of scikit-image and scikit-learn hold."""
    return [Photo(e.name, read_image(locate(e)), e.learn, e.held_out, e) for e in PHOTOGRAPHS]


def locate(entry: Entry) -> Path:
    spec = find_spec(entry.package)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(f'the demo\'s photographs need {entry.project}: pip install "fused_dino[demo]"')
    return Path(next(iter(spec.submodule_search_locations))) / entry.file


def from_folder(folder: Path) -> list[Photo]:
    """Return every image NAME.jpg (or of another suffix of `SUFFIXES`), with its captions in NAME.txt, one per line.

    The last quarter of the captions, and at least one, is held out. Folders and hidden files are passed over.
    """
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not special(path))
    except OSError as error:
        raise CommandError(f"--images: cannot read the folder {folder}: {error.strerror}") from None
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    texts = {path.stem: path for path in files if path.suffix.lower() == ".txt"}  # .txt comes after .TXT
    if len(paths) < 2:
        kinds = ", ".join(SUFFIXES)
        raise CommandError(f"--images: {folder} holds {len(paths)} images ({kinds}); a choice takes at least two")
    return [captioned(path, texts.get(path.stem, path.with_suffix(".txt"))) for path in paths]


def special(path: Path) -> bool:
    """Return whether a path is a folder, a pipe or the like. A broken link is not: reading it raises."""
    return path.exists() and not path.is_file()


def captioned(path: Path, text: Path) -> Photo:
    try:
        lines = [" ".join(line.split()) for line in text.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise CommandError(f"--images: {path.name} has no captions: write them, one a line, to {text}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--images: cannot read {text}: {error}") from None
    captions = tuple(dict.fromkeys(printable(line) for line in lines if WORD.search(line)))
    if len(captions) < 2:
        raise CommandError(f"--images: {text} needs at least two different captions, one to learn and one to hold out")
    learnt = len(captions) - max(1, len(captions) // 4)
    return Photo(printable(path.stem), read_image(path), captions[:learnt], captions[learnt:])


def crop(part: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cut a random square of 60 to 100% of the shorter side, mirrored half of the time: [3, size, size] in -1..1."""
    height, width = part.shape[1:]
    size_draw, down, right, mirror = torch.rand(4, generator=generator).tolist()
    side = round((0.6 + 0.4 * size_draw) * min(height, width))
    top, left = round(down * (height - side)), round(right * (width - side))
    square = part[None, :, top : top + side, left : left + side]
    square = F.interpolate(square.float() / 127.5 - 1, size=(size, size), mode="bilinear", antialias=True)[0]
    return square.flip(-1) if mirror < 0.5 else square


def bag_of_words(captions: list[str], buckets: int) -> Tensor:
    """Count words in buckets chosen by their checksums: [len(captions), buckets], each row of unit length."""
    bags = torch.zeros(len(captions), buckets)
    for row, caption in zip(bags, captions, strict=True):
        for word in WORD.findall(caption.lower()):
            row[zlib.crc32(word.encode()) % buckets] += 1
    return F.normalize(bags, dim=-1)
