"""DINOv2Backbone around any model: the same two features, whatever the model returns."""

import pytest
import torch
from torch import Tensor, nn

from fused_dino.teacher import DINOv2Backbone

timm = pytest.importorskip("timm")


class Stub(nn.Module):
    """Returns the features that it was built with, whatever the image."""

    patch_size = 14

    def __init__(self, features, embed_dim: int = 8, **attributes) -> None:
        super().__init__()
        self.features, self.embed_dim = features, embed_dim
        self.scale = nn.Parameter(torch.ones(()))
        self.__dict__.update(attributes)

    def forward(self, x):
        return self.features


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [5, 7, 10])
def test_a_wrong_number_of_patch_tokens_is_refused(count, x):
    backbone = DINOv2Backbone(img_size=(28, 42), model=Stub(torch.randn(2, 1 + count, 8)))
    with pytest.raises(ValueError, match=rf"\[2, {count}, 8\].* 2 x 3"):
        backbone(x)


def test_a_wrong_width_is_refused(x):
    backbone = DINOv2Backbone(img_size=(28, 42), model=Stub(torch.randn(2, 7, 16)))
    with pytest.raises(ValueError, match="embed_dim is 8"):
        backbone(x)


@pytest.mark.parametrize(
    "keys", [("global", "patch"), ("x_norm_clstoken", "x_norm_patchtokens"), ("cls_token", "patch_tokens")]
)
def test_dicts(keys, x):
    pooled, patch = torch.randn(2, 8), torch.randn(2, 6, 8)
    out = DINOv2Backbone(img_size=(28, 42), model=Stub(dict(zip(keys, (pooled, patch), strict=True))))(x)
    assert out["global"] is pooled
    assert out["patch"] is patch
    assert DINOv2Backbone(img_size=(28, 42), model=Stub({keys[0]: pooled}))(x)["patch"] is None


def test_plain_tensors(x):
    tokens, pooled, maps = torch.randn(2, 7, 8), torch.randn(2, 8), torch.randn(2, 8, 2, 3)
    out = DINOv2Backbone(img_size=(28, 42), model=Stub(tokens))(x)
    assert torch.equal(out["global"], tokens[:, 0])
    assert torch.equal(out["patch"], tokens[:, 1:])
    out = DINOv2Backbone(img_size=(28, 42), model=Stub(pooled))(x)
    assert out["global"] is pooled
    assert out["patch"] is None
    out = DINOv2Backbone(img_size=(28, 42), model=Stub(maps))(x)
    torch.testing.assert_close(out["global"], maps.mean((2, 3)))
    assert torch.equal(out["patch"][:, 1 * 3 + 2], maps[:, :, 1, 2])


@pytest.mark.parametrize("features", [{"logits": torch.ones(2, 8)}, [torch.ones(2, 8)], torch.ones(2)])
def test_features_of_no_known_kind_are_refused(features, x):
    with pytest.raises(ValueError, match="model gave"):
        DINOv2Backbone(img_size=(28, 42), model=Stub(features))(x)


@torch.no_grad()
def test_dinov3_by_name():
    entry = "vit_small_patch16_dinov3"
    backbone = DINOv2Backbone(model=entry, img_size=(32, 48), pretrained=False, dtype=torch.float64)
    x = torch.randn(2, 3, 32, 48)
    tokens = backbone.model.forward_features(x.double())
    out = backbone(x)
    assert (backbone.variant, backbone.source, backbone.patch_size, backbone.grid) == (entry, "model", 16, (2, 3))
    torch.testing.assert_close(out["global"], tokens[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(out["patch"], tokens[:, 5:], rtol=0, atol=1e-10)
    assert out["patch"].dtype == torch.float64


@torch.no_grad()
def test_siglip_pools_with_its_own_head():
    shape = {"depth": 1, "embed_dim": 48, "num_heads": 4, "img_size": (32, 48), "num_classes": 5}
    model = timm.create_model("vit_base_patch16_siglip_224", **shape).eval()
    x = torch.randn(2, 3, 32, 48)
    backbone = DINOv2Backbone(model=model, img_size=(32, 48))
    out = backbone(x)
    tokens = model.forward_features(x)
    assert torch.equal(out["global"], model.forward_head(tokens, pre_logits=True))
    assert not torch.equal(out["global"], tokens[:, 0])
    assert torch.equal(out["patch"], tokens)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)


@torch.no_grad()
def test_prefix_tokens_that_are_all_registers_are_no_class_token():
    shape = {"depth": 1, "embed_dim": 48, "num_heads": 4, "img_size": 32}
    model = timm.create_model("vit_medium_patch16_reg4_gap_256", **shape).eval()
    x = torch.randn(2, 3, 32, 32)
    out = DINOv2Backbone(model=model, img_size=32)(x)
    tokens = model.forward_features(x)
    assert torch.equal(out["patch"], tokens[:, 4:])
    torch.testing.assert_close(out["global"], model.fc_norm(tokens[:, 4:].mean(1)))


@torch.no_grad()
def test_efficientnet_by_name():
    backbone = DINOv2Backbone(model="tf_efficientnet_lite0", img_size=(64, 96), pretrained=False)
    x = torch.randn(2, 3, 64, 96)
    out = backbone(x)
    maps = backbone.model.forward_features(x)
    assert (backbone.embed_dim, backbone.patch_size, backbone.grid) == (1280, 32, (2, 3))
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    torch.testing.assert_close(out["global"], maps.mean((2, 3)))
    assert torch.equal(out["patch"][:, 1 * 3 + 2], maps[:, :, 1, 2])


@torch.no_grad()
def test_a_head_that_widens_is_not_asked():
    """MobileNetV3 pools 288 channels into 1024: the patches have 288."""
    backbone = DINOv2Backbone(model="mobilenetv3_small_050", img_size=64, pretrained=False)
    out = backbone(torch.randn(2, 3, 64, 64))
    assert backbone.embed_dim == 288
    torch.testing.assert_close(out["global"], out["patch"].mean(1))


@torch.no_grad()
def test_swin_gives_channels_last_maps_of_its_last_width():
    shape = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 4), "img_size": (64, 96), "window_size": 2}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **shape).eval()
    x = torch.randn(2, 3, 64, 96)
    backbone = DINOv2Backbone(model=model, img_size=(64, 96))
    out = backbone(x)
    assert (backbone.embed_dim, backbone.patch_size) == (96, 32)
    torch.testing.assert_close(out["global"], model(x))
    assert torch.equal(out["patch"][:, 1 * 3 + 2], model.forward_features(x)[:, 1, 2])


def test_statistics_come_from_the_model_where_it_has_them():
    plain = DINOv2Backbone(img_size=28, model=Stub(None))
    assert (plain.mean, plain.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    own = DINOv2Backbone(img_size=28, model=Stub(None, mean=torch.full((3, 1, 1), 0.25), std=[0.5, 0.75, 1]))
    assert (own.mean, own.std) == ((0.25, 0.25, 0.25), (0.5, 0.75, 1.0))
    assert (own.variant, own.source) == ("Stub", "model")


def test_a_model_without_a_patch_embedding_refuses_patches():
    for model in ("tf_efficientnet_lite0", "swin_tiny_patch4_window7_224"):
        backbone = DINOv2Backbone(model=model, img_size=64, pretrained=False)
        with pytest.raises(ValueError, match=r"x must be pixels .* \[2, 4, 3072\].* no patch embedding"):
            backbone(torch.zeros(2, 4, 3 * 32 * 32))
    unused = Stub(torch.ones(2, 8))
    unused.patch_embed = nn.Module()
    unused.patch_embed.proj = nn.Conv2d(3, 8, 14, 14)
    backbone = DINOv2Backbone(img_size=28, model=unused)
    with pytest.raises(ValueError, match=r"never ran its patch embedding"):
        backbone(torch.zeros(2, 4, 588))
    assert not unused.patch_embed.proj.results
