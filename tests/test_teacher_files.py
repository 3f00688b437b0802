"""DINOv2Backbone of files and folders as transformers' save_pretrained writes them, and what it says of other files."""

import argparse
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_dino import DINOv2Backbone
from fused_dino.teacher.weight_files import MARKS, official_names
from test_teacher_parity import assert_same, image, randomised

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Limit every model of timm's to two blocks."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))


def dinov2(registers: int = 0, **options) -> nn.Module:
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **(SMALL | options))
        return randomised(transformers.Dinov2WithRegistersModel(config))
    return randomised(transformers.Dinov2Model(transformers.Dinov2Config(**(SMALL | options))))


@pytest.fixture(scope="module", params=["vits14", "vits14_reg"])
def saved(request, tmp_path_factory) -> tuple[str, nn.Module, Path]:
    """A variant's name, a model of transformers and the folder that it was saved in."""
    model = dinov2(4 if request.param.endswith("_reg") else 0)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def load(variant: str, path: str | Path, size=56, **options) -> DINOv2Backbone:
    return DINOv2Backbone(variant, size, source="local", weights=path, **options)


@torch.no_grad()
@pytest.mark.parametrize("size", [56, (28, 70)])
def test_a_saved_model_gives_transformers_features(saved, size):
    variant, theirs, folder = saved
    ours = load(variant, folder, size, pos_embed="transformers")
    x = image(ours.img_size)
    tokens = theirs(x).last_hidden_state
    prefix = tokens.shape[1] - ours.grid[0] * ours.grid[1]
    assert (prefix, ours.source) == (5 if "reg" in variant else 1, "local")
    assert_same(ours(x), tokens[:, 0], tokens[:, prefix:])
    if size == 56 or "reg" in variant:  # where official resampling is transformers', or nothing is resampled
        assert torch.equal(ours.model.pos_embed, load(variant, folder, size).model.pos_embed)


def test_another_size_is_resampled_as_by_the_official_code(tmp_path):
    theirs = dinov2()
    theirs.save_pretrained(tmp_path / "theirs")
    torch.save(official_names(theirs.state_dict()), tmp_path / "official.pth")
    expected = load("vits14", tmp_path / "official.pth", (28, 70)).model.pos_embed
    assert torch.equal(load("vits14", tmp_path / "theirs", (28, 70)).model.pos_embed, expected)
    ours = load("vits14", tmp_path / "theirs", (28, 70), pos_embed="transformers").model.pos_embed
    assert not torch.allclose(ours, expected)


def same_weights(one: DINOv2Backbone, other: DINOv2Backbone) -> bool:
    a, b = one.model.state_dict(), other.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_form_of_a_saved_model_is_the_same_model(saved, tmp_path, monkeypatch):
    variant, theirs, folder = saved
    expected = load(variant, folder)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    assert len(list(index.parent.glob("model-*.safetensors"))) > 2
    (tmp_path / "old").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "old" / "pytorch_model.bin")  # under the names of transformers 5
    torch.save({f"dinov2.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "classifier.bin")
    (tmp_path / "blob").write_bytes((folder / "model.safetensors").read_bytes())  # as Hugging Face's cache names it
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (folder / "model.safetensors", index.parent, index, tmp_path / "old", "~/classifier.bin", "~/blob"):
        assert same_weights(load(variant, path), expected), path


@torch.no_grad()
def test_a_classifier_gives_its_backbone(tmp_path):
    theirs = randomised(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(num_labels=3, **SMALL)))
    theirs.save_pretrained(tmp_path)
    x = image((56, 56))
    tokens = theirs.dinov2(x).last_hidden_state
    assert_same(load("vits14", tmp_path)(x), tokens[:, 0], tokens[:, 1:])


@torch.no_grad()
def test_the_giants_gated_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))
    shape = {"hidden_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 24, "image_size": 28}
    theirs = dinov2(use_swiglu_ffn=True, **shape)
    x = image((28, 28))
    tokens = theirs(x).last_hidden_state
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "new.bin")
    for path in (tmp_path, tmp_path / "new.bin"):
        assert_same(load("vitg14", path, 28)(x), tokens[:, 0], tokens[:, 1:])


def test_dtype_is_that_of_the_files(saved, tmp_path):
    variant, theirs, _ = saved
    transformers.AutoModel.from_config(theirs.config).bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load(variant, tmp_path).parameters()} == {torch.bfloat16}


# --- mean and std -----------------------------------------------------------------------------------------------------


def test_mean_and_std_come_from_the_preprocessor_beside(saved, tmp_path):
    variant, theirs, folder = saved
    assert load(variant, folder).mean == (0.485, 0.456, 0.406)
    theirs.save_pretrained(tmp_path)
    statistics = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.25, 0.5, 1]}
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(statistics | {"do_resize": True}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        backbone = load(variant, path)
        assert (backbone.mean, backbone.std) == ((0.5, 0.25, 0.125), (0.25, 0.5, 1.0))
    file.write_text(json.dumps({"image_mean": [0.5, 0.25]}))
    with pytest.raises(ValueError, match=rf"image_mean in '{re.escape(str(file))}' must be 3 finite numbers"):
        load(variant, tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match=rf"'{re.escape(str(file))}' is no JSON"):
        load(variant, tmp_path)


# --- other files ------------------------------------------------------------------------------------------------------


def refusal(path: Path, variant: str = "vits14", error: type[Exception] = ValueError) -> str:
    with pytest.raises(error, match="^weights: ") as caught:
        load(variant, path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def small(kind: str, **options) -> nn.Module:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**(shape | {"image_size": 32, "patch_size": 16} | options))
    return getattr(transformers, f"{kind}Model")(config).eval()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ViT", "a plain ViT of transformers"),
        ("CLIPVision", "a CLIP of transformers"),
        ("SiglipVision", "model=SiglipVisionModel.from_pretrained"),
        ("DINOv3ViT", "model=DINOv3ViTModel.from_pretrained"),
    ],
)
def test_another_model_of_transformers_is_refused_by_what_it_is(kind, said, tmp_path):
    small(kind).save_pretrained(tmp_path)
    assert said in refusal(tmp_path)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["base_model.model.encoder.layer.0.attention.query.lora_A.weight"], "a LoRA adapter"),
        (["patch_embed.proj.weight", "rope_embed.periods"], "a DINOv3"),
        (["patch_embed.proj.weight", "blocks.0.gamma_1"], "a DINOv3, EVA or BEiT"),
        (["visual.class_embedding"], "a CLIP"),
        (["conv1.weight", "layer1.0.conv1.weight"], "a ResNet"),
        (["stages.0.blocks.0.norm.weight"], "a ConvNeXt"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a part of a diffusion model"),
        (["model.embed_tokens.weight"], "a language model"),
        (["a.weight", "b.weight"], "unknown; its first tensors: a.weight, b.weight"),
    ],
)
def test_another_model_is_known_by_its_tensors(keys, said, tmp_path):
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "other.pth")
    assert f"it is {said}" in refusal(tmp_path / "other.pth")


def test_no_mark_of_another_model_is_in_a_dinov2(saved):
    theirs = saved[1].state_dict()
    names = [*official_names(theirs), *theirs, *timm.create_model("vit_small_patch14_reg4_dinov2").state_dict()]
    assert len(names) > 60
    assert [name for name in names for pattern, _ in MARKS if re.search(pattern, name)] == []


def test_a_model_without_marks_is_what_its_configuration_says(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert f"it is a AutoencoderKL, by {tmp_path / 'config.json'}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("asked", "options", "said"),
    [
        ("vits14_reg", {}, "0 registers, as of vits14"),
        ("vits14", {"registers": 4}, "4 registers, as of vits14_reg"),
        ("vits14", {"hidden_size": 768, "num_attention_heads": 12}, "0 registers, as of vitb14"),
        ("vits14", {"registers": 2}, "2 registers, as of no variant"),
        ("vits14", {"patch_size": 16, "image_size": 64}, "[384, 3, 16, 16] and it has 0 registers, as of no variant"),
        ("vits14", {"num_attention_heads": 12}, "has num_attention_heads 12, and not 6"),
        ("vits14", {"num_hidden_layers": 1}, 'Missing key(s) in state_dict: "blocks.1.'),
    ],
)
def test_another_dinov2_is_refused_by_what_it_is(asked, options, said, tmp_path):
    dinov2(**options).save_pretrained(tmp_path)
    assert said in refusal(tmp_path, asked)


def test_what_a_file_lacks_is_named(tmp_path):
    for name, said in (("position_embeddings", "it lacks pos_embed"), ("cls_token", '"cls_token"')):
        state = dinov2().state_dict()
        del state[f"embeddings.{name}"]
        torch.save(state, tmp_path / "x.pth")
        assert said in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("page.pth", b"<!DOCTYPE html>", "a page of HTML"),
        ("tf_model.h5", b"\x89HDF\r\n", "TensorFlow's"),
        ("model", b"\x89HDF\r\n", "TensorFlow's"),
        ("flax_model.msgpack", b"\x82", "Flax's"),
        ("model.onnx", b"\x08\x07", "ONNX"),
        ("empty.pth", b"", "it is empty"),
        ("answer.pth", b"Not Found", "torch.save's; it begins with b'Not Found'"),
        ("damaged.pth", b"\x80\x02}q\x01", "it is damaged; what torch.save writes"),
        ("model.safetensors.index.json", b"{}", "an index without a weight_map"),
    ],
)
def test_another_format_is_refused_by_what_it_is(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)


@pytest.mark.parametrize("content", [nn.Linear(1, 1), {"args": argparse.Namespace(), "model": {}}])
def test_a_file_of_objects_is_refused_by_their_class(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    said = refusal(tmp_path / "x.pth")
    assert "it holds a torch.nn.modules.linear.Linear, and" in said or "it holds a argparse.Namespace, and" in said
    assert "weights_only" not in said


def test_a_file_of_one_tensor_is_no_model(tmp_path):
    torch.save(torch.zeros(2), tmp_path / "x.pt")
    assert "a Tensor in place of tensors by name" in refusal(tmp_path / "x.pt")


def test_what_is_missing_is_named(tmp_path):
    assert "needs one of model.safetensors, " in refusal(tmp_path, error=FileNotFoundError)
    (tmp_path / "tf_model.h5").touch()
    assert refusal(tmp_path, error=FileNotFoundError).endswith("it has tf_model.h5")
    assert "no file or folder" in refusal(tmp_path / "nothing", error=FileNotFoundError)
    dinov2().save_pretrained(tmp_path, max_shard_size="2MB")
    _, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    assert "one shard" in refusal(second)
    second.unlink()
    assert f"names {second.name}, which is missing" in refusal(tmp_path, error=FileNotFoundError)


def test_an_unknown_home_is_a_missing_file():
    with pytest.raises(FileNotFoundError, match="'~nobody_of_this_name/w.pth'"):
        load("vits14", "~nobody_of_this_name/w.pth")
