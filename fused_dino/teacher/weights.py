"""The sources of DINOv2's weights: torch hub, timm or a file.

Caches come first, and one process per cache directory downloads.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..sizes import Size
from .licences import licence_of, warn_of
from .positions import resampling_of, resize_pos_embed, square_side
from .weight_files import PATCH_KEY, PREPROCESSOR, find_file, read_config, read_statistics, read_weights

PATCH_SIZE = 14
HUB_REPO = "facebookresearch/dinov2:7764ea0f912e53c92e82eb78a2a1631e92725fc8"  # torch hub runs this revision's code
TIMEOUT = 10.0  # seconds without an answer after which a server counts as out of reach
SOURCES = ("auto", "hub", "timm", "local")
POS_EMBEDS = ("official", "timm", "transformers")


class Variant(NamedTuple):
    """The names of one model: timm's architecture, the official checkpoint, transformers' repository."""

    timm: str
    checkpoint: str
    transformers: str


VARIANTS = {
    "vits14": Variant("vit_small_patch14_dinov2", "dinov2_vits14", "facebook/dinov2-small"),
    "vitb14": Variant("vit_base_patch14_dinov2", "dinov2_vitb14", "facebook/dinov2-base"),
    "vitl14": Variant("vit_large_patch14_dinov2", "dinov2_vitl14", "facebook/dinov2-large"),
    "vitg14": Variant("vit_giant_patch14_dinov2", "dinov2_vitg14", "facebook/dinov2-giant"),
    "vits14_reg": Variant(
        "vit_small_patch14_reg4_dinov2", "dinov2_vits14_reg4", "facebook/dinov2-with-registers-small"
    ),
    "vitb14_reg": Variant("vit_base_patch14_reg4_dinov2", "dinov2_vitb14_reg4", "facebook/dinov2-with-registers-base"),
    "vitl14_reg": Variant(
        "vit_large_patch14_reg4_dinov2", "dinov2_vitl14_reg4", "facebook/dinov2-with-registers-large"
    ),
    "vitg14_reg": Variant(
        "vit_giant_patch14_reg4_dinov2", "dinov2_vitg14_reg4", "facebook/dinov2-with-registers-giant"
    ),
}
ALIASES = {alias: name for name, known in VARIANTS.items() for alias in (name, f"dinov2_{name}", *known)}
ALIASES |= {f"dinov2{'reg' if name.endswith('_reg') else ''}-vit-{name[3]}": name for name in VARIANTS}  # REPA's
LETTERS = {384: "s", 768: "b", 1024: "l", 1536: "g"}  # of a variant's name, by width


def canonical(variant: str) -> str:
    """Return the key of VARIANTS for a name or an alias in any case, or raise ValueError."""
    name = ALIASES.get(str(variant).lower().removesuffix(".lvd142m"))
    if name is None:
        raise ValueError(f"variant is {variant!r}, which is no DINOv2; use one of {', '.join(VARIANTS)}")
    return name


def load_dinov2(
    variant: str,
    img_size: Size | None,
    *,
    use_timm_fallback: bool = True,
    source: str = "auto",
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    pos_embed: str = "official",
) -> tuple[nn.Module, str]:
    """Return the model for a key of VARIANTS, and the source of its weights: "hub", "timm", "local" or "random".

    Arguments and errors: see DINOv2Backbone. img_size: None keeps the size of the training.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}; use one of {', '.join(SOURCES)}")
    if pos_embed not in POS_EMBEDS:
        raise ValueError(f"pos_embed is {pos_embed!r}; use one of {', '.join(POS_EMBEDS)}")
    if weights is not None and (not isinstance(weights, (str, os.PathLike)) or not os.fspath(weights)):
        raise TypeError(f"weights must be None or the path of a file or folder, got {weights!r}")
    if weights is None and source == "local":
        raise ValueError('source="local" needs weights, the path of a file or folder')
    if weights is not None and source in ("hub", "timm"):
        raise ValueError(f'weights={os.fspath(weights)!r} needs source="local" or "auto", got {source!r}')
    if weights is not None and not pretrained:
        raise ValueError("weights and pretrained=False exclude each other; give one")
    if weights is not None:
        path = Path(os.path.expanduser(os.fsdecode(weights)))
        return timm_from_file(variant, img_size, path, pos_embed), "local"
    order = order_of(source, variant, use_timm_fallback, pretrained, pos_embed)
    if "hub" in order and pos_embed != "official":
        raise ValueError(f'pos_embed="{pos_embed}" is for timm\'s model, not hub\'s; use source="timm" or "local"')
    loaders: dict[str, Callable[[], nn.Module]] = {
        "hub": partial(load_hub, variant, pretrained),
        "timm": partial(load_timm, variant, img_size, pretrained, pos_embed),
    }
    places = {"hub": HUB_REPO, "timm": timm_file(variant)[0]}
    attempts = []
    for name in order:
        try:
            return loaders[name](), name if pretrained else "random"
        except Exception as error:  # hub runs foreign code, and importing timm can fail in any way
            attempts.append(f"  {name} ({places[name]}): {type(error).__name__}: {shorten(str(error), 500)}\n")
            cause = error
    raise RuntimeError(
        f"DINOv2 {variant!r} could not be loaded. Tried, in this order:\n{''.join(attempts)}"
        'Give source="local" and weights=PATH, a file with its weights, or pretrained=False for random ones.'
    ) from cause


def order_of(source: str, variant: str, use_timm_fallback: bool, pretrained: bool, pos_embed: str) -> list[str]:
    """Return the sources to try: the one that is named, or for "auto" those that fit, cached ones first."""
    if source != "auto":
        return [source]
    if not use_timm_fallback:
        return ["hub"] if pretrained else ["timm"]
    if not pretrained or pos_embed != "official":
        return ["timm"]
    return sorted(["hub", "timm"], key=lambda name: not is_cached(name, variant))


# --- caches and downloads ---------------------------------------------------------------------------------------------


def cached_hub(variant: str, pretrained: bool = True) -> Path | None:
    """Return the folder of hub's code if it and the weights are on the disk, else None."""
    hub = Path(torch.hub.get_dir())
    code = hub / re.sub("[/:]", "_", HUB_REPO)
    weights = hub / "checkpoints" / f"{VARIANTS[variant].checkpoint}_pretrain.pth"
    return code if (code / "hubconf.py").is_file() and (weights.is_file() or not pretrained) else None


def cached_timm(variant: str) -> Path | None:
    """Return timm's file of weights if it is in Hugging Face's cache, else None."""
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(*timm_file(variant), cache_dir=constants.HF_HUB_CACHE)
    return Path(path) if isinstance(path, str) else None


def timm_file(variant: str) -> tuple[str, str]:
    """Return (repository, file) at Hugging Face."""
    return f"timm/{VARIANTS[variant].timm}.lvd142m", "model.safetensors"


def is_cached(source: str, variant: str) -> bool:
    try:
        return (cached_hub if source == "hub" else cached_timm)(variant) is not None
    except (ImportError, RuntimeError, OSError):  # as load_timm will report
        return False


def fetch(directory: Path, cached: Callable[[], Path | None], download: Callable[[], object]) -> Path:
    """Return cached(), after download() if it is None. One process per directory downloads, and the others wait.

    They wait for a file lock, not in a collective, since nodes need not share disks. A full cache may be read-only.
    """
    if (path := cached()) is not None:
        return path
    from filelock import FileLock

    locks = directory / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "fused_dino.lock"):
        if (path := cached()) is None:
            with socket_timeout(TIMEOUT):
                download()
            path = cached()
    if path is None:
        raise FileNotFoundError(f"the download left nothing in {directory}")
    return path


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Set a timeout for sockets: torch.hub sets none, and would wait for a silent server for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- the sources ------------------------------------------------------------------------------------------------------


def load_hub(variant: str, pretrained: bool) -> nn.Module:
    """Load the official model from torch hub, whose code runs in this process."""
    entry = f"dinov2_{variant}"
    options = {"pretrained": pretrained, "verbose": False}
    code = fetch(
        Path(torch.hub.get_dir()),
        partial(cached_hub, variant, pretrained),
        partial(torch.hub.load, HUB_REPO, entry, trust_repo=True, skip_validation=True, **options),
    )
    return torch.hub.load(str(code), entry, source="local", **options)


def load_timm(variant: str, img_size: Size | None, pretrained: bool, pos_embed: str) -> nn.Module:
    """Build timm's architecture with the weights that timm publishes, or with random ones."""
    if not pretrained:
        return new_timm(variant, img_size)
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    def download() -> None:
        file = timm_file(variant)
        # hf_hub_download alone would retry for half a minute without network, and hide the cause.
        get_hf_file_metadata(hf_hub_url(*file), timeout=TIMEOUT)
        hf_hub_download(*file, cache_dir=constants.HF_HUB_CACHE, etag_timeout=TIMEOUT)

    path = fetch(Path(constants.HF_HUB_CACHE), partial(cached_timm, variant), download)
    return timm_from_file(variant, img_size, path, pos_embed)


def new_timm(variant: str, img_size: Size | None) -> Any:
    import timm

    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    return timm.create_model(VARIANTS[variant].timm, pretrained=False, num_classes=0, **size)


def timm_from_file(variant: str, img_size: Size | None, path: Path, pos_embed: str) -> nn.Module:
    """Build timm's architecture with the weights of a file or folder, in their dtype.

    The names are official, timm's or transformers'. A preprocessor_config.json beside them gives mean and std.
    """
    file = find_file(path)
    with torch.device("meta"):  # every tensor comes from the file
        model = new_timm(variant, img_size)
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        state = read_weights(file)
        check_variant(state, model, read_config(file))
        side = square_side(state["pos_embed"])
        if img_size is None:
            model.set_input_size((side * PATCH_SIZE,) * 2)
        options = resampling_of(pos_embed, variant.endswith("_reg"))._asdict()
        positions = resize_pos_embed(state["pos_embed"], (side, side), model.patch_embed.grid_size, **options)
        state = checkpoint_filter_fn(state, model)
        state["pos_embed"] = positions[:, -model.pos_embed.shape[1] :]  # timm keeps no class position beside registers
        model.load_state_dict(state, strict=True, assign=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a file can be broken in any way
        raise ValueError(
            f"weights: {str(path)!r} does not hold DINOv2 {variant!r}: {shorten(str(error), 500)}"
        ) from error
    for name, value in read_statistics(file.parent / PREPROCESSOR).items():
        setattr(model, name, value)
    return model.to(torch.get_default_device())


def create_timm(name: str, img_size: Size | None, pretrained: bool) -> nn.Module:
    """Build any of timm's models, for images of one size or, with None, of every size that it can take."""
    import timm

    if ":" not in name and not timm.is_model(name):  # with one it is a place, such as hf-hub:owner/name
        raise ValueError(f"model is {name!r}, which timm {timm.__version__} does not know; see timm.list_models()")
    size: dict[str, Any] = {"dynamic_img_size": True} if img_size is None else {"img_size": img_size}
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    except TypeError:  # convolutional networks take neither
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    if pretrained:
        warn_of(name, licence_of(getattr(model, "pretrained_cfg", None)))
    return model


def check_variant(state: dict[str, Tensor], model: Any, config: dict[str, Any]) -> None:
    """Raise ValueError with the variant that a state of official or timm's names is of, if it is not the model's.

    config: of transformers, or {}.
    """
    shape = list(state[PATCH_KEY].shape)
    registers = next((state[key].shape[1] for key in ("register_tokens", "reg_token") if key in state), 0)
    if (shape, registers) != (list(model.patch_embed.proj.weight.shape), model.num_reg_tokens):
        letter = LETTERS.get(shape[0]) if shape[1:] == [3, PATCH_SIZE, PATCH_SIZE] and registers in (0, 4) else None
        name = f"vit{letter}14{'_reg' if registers else ''}" if letter else "no variant"
        raise ValueError(f"its {PATCH_KEY} is {shape} and it has {registers} registers, as of {name}")
    if "pos_embed" not in state:
        raise ValueError("it lacks pos_embed")
    heads, expected = config.get("num_attention_heads"), model.blocks[0].attn.num_heads
    if str(config.get("model_type")).startswith("dinov2") and heads != expected:
        raise ValueError(f"config.json beside it has num_attention_heads {heads}, and not {expected}")
