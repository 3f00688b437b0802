"""Features of chosen blocks, against the official get_intermediate_layers and what the blocks themselves give."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from conftest import TinyTeacher
from fused_dino import DINOv2Backbone, GlobalTerm, RegionTerm, Scaled, Schedule, Supervision, TokenTerm
from fused_dino.features import check_features
from proving import DEVICE
from test_any_size import image, official_vit, randomised
from test_terms import B, C, D, features, randn

timm = pytest.importorskip("timm")
DEPTH = 4
SMALL = {"embed_dim": 24, "depth": DEPTH, "num_heads": 2}
LAYERS = (-4, 1, -1, 2)  # the blocks 0, 1, 3 and 2


def official(**options):
    """The official model, whose registers are none, with a grid of 4 x 4."""
    return DINOv2Backbone(model=official_vit(**SMALL), **{"img_size": 56, "layers": LAYERS} | options).double()


def timms(name="vit_small_patch14_reg4_dinov2", grid=(4, 4), **options):
    patch = 16 if "16" in name else 14
    model = timm.create_model(name, img_size=(grid[0] * patch, grid[1] * patch), num_classes=0, **SMALL)
    size = (grid[0] * patch, grid[1] * patch)
    return DINOv2Backbone(model=randomised(model), **{"img_size": size, "layers": LAYERS} | options).double()


def huggings(kind, **options):
    transformers = pytest.importorskip("transformers")
    patch = 16 if kind in ("DINOv3ViT", "SiglipVision") else 14
    shape = {"hidden_size": 24, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "patch_size": patch}
    shape |= {"image_size": 4 * patch} | ({"intermediate_size": 48} if patch == 16 else {})
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape))
    options = {"img_size": 4 * patch, "layers": LAYERS} | options
    return DINOv2Backbone(model=randomised(model), **options).double()


MAKERS = {
    "official": official,
    "timm": timms,
    "timm, no class token": functools.partial(timms, "vit_base_patch16_siglip_224"),
    "timm, rotary": functools.partial(timms, "vit_small_patch16_dinov3"),
} | {kind: functools.partial(huggings, kind) for kind in ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "SiglipVision")}
each = pytest.mark.parametrize("name", MAKERS)


def blocks_of(model):
    """The blocks of any of these models, in order."""
    return next(part for part in model.modules() if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) == 4)


def norm_of(model):
    return next(getattr(model, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(model, name))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [0, 2])
def test_they_are_those_of_the_official_code(chunks):
    vits = pytest.importorskip("dinov2.models.vision_transformer")
    vit = vits.DinoVisionTransformer(img_size=56, patch_size=14, init_values=1.0, block_chunks=chunks, **SMALL)
    backbone = DINOv2Backbone(model=randomised(vit), img_size=56, layers=LAYERS).double()
    x = image(backbone, (4, 4), dtype=torch.float64)
    found = backbone(x)["layers"]
    assert list(found) == list(LAYERS)
    expected = vit.get_intermediate_layers(x, n=[0, 1, 3, 2], return_class_token=True)  # which sorts them
    for block, layer in enumerate((-4, 1, 2, -1)):
        assert_close(found[layer], dict(zip(("patch", "global"), expected[block], strict=True)), rtol=0, atol=1e-12)
    last = vit.forward_features(x)
    assert_close(backbone(x)["patch"], last["x_norm_patchtokens"], rtol=0, atol=1e-12)
    assert_close(backbone(x)["global"], last["x_norm_clstoken"], rtol=0, atol=1e-12)


@torch.no_grad()
def test_timms_model_of_the_same_weights_gives_the_same(tmp_path, monkeypatch):
    vit = official_vit(embed_dim=384, depth=3, num_heads=6)
    torch.save(vit.state_dict(), tmp_path / "dinov2.pth")
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=3))
    backbone = DINOv2Backbone("vits14", 56, weights=tmp_path / "dinov2.pth", layers=(0, -2)).double()
    x = image(backbone, (4, 4), dtype=torch.float64)
    for n, (patch, token) in zip(
        (0, -2), vit.double().get_intermediate_layers(x, n=[0, 1], return_class_token=True), strict=True
    ):
        assert_close(backbone(x)["layers"][n], {"global": token, "patch": patch}, rtol=0, atol=1e-11)


@each
@torch.no_grad()
def test_they_are_the_blocks_outputs_after_the_last_norm_from_one_forward(name):
    backbone = MAKERS[name](engine=False)
    x, outs = image(backbone, (4, 4), dtype=torch.float64), []
    plain = MAKERS[name](layers=None, engine=False)(x)
    for block in blocks_of(backbone.model):
        block.register_forward_hook(lambda module, args, out: outs.append(out))
    found = backbone(x)
    assert len(outs) == DEPTH
    assert list(found.pop("layers")) == list(LAYERS)
    assert found.keys() == plain.keys()
    assert_close(found, plain, rtol=0, atol=1e-12)
    outs.clear()
    layers = backbone(x)["layers"]
    for layer, block in zip(LAYERS, (0, 1, 3, 2), strict=True):
        tokens = norm_of(backbone.model)(outs[block])
        patch = tokens[:, backbone.prefix_tokens :]
        pooled = tokens[:, 0] if backbone.prefix_tokens else patch.mean(1)
        assert_close(layers[layer], {"global": pooled, "patch": patch}, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_last_block_alone_is_the_features():
    for name, make in MAKERS.items():
        found = make(layers=[-1])(image(make(), (4, 4), dtype=torch.float64))
        assert_close(found["layers"][-1]["patch"], found["patch"], rtol=0, atol=0)
        if "no class" not in name and name != "SiglipVision":  # whose global token is what a head pools
            assert_close(found["layers"][-1]["global"], found["global"], rtol=0, atol=0)


@torch.no_grad()
def test_registers_alone_are_no_class_token():
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, class_token=False,
                              global_pool="avg", **SMALL)  # fmt: skip
    backbone = DINOv2Backbone(model=randomised(model), img_size=56, layers=(0,)).double()
    layer = backbone(image(backbone, (4, 4), dtype=torch.float64))["layers"][0]
    assert layer["patch"].shape == (2, 16, 24)
    assert_close(layer["global"], layer["patch"].mean(1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["official", "timm", "Dinov2"])
def test_patches_and_sizes_by_a_rule_give_them_too(name):
    backbone = MAKERS[name]()
    x = image(backbone, (4, 4), dtype=torch.float64)
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    assert_close(backbone(patches)["layers"], backbone(x)["layers"], rtol=0, atol=1e-12)
    free = MAKERS[name](img_size=Scaled(7 / 8))
    x = image(free, (2, 3), dtype=torch.float64)
    found = free(x)
    fixed = DINOv2Backbone(model=copy.deepcopy(free.model), img_size=Scaled(1), layers=(-1, 0)).double()(x)
    assert found["layers"][1]["patch"].shape == (2, 6, 24)
    assert_close(found["layers"][-4], fixed["layers"][0], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["official", "timm", "Dinov2"])
def test_a_compiler_takes_them_whole(name, fresh_compiler):
    backbone = MAKERS[name]()
    x = image(backbone, (4, 4), dtype=torch.float64)
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    assert_close(compiled(x), backbone(x), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["official", "timm", "Dinov2"])
def test_copies_and_pickles_give_them(name):
    backbone = MAKERS[name]()
    x = image(backbone, (4, 4), dtype=torch.float64)
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert_close(twin(x)["layers"], backbone(x)["layers"], rtol=0, atol=0)


@torch.no_grad()
def test_a_model_of_transformers_keeps_nothing_and_serves_threads_and_other_backbones():
    backbone = MAKERS["Dinov2"]()
    other = DINOv2Backbone(model=backbone.model, img_size=56, layers=(2,))
    images = [image(backbone, (4, 4), dtype=torch.float64) * scale for scale in (1, 2, 3, 4)] * 4
    expected = [MAKERS["Dinov2"]()(x)["layers"] for x in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: (backbone(x)["layers"], other(x)["layers"]), images))
    for (several, one), known in zip(found, expected, strict=True):
        assert_close(several, known, rtol=0, atol=0)
        assert_close(one, {2: known[2]}, rtol=0, atol=0)
    assert backbone.layers.waiting == other.layers.waiting == {}
    with pytest.raises(ValueError, match="pixel"):
        backbone.run(torch.zeros(1, 5, 56, 56, dtype=torch.float64), None)
    assert backbone.layers.waiting == {}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((-5,), r"layers must be from -4 to 3, the model's blocks, got \(-5,\)"),
        ((0, 4), "layers must be from -4 to 3"),
        (4, "layers must be None or a sequence of ints"),
        ((), "layers must be None or a sequence of ints"),
        ((True,), "layers must be None or a sequence of ints"),
        ((0.5,), "layers must be None or a sequence of ints"),
        ("-1", "layers must be None or a sequence of ints"),
    ],
)
def test_layers_that_are_none_are_named(layers, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        official(layers=layers)


def test_models_without_blocks_to_ask_are_refused_by_name():
    class Bare(nn.Module):
        embed_dim, patch_size = 24, 14

    for model in (Bare(), "mobilenetv3_small_050", nn.Sequential(MAKERS["Dinov2"]().model)):
        with pytest.raises(ValueError, match=r"^layers must be left out: model (Bare|MobileNetV3|Sequential) gives no"):
            DINOv2Backbone(model=model, img_size=224, pretrained=False, layers=(-1,))


# --- terms that read them ---------------------------------------------------------------------------------------------

TERMS = {
    "global": lambda **options: GlobalTerm(C, hidden_dim=7, out_dim=D, **options),
    "region": lambda **options: RegionTerm((2, 4, 4), hidden_dim=7, out_dim=D, **options),
    "token": lambda **options: TokenTerm(C, out_dim=D, **options),
}
STUDENTS = {"global": (C,), "region": (32,), "token": (16, C)}
each_term = pytest.mark.parametrize("name", TERMS)


def term_of(name, **options):
    torch.manual_seed(3)
    return TERMS[name](**options).to(DEVICE, torch.float64)


def layered(*layers):
    """Features in which each layer differs from the last one."""
    several = {n: {"global": randn(B, D, seed=90 + n), "patch": randn(B, 16, D, seed=70 + n)} for n in layers}
    return {**features(), "layers": several}


@each_term
def test_a_layer_is_a_target_in_place_of_the_last_features(name):
    found, student = layered(-4, -1, 2), randn(B, *STUDENTS[name])
    for n in (-4, 2):
        term = term_of(name, layer=n)
        assert term.needs == {"layers"}
        expected = term_of(name)(student, {**features(), **found["layers"][n]})
        assert_close(term(student, found), expected, rtol=0, atol=0)


@each_term
def test_several_layers_are_summed(name):
    found, student = layered(-4, -1, 2), randn(B, *STUDENTS[name])
    total = {key: sum(found["layers"][n][key] for n in (2, -1, -4)) for key in ("global", "patch")}
    expected = term_of(name)(student, {**features(), **total})
    assert_close(term_of(name, layer=(2, -1, -4))(student, found), expected, rtol=1e-13, atol=1e-14)
    half = {n: {key: x.to(torch.bfloat16) for key, x in layer.items()} for n, layer in found["layers"].items()}
    total = {key: sum(half[n][key].float() for n in (2, -1, -4)) for key in ("global", "patch")}
    expected = term_of(name)(student, {**features(), **total})
    assert_close(term_of(name, layer=(2, -1, -4))(student, {**features(), "layers": half}), expected, rtol=0, atol=0)


def test_the_sum_of_layers_is_that_of_the_formula():
    term, found, student = term_of("token", layer=[-1, 2]), layered(-1, 2), randn(B, 16, C)
    target = found["layers"][-1]["patch"] + found["layers"][2]["patch"]
    expected = 1 - F.cosine_similarity(term.projector(student), target, dim=-1).mean()
    assert_close(term(student, found)[0], expected, rtol=1e-12, atol=1e-14)


@each_term
def test_layers_without_patches_stand_in_their_global_token(name):
    found, student = layered(-4, 2), randn(B, *STUDENTS[name])
    found["layers"][2]["patch"] = None
    loss, logs = term_of(name, layer=(-4, 2))(student, found)
    total = sum(layer["global"] for layer in found["layers"].values())
    expected, known = term_of(name)(student, {**features(), "patch": None, "global": total})
    assert_close(loss, expected, rtol=1e-13, atol=1e-14)
    assert logs.keys() == known.keys()


@each_term
def test_features_that_lack_a_layer_are_refused_by_name(name):
    student = randn(B, *STUDENTS[name])
    with pytest.raises(ValueError, match=r"^layer -3, 5 is not among the features, which have \[-4\]: build"):
        term_of(name, layer=(5, -3, -4))(student, layered(-4))
    with pytest.raises(ValueError, match=r"^layer 5 is not among the features, which have none"):
        term_of(name, layer=5)(student, features())
    for layer in (True, 0.5, (), "1", (1, None)):
        with pytest.raises(ValueError, match=r"^layer must be None, an int or a sequence of ints"):
            term_of(name, layer=layer)


# --- supervisions -----------------------------------------------------------------------------------------------------


def supervised(teacher, **options):
    torch.manual_seed(2)
    terms = {"last": GlobalTerm(8), "one": TokenTerm(C, layer=1), "sum": TokenTerm(C, layer=(-1, -4), weight=0.5)}
    return Supervision(teacher, terms, Schedule(0.5, 0), **options).double()


def batch_of(seed=4):
    images = randn(2, 3, 64, 64, seed=seed).tanh()
    return images, {"last": randn(2, 8), "one": randn(2, 16, C), "sum": randn(2, 16, C, seed=6)}


def test_a_supervision_hands_layers_to_its_terms():
    module, (images, students) = supervised(official()).to(DEVICE), batch_of()
    found = module.encode(images)
    assert {n: layer["patch"].shape for n, layer in found["layers"].items()} == dict.fromkeys(LAYERS, (2, 16, 24))
    _, logs = module(images, students)
    for name, term in module.terms.items():
        assert_close(logs[f"dino_{name}"], term(students[name], found)[0].detach())
    assert_close(logs, module(features=found, students=students)[1], rtol=0, atol=0)


def test_cached_features_may_lie_in_a_file_and_on_another_dtype(tmp_path):
    module, (images, students) = supervised(official()).to(DEVICE), batch_of()
    torch.save(module.encode(images), tmp_path / "features.pt")
    cached = torch.load(tmp_path / "features.pt")
    assert_close(module(features=cached, students=students), module(images, students), rtol=0, atol=0)


def test_layers_are_detached_unless_the_gradient_shall_pass():
    images, students = batch_of()
    found = supervised(official()).to(DEVICE).encode(images)
    assert not any(x.requires_grad for layer in found["layers"].values() for x in layer.values())
    for stop in (True, False):
        module = supervised(official(), stopgrad_image=stop).to(DEVICE)
        found = module.encode(images)
        leaf = found["layers"][1]["patch"].requires_grad_()
        loss = module(features=found, students=students)[0]
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        assert (grad is None) == stop
    pixels = images.clone().requires_grad_()
    loss = module.terms["one"](students["one"], module._features(pixels, None, pixels.device, frozenset({"layers"})))[0]
    assert torch.autograd.grad(loss, pixels)[0].abs().sum() > 0


def test_a_supervision_of_a_size_by_a_rule_takes_layers():
    module = supervised(timms(img_size=Scaled(7 / 8))).to(DEVICE)
    images, students = randn(2, 3, 32, 128, seed=4).tanh(), batch_of()[1]
    loss, _ = module(images, students)
    assert module.encode(images)["layers"][1]["patch"].shape == (2, 16, 24)
    assert loss.isfinite()


def test_a_compiled_supervision_takes_layers(fresh_compiler):
    module, (images, students) = supervised(official()).to(DEVICE), batch_of()
    compiled = torch.compile(module.loss_dict, fullgraph=True, backend="eager")
    assert_close(compiled(images, students, step=1), module.loss_dict(images, students, step=1), rtol=1e-9, atol=1e-11)


def test_a_teacher_by_name_gets_the_layers_of_the_terms(monkeypatch):
    vit = timm.create_model("vit_tiny_patch16_224", depth=4)
    monkeypatch.setattr("fused_dino.teacher.backbone.create_timm", lambda *_: vit)
    module = Supervision("vit_tiny_patch16_224", {"a": TokenTerm(C, layer=(-4, 1)), "b": TokenTerm(C, layer=1)})
    assert list(module.teacher.layers.blocks) == [-4, 1]
    assert module.teacher.layers.blocks == {-4: 0, 1: 1}


def test_a_teacher_without_the_layers_of_a_term_is_refused_when_built():
    with pytest.raises(ValueError, match=r"^teacher gives no layer 1, which a term reads: build it with layers=\[1\]"):
        supervised(official(layers=(-1, -4)))
    with pytest.raises(ValueError, match=r"^teacher gives no layer -4.*layers=\[-4, -1, 1\]"):
        supervised(official(layers=None))


class Own(TinyTeacher):
    """A user's teacher, which returns layers."""

    def forward(self, x):
        found = super().forward(x)
        return {**found, "layers": {1: {"global": 2 * found["global"], "patch": found["patch"] ** 2}}}


def test_any_teacher_may_give_layers(batch):
    module = Supervision(Own(), {"token": TokenTerm(C, layer=1)}, img_size=56)
    found = module.encode(batch[1])
    assert_close(found["layers"][1]["patch"], found["patch"] ** 2)
    tokens = torch.randn(6, 16, C)
    expected = module.terms["token"](tokens, {**found, "layers": {1: {**found["layers"][1]}}})[0]
    assert_close(module(batch[1], {"token": tokens})[0], expected)
    plain = Supervision(TinyTeacher(), {"token": TokenTerm(C, layer=1)}, img_size=56)
    with pytest.raises(ValueError, match=r"^layer 1 is not among the features, which have none"):
        plain(batch[1], {"token": tokens})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([1], "the layers of features must be a dict of features by int, got list"),
        ({1: torch.zeros(B, D)}, r"layer 1 of features must be \{'global': \[B, 6\]"),
        ({1: {"global": torch.zeros(B, 5)}}, r"layer 1 of features must be .* got shapes \[\[5, 5\]\]"),
        ({1: {"global": torch.zeros(2, D)}}, "layer 1 of features must be .* with B = 5"),
        ({1: {"global": torch.zeros(B, D), "patch": torch.zeros(B, 9, D)}},
         "layer 1 of features has 9 patch tokens on a grid of 4 x 4"),
        ({1: {"global": torch.zeros(B, D), "patch": torch.zeros(B, 16, D).int()}}, "layer 1 of features .* of floats"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit_are_named(layers, message):
    check_features("features", layered(1), D)
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        check_features("features", {**features(), "layers": layers}, D)


def test_a_layer_of_another_count_than_its_grid_is_named():
    module = Supervision(Own(), {"token": TokenTerm(C, layer=1)}, img_size=56)
    found = {
        "global": torch.zeros(2, 24),
        "layers": {1: {"global": torch.zeros(2, 24), "patch": torch.zeros(2, 9, 24)}},
    }
    with pytest.raises(ValueError, match=r"^the features have 9 patch tokens where img_size=\(56, 56\) has 4 x 4"):
        module(features=found, students={"token": torch.zeros(2, 16, C)})
