"""`fused-dino teachers`: say what can teach, what it costs, and under which licence its weights are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import nn

from ..costs import on_meta, teacher_kernels
from ..sizes import Size
from ..teacher.licences import licence_of
from ..teacher.weights import HUB_REPO, VARIANTS, canonical
from .errors import CommandError

SIDE = 224


class Family(NamedTuple):
    """Models of one origin.

    names: Patterns of timm's names for what is listed without being asked for.
    gated: Whether a download of the weights needs an agreement first, by the page `gated_by`; None where unknown.
    note: What else to know of that.
    """

    title: str
    names: tuple[str, ...] = ()
    gated: bool | None = None
    gated_by: str = "unknown"
    note: str = ""


FAMILIES = (
    Family("DINOv2 (arXiv 2304.07193), with registers as *_reg (arXiv 2309.16588)", ("vit_*_dinov2.*",), False,
           "https://github.com/facebookresearch/dinov2#pretrained-models"),
    Family("DINOv3 (arXiv 2508.10104)", ("vit_*_dinov3.*", "convnext_*.dinov3_*"), False,
           "https://github.com/facebookresearch/dinov3/issues/145", "those of Meta's own repositories are"),
    Family("SigLIP 2 (arXiv 2502.14786)", ("vit_*_siglip_[0-9]*.v2_*", "naflexvit_*_siglip.v2_*"), False,
           "https://huggingface.co/timm/vit_so400m_patch14_siglip_224.v2_webli"),
)  # fmt: skip


class Teacher(NamedTuple):
    """A model that teaches, by the name that `teacher=` takes.

    gflop: Of one image at 224, a multiply-add as two.
    """

    name: str
    family: str
    width: int
    patch: int
    parameters: int
    gflop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    commercial: bool | None
    licence_source: str
    gated: bool | None
    gated_by: str
    gated_note: str
    sources: tuple[str, ...]


def run(names: Sequence[str] = (), json_: bool = False) -> int:
    import timm

    chosen = matching(names) if names else [name for family in FAMILIES for name in listed(family)]
    found: list[Teacher] = []
    refused: dict[str, str] = {}
    families = [*FAMILIES, Family(f"timm {timm.__version__}")]
    for family in families:
        teachers = []
        for name in (name for name in chosen if family_of(name, families) is family):
            try:
                teachers.append(describe(name, family))
            except Exception as error:  # timm's models refuse in many ways
                refused[name] = shorten(str(error) or type(error).__name__, 120)
        if not json_:
            show(teachers)
        found += teachers
    if json_:
        rows = [{**teacher._asdict(), "gflop": round(teacher.gflop, 3)} for teacher in found]
        document = {"timm": timm.__version__, "image_size": SIDE, "teachers": rows, "cannot_teach": refused}
        print(json.dumps(document, indent=2))
        return 0
    for name, why in refused.items():
        print(f"{name} cannot teach at {SIDE}: {why}")
    if not names:
        print(
            f"timm {timm.__version__} has {len(known()) - len(chosen)} more: fused-dino teachers 'eva02*' lists some."
        )
    return 0


# --- names ------------------------------------------------------------------------------------------------------------


@cache
def known() -> tuple[str, ...]:
    """Return every name: DINOv2's variants, then timm's models with weights that are none of them."""
    import timm

    others = (name for name in timm.list_pretrained() if not fnmatchcase(name, FAMILIES[0].names[0]))
    return (*VARIANTS, *others)


def listed(family: Family) -> list[str]:
    if family is FAMILIES[0]:
        return list(VARIANTS)
    return [name for name in known() if any(fnmatchcase(name, pattern) for pattern in family.names)]


def matching(patterns: Sequence[str]) -> list[str]:
    """Return the names that fit any pattern. Raise CommandError with similar names for a pattern that none fits."""
    found: dict[str, None] = {}
    for pattern in patterns:
        fits = [name for name in known() if fnmatchcase(name, pattern) or name.partition(".")[0] == pattern]
        with suppress(ValueError):
            fits = fits or [canonical(pattern)]
        if not fits:
            raise CommandError(unknown(pattern))
        found |= dict.fromkeys(fits)
    return list(found)


def unknown(name: str) -> str:
    near = get_close_matches(name, {*known(), *(name.partition(".")[0] for name in known())}, 4, 0.5)
    hint = f"; near are {', '.join(near)}" if near else f"; DINOv2's are {', '.join(VARIANTS)}"
    return f"{name!r} is no teacher{hint}"


def family_of(name: str, families: Sequence[Family]) -> Family:
    return next((family for family in families[:-1] if name in listed(family)), families[-1])


# --- facts ------------------------------------------------------------------------------------------------------------


def at_224(h: int, w: int, patch: int) -> Size:
    """A rule of sizes, under which a model keeps the position embeddings of its training."""
    return SIDE, SIDE


def describe(name: str, family: Family) -> Teacher:
    try:
        teacher = on_meta(name, at_224)
    except ValueError:  # of one size only
        teacher = on_meta(name, SIDE)
    kernels = teacher_kernels(teacher, 1, torch.float32, SIDE)
    config: Any = teacher.model.pretrained_cfg
    licence = licence_of(config)
    place = f"timm (huggingface.co/{config['hf_hub_id']})"
    return Teacher(
        name, family.title, teacher.embed_dim, teacher.patch_size, parameters(teacher.model),
        sum(kernel.flops for kernel in kernels) / 1e9, teacher.mean, teacher.std,
        licence.name, licence.commercial, licence.source, family.gated, family.gated_by, family.note,
        (f"hub (github.com/{HUB_REPO.partition(':')[0]})", place) if name in VARIANTS else (place,),
    )  # fmt: skip


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- the table --------------------------------------------------------------------------------------------------------


def show(teachers: Sequence[Teacher]) -> None:
    """Print a family: the facts that its models share, then a line for each."""
    groups: dict[tuple[str, ...], list[Teacher]] = {}
    for teacher in teachers:
        groups.setdefault(tuple(facts(teacher)), []).append(teacher)
    for lines, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        print("\n".join(lines))
        width = max(len("teacher"), *(len(teacher.name) for teacher in group))
        print(f"\n  {'teacher':<{width}}  width  patch  parameters  GFLOP at 224")
        for x in sorted(group, key=lambda x: x.parameters):
            size = f"{x.parameters / 1e6:,.1f} M"
            print(f"  {x.name:<{width}}  {x.width:>5}  {x.patch:>5}  {size:>10}  {x.gflop:>12,.1f}")
        print(flush=True)


def facts(x: Teacher) -> Iterator[str]:
    """Yield the lines that stand above a group's models."""
    said = {True: "which allows commercial use", False: "which forbids commercial use", None: "commercial use unknown"}
    gate = {True: "gated", False: "not gated", None: "unknown whether gated"}
    yield x.family
    yield f"  licence {x.licence}, {said[x.commercial]}"
    yield f"  weights from {' or '.join(source.partition(' ')[0] for source in x.sources)}, " + ", ".join(
        filter(None, (gate[x.gated], x.gated_note))
    )
    yield f"  mean {' '.join(map('{:g}'.format, x.mean))}, std {' '.join(map('{:g}'.format, x.std))}"
