"""DINOv2Backbone, loaded from a file, against published implementations with the same random weights.

The models here have few of their twelve blocks, for speed: the others are the same.
"""

import functools
import re

import pytest
import torch
from torch import Tensor, nn

from fused_dino.teacher import DINOv2Backbone
from fused_dino.teacher.weight_files import official_names

SIZES = [
    pytest.param((518, 518), id="training-grid"),  # position embeddings as they are
    pytest.param((224, 224), id="recipe"),  # resampled
    pytest.param((224, 336), id="wide"),  # rows and columns cannot be swapped
]


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Position embeddings of order one, so that resampling them another way shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1 if re.search(r"norm\w*\.weight|gamma|lambda", name) else 0
        deviation = 0.5 if "pos" in name else 0.05
        parameter.copy_(centre + deviation * noise)
    return model.eval()


def image(size: tuple[int, int]) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_same(ours: dict, cls_token: Tensor, patches: Tensor) -> None:
    assert ours["patch"].shape == patches.shape
    torch.testing.assert_close(ours["global"], cls_token, rtol=0, atol=2e-4)
    torch.testing.assert_close(ours["patch"], patches, rtol=0, atol=2e-4)


def official_vit(**shape) -> nn.Module:
    vits = pytest.importorskip("dinov2.models.vision_transformer")
    shape = {"img_size": 518, "embed_dim": 384, "depth": 2, "num_heads": 6} | shape
    return randomised(vits.DinoVisionTransformer(patch_size=14, init_values=1.0, block_chunks=0, **shape))


@pytest.fixture
def shallow(monkeypatch):
    """Return a function that limits every model of timm's to so many blocks."""
    timm = pytest.importorskip("timm")
    create = timm.create_model
    return lambda depth=2: monkeypatch.setattr(timm, "create_model", functools.partial(create, depth=depth))


@pytest.fixture(scope="module")
def official():
    return official_vit()


@pytest.fixture(scope="module")
def checkpoint(official, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "dinov2_vits14_pretrain.pth"
    torch.save(official.state_dict(), path)
    return path


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_official_without_registers(official, checkpoint, shallow, size):
    shallow()
    x = image(size)
    theirs = official.forward_features(x)
    backbone = DINOv2Backbone("vits14", size, weights=checkpoint)
    ours = backbone(x)
    assert ours["global"].std() > 0.3  # the comparison is between numbers of order one
    assert_same(ours, theirs["x_norm_clstoken"], theirs["x_norm_patchtokens"])
    # timm's model and the official code, each given patches.
    patches = torch.nn.functional.unfold(x, 14, stride=14).transpose(1, 2)
    for model in (backbone, DINOv2Backbone(img_size=size, model=official)):
        assert_same(model(patches), theirs["x_norm_clstoken"], theirs["x_norm_patchtokens"])


@torch.no_grad()
def test_every_kind_of_file_holds_the_same_model(shallow, tmp_path):
    from safetensors.torch import save_file

    shallow(4)
    theirs = official_vit(depth=4)
    state = theirs.state_dict()
    chunked = {
        re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", key): v for key, v in state.items()
    }
    trained = {f"backbone.{key}": value for key, value in chunked.items()} | {"dino_head.mlp.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"teacher": trained, "iteration": 3}, tmp_path / "teacher_checkpoint.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pth")
    save_file(state, tmp_path / "model.safetensors")

    x = image((28, 42))
    expected = theirs.forward_features(x)
    for path in sorted(tmp_path.iterdir()):
        backbone = DINOv2Backbone("vits14", (28, 42), weights=path)
        assert_same(backbone(x), expected["x_norm_clstoken"], expected["x_norm_patchtokens"])
    assert backbone.source == "local"
    # timm's own names, on the grid of another training, are what model.state_dict() writes.
    torch.save(DINOv2Backbone("vits14", 56, weights=path).model.state_dict(), tmp_path / "timm.pth")
    again = DINOv2Backbone("vits14", 56, weights=tmp_path / "timm.pth").model.state_dict()
    assert all(torch.equal(again[k], v) for k, v in torch.load(tmp_path / "timm.pth").items())


@torch.no_grad()
def test_trap_6_timm_resamples_position_embeddings_differently(checkpoint, shallow):
    import timm

    shallow()
    x = image((224, 224))
    file = {"file": str(checkpoint)}
    theirs = timm.create_model(
        "vit_small_patch14_dinov2", True, pretrained_cfg_overlay=file, img_size=224, num_classes=0
    )
    tokens = theirs.eval().forward_features(x)
    ours = DINOv2Backbone("vits14", weights=checkpoint, pos_embed="timm")(x)
    assert_same(ours, tokens[:, 0], tokens[:, 1:])
    official = DINOv2Backbone("vits14", weights=checkpoint)(x)
    assert (ours["patch"] - official["patch"]).norm() > 0.02 * official["patch"].norm()
    # On the training's own grid there is nothing to resample.
    modes = [DINOv2Backbone("vits14", 518, weights=checkpoint, pos_embed=mode) for mode in ("official", "timm")]
    assert torch.equal(*(mode.model.pos_embed for mode in modes))


@torch.no_grad()
def test_as_many_positions_on_another_grid_are_resampled(shallow, tmp_path):
    """8 x 2 has as many positions as the file's 4 x 4, so that a comparison of lengths would leave them as they are."""
    shallow()
    theirs = official_vit(img_size=56)
    torch.save(theirs.state_dict(), tmp_path / "small.pth")
    x = image((112, 28))
    expected = theirs.forward_features(x)
    ours = DINOv2Backbone("vits14", (112, 28), weights=tmp_path / "small.pth")(x)
    assert_same(ours, expected["x_norm_clstoken"], expected["x_norm_patchtokens"])


@torch.no_grad()
def test_feed_forward_of_the_giant(shallow, tmp_path):
    """Its gated layer under official names, in one block of the forty."""
    shallow(1)
    theirs = official_vit(img_size=28, embed_dim=1536, depth=1, num_heads=24, ffn_layer="swiglufused")
    torch.save(theirs.state_dict(), tmp_path / "giant.pth")
    x = image((28, 28))
    expected = theirs.forward_features(x)
    ours = DINOv2Backbone("vitg14", 28, weights=tmp_path / "giant.pth")(x)
    assert_same(ours, expected["x_norm_clstoken"], expected["x_norm_patchtokens"])


@pytest.fixture(scope="module")
def with_registers(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14, num_register_tokens=4, **shape)
    model = randomised(transformers.Dinov2WithRegistersModel(config))
    path = tmp_path_factory.mktemp("registers") / "dinov2_vits14_reg4_pretrain.pth"
    torch.save(official_names(model.state_dict()), path)
    return model, path


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_with_registers(with_registers, shallow, size):
    shallow()
    theirs, path = with_registers
    x = image(size)
    tokens = theirs(x).last_hidden_state
    backbone = DINOv2Backbone("vits14_reg", size, weights=path)
    ours = backbone(x)
    assert tokens.shape[1] == 1 + 4 + backbone.grid[0] * backbone.grid[1]
    assert_same(ours, tokens[:, 0], tokens[:, 5:])
    patches = torch.nn.functional.unfold(x, 14, stride=14).transpose(1, 2)
    assert_same(backbone(patches), tokens[:, 0], tokens[:, 5:])
    both = DINOv2Backbone("vits14_reg", size, weights=path, pos_embed="timm")
    assert torch.equal(both.model.pos_embed, backbone.model.pos_embed)
