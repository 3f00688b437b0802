"""A card for each recipe: the facts of its docstring, and the size at which its authors ran it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..supervision import Supervision
from .haste import haste
from .irepa import irepa
from .layersync import layersync
from .prx import prx
from .raev2 import LAST_SEVEN, raev2
from .reg import reg
from .repa import repa
from .repae import repae
from .seed import seed
from .selfflow import selfflow
from .sra import sra
from .vicreg import vicreg


class Recipe(NamedTuple):
    """A recipe: what it aligns, by which loss, and the run of its authors whose cost is calculated.

    students: The shape of each term's tensor without the batch. size: Side of the teacher's input for images of 256.
    layers: The teacher's layers that it reads, beside the last. A recipe without a teacher has a target of the model's
        own.
    """

    make: Callable[..., Supervision]
    aligns: str
    loss: str
    students: Mapping[str, tuple[int, ...]]
    teacher: str | None = "vitb14"
    size: int = 224
    layers: tuple[int, ...] | None = None


TOKENS = {"token": (256, 1152)}  # of SiT-XL/2 at 256 x 256
LATENT = {"global": (8192,)}

RECIPES = {
    "repa": Recipe(repa, "hidden tokens with patch tokens", "-cosine", TOKENS),
    "irepa": Recipe(irepa, "hidden tokens with patch tokens standardised over space", "-cosine", TOKENS),
    "repae": Recipe(repae, "hidden tokens with patch tokens, for the autoencoder too", "-cosine", TOKENS),
    "haste": Recipe(haste, "hidden tokens with patch tokens, up to a step", "-cosine", TOKENS),
    "reg": Recipe(reg, "hidden tokens and class token with the teacher's", "-cosine", {"token": (257, 1152)}),
    "prx": Recipe(
        prx, "hidden tokens with DINOv3's patch tokens", "-cosine", {"token": (256, 1792)},
        "vit_large_patch16_dinov3", 256,
    ),
    "raev2": Recipe(
        raev2, "hidden tokens with a sum of the teacher's layers", "squared error", {"token": (256, 1440)},
        "vit_large_patch16_dinov3", 256, LAST_SEVEN,
    ),
    "sra": Recipe(sra, "hidden tokens with later ones of an EMA at less noise", "smooth L1", TOKENS, None),
    "selfflow": Recipe(selfflow, "hidden tokens of mixed noise with an EMA's", "1 - cosine", TOKENS, None),
    "layersync": Recipe(layersync, "hidden tokens with those of a later block", "-cosine", TOKENS, None),
    "vicreg": Recipe(vicreg, "a latent with the global token", "VICReg", LATENT, "vitl14"),
    "seed": Recipe(seed, "a latent with the global token", "1 - cosine", LATENT, "vitl14"),
}  # fmt: skip

RELATIONS = "a term of the similarities between an image's tokens"
PIXELS = "a perceptual term, whose gradient reaches the image"
MISSING = {
    "vf": ("LightningDiT's VF loss, arXiv 2501.01423", RELATIONS),
    "gram": ("DINOv3's Gram anchoring, arXiv 2508.10104", RELATIONS),
    "urepa": ("U-REPA's manifold loss, arXiv 2503.18414", RELATIONS),
    "paka": ("lightly's PatchKernelAlignmentLoss", RELATIONS),
    "lightlyv3": ("lightly-train's distillationv3", f"{RELATIONS}, and one of the similarities with a queue of images"),
    "lightlyv2": ("lightly-train's distillationv2", "targets of several blocks, joined along the channels"),
    "hasteattention": ("HASTE's attention maps, arXiv 2505.16792", "a term of attention maps"),
    "vicregl": ("VICRegL's local loss, arXiv 2210.01571", "a term that matches tokens with their nearest"),
    "hypersphere": ("lightly's HypersphereLoss, of alignment and uniformity", "a term of the distances between images"),
    "phis": ("RADIO's PHI-S, arXiv 2410.01680", "targets that are whitened by stored statistics of the teacher"),
    "crepa": ("CREPA, arXiv 2506.09229", "a term that compares with neighbouring frames"),
    "dinoperceptual": ("dino_perceptual", PIXELS),
    "perchead": ("PercHead's dino_loss", PIXELS),
}  # name without marks: what it is, and what it needs


def plain(name: str) -> str:
    """Return the letters and digits of a name, in lower case, without "loss" and "'s"."""
    return re.sub(r"'s$|[\W_]", "", name).lower().removesuffix("loss")


def find_missing(name: str) -> str | None:
    """Say why a published loss is no recipe yet, by its name or a word of what it is; None for what is not known."""
    key = plain(name)
    words = {word: x for x in reversed(MISSING.values()) for word in map(plain, x[0].partition(",")[0].split())}
    found = MISSING.get(key) or (words.get(key) if key else None)
    return None if found is None else f"{name!r} is no recipe yet: {found[0]} needs {found[1]}"


class Argument(NamedTuple):
    """An argument: its default in the signature, and what the docstring says of the default and of the argument."""

    name: str
    default: Any
    of: str
    meaning: str


class Card(NamedTuple):
    """What a recipe's docstring says, part by part."""

    name: str
    summary: str
    formula: str
    details: str
    arguments: tuple[Argument, ...]
    example: str
    source: str

    @property
    def constants(self) -> dict[str, float]:
        """Return the numbers among the arguments, without the student's width."""
        return {x.name: x.default for x in self.arguments[1:] if type(x.default) in (int, float)}


def card(name: str) -> Card:
    """Read a recipe's docstring."""
    make = RECIPES[name].make
    text = (inspect.getdoc(make) or "").replace("``", "`")
    summary, _, rest = text.partition("\n\n")
    formula, _, details = rest.removeprefix("Formula::\n\n").partition("\n\n")
    details, _, rest = details.partition("\n\nArgs:\n")
    arguments, _, rest = rest.partition("\n\nReturns:\n")
    example, _, source = rest.partition("Example:\n")[2].partition("\n\nSource: ")
    lines = [re.sub(rf"\b{name}\(", f"recipes.{name}(", line[8:]) for line in example.splitlines()]
    names = [word for word in ("DINOv2Backbone", "recipes") if word in "".join(lines)]
    return Card(
        name,
        summary.removeprefix("Returns "),
        inspect.cleandoc(formula),
        " ".join(details.split()),
        tuple(read_arguments(arguments, inspect.signature(make).parameters)),
        "\n".join(["import torch", f"from fused_dino import {', '.join(names)}", "", *lines]),
        " ".join(source.split()),
    )


def read_arguments(text: str, parameters: Any) -> list[Argument]:
    found = []
    for name, meaning in re.findall(r"^    (\w+) \([^)]*\): (.*(?:\n {8}.*)*)", text, re.MULTILINE):
        said, _, default = " ".join(meaning.split()).partition(" Default: ")
        found.append(Argument(name, parameters[name].default, default.partition(", ")[2].removesuffix("."), said))
    return found
