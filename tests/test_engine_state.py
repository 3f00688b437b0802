"""The engine's weights follow the published ones: loaded, cast, moved, copied, shared and built on the meta device."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from conftest import make_supervision
from fused_dino import DINOv2Backbone
from test_engine import MODELS, image, of_timm, official, pair

SIZE = (28, 42)


def tiny(seed: int = 0, **options) -> DINOv2Backbone:
    model = of_timm("vit_small_patch14_reg4_dinov2")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + seed / 4)
    return DINOv2Backbone(model=model, img_size=SIZE, **options)


def state_of(backbone: DINOv2Backbone) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in backbone.model.state_dict().items()}


def says(backbone: DINOv2Backbone, **options) -> Tensor:
    with torch.no_grad():
        return backbone(image(SIZE, **options))["patch"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        x.dtype == y.dtype and torch.equal(x, y) for (x, y) in zip(one.values(), other.values(), strict=True)
    )


# --- where the weights are --------------------------------------------------------------------------------------------


def test_published_weights_are_no_part_of_the_module():
    """A wrapper such as DistributedDataParallel refuses parameters on two kinds of devices, and sends all buffers."""
    ours = tiny()
    published = {p.data_ptr() for p in ours.model.parameters()}
    assert not published & {p.data_ptr() for p in ours.parameters()}
    assert list(ours.buffers()) == []
    assert {name.partition(".")[0] for name, _ in ours.named_parameters()} == {"engine"}
    assert not any(p.requires_grad for p in (*ours.parameters(), *ours.model.parameters()))
    moved = tiny().to("meta")
    assert {p.device.type for p in moved.parameters()} == {"meta"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIP", "official without biases", "DINOv3 with SwiGLU"])
def test_no_folded_weight_is_the_published_memory(name):
    """A product without LayerScale has the published values. Its memory must be its own, or a write in place would
    change it."""
    ours = pair(MODELS[name]())[1]
    expected = ours(image(ours.img_size))
    for p in ours.model.parameters():
        p.mul_(2)
    assert_close(ours(image(ours.img_size)), expected, rtol=0, atol=0)


def test_without_it_the_model_is_a_submodule_as_before():
    published = tiny(engine=False, dtype=torch.bfloat16)
    assert published._modules.keys() == {"model"}
    assert {p.dtype for p in published.model.parameters()} == {torch.bfloat16}
    assert torch.equal(says(published), published.model.forward_features(image(SIZE).bfloat16())[:, 5:])
    published.refold()
    assert published.engine is None


@pytest.mark.parametrize(
    "change",
    [
        lambda backbone: None,
        lambda backbone: backbone.to(torch.bfloat16),
        lambda backbone: backbone.half().float().bfloat16(),
        lambda backbone: backbone.requires_grad_(True).train(),
        lambda backbone: backbone.refold(),
        lambda backbone: backbone(image(SIZE)),
        lambda backbone: backbone.check(image(SIZE)),
    ],
)
def test_the_state_is_the_published_weights_bit_for_bit(change):
    published = of_timm("vit_small_patch14_reg4_dinov2").state_dict()
    ours = tiny()
    change(ours)
    assert same(ours.model.state_dict(), published)
    assert len(ours.state_dict()) == 0
    assert same(tiny(dtype=torch.bfloat16).model.state_dict(), published)


def test_a_wider_dtype_widens_what_is_published():
    """Values that are loaded then lose no bits."""
    ours = tiny().double()
    assert {p.dtype for p in ours.model.parameters()} == {torch.float64}
    assert same(ours.model.state_dict(), {k: x.double() for k, x in tiny().model.state_dict().items()})
    assert {p.dtype for p in tiny(dtype=torch.float64).model.parameters()} == {torch.float64}


# --- loading ----------------------------------------------------------------------------------------------------------


def into_the_model(backbone, state, assign):
    assert backbone.model.load_state_dict(state, assign=assign) == ([], [])


def into_the_backbone(backbone, state, assign):
    given = {f"model.{name}": x for name, x in state.items()}
    assert backbone.load_state_dict(given, assign=assign) == ([], [])


def into_a_parent(backbone, state, assign):
    parent = nn.ModuleDict({"head": nn.Linear(2, 2), "teacher": backbone})
    given = parent.state_dict() | {f"teacher.model.{name}": x for name, x in state.items()}
    assert parent.load_state_dict(given, assign=assign) == ([], [])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("load", [into_the_model, into_the_backbone, into_a_parent])
def test_loading_folds_anew(load, assign):
    other = tiny(1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        ours = tiny().to(dtype)
        before = [p.data_ptr() for p in ours.parameters()]
        load(ours, state_of(other), assign)
        assert torch.equal(says(ours), says(copy.deepcopy(other).to(dtype)))
        assert [p.data_ptr() for p in ours.parameters()] == before, "a captured graph reads the new weights"
        assert not any(p.requires_grad for p in ours.parameters())


def test_a_checkpoint_that_does_not_fit_is_refused():
    ours, state = tiny(), state_of(tiny(1))
    fewer = {f"model.{name}": x for name, x in state.items() if name != "blocks.1.ls2.gamma"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "model\.blocks\.1\.ls2\.gamma"'):
        ours.load_state_dict(fewer)
    more = {f"model.{name}": x for name, x in state.items()} | {"model.other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "model\.other"'):
        ours.load_state_dict(more)
    wrong = {f"model.{name}": x for name, x in state.items()} | {"model.cls_token": torch.zeros(1, 1, 3)}
    with pytest.raises(RuntimeError, match="size mismatch for cls_token"):
        ours.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({"other.weight": torch.zeros(1)})


def test_a_checkpoint_without_the_teacher_leaves_it():
    ours, expected = tiny(), says(tiny())
    parent = nn.ModuleDict({"head": nn.Linear(2, 2), "teacher": ours})
    for assign in (False, True):
        assert parent.load_state_dict(parent.state_dict(), assign=assign) == ([], [])
        assert torch.equal(says(ours), expected)


@torch.no_grad()
def test_who_writes_in_place_refolds():
    ours, other = tiny(), tiny(1)
    for p, q in zip(ours.model.parameters(), other.model.parameters(), strict=True):
        p.copy_(q)
    assert torch.equal(says(ours), says(tiny())), "nothing of it is applied before"
    ours.refold()
    assert torch.equal(says(ours), says(other))
    ours.model.blocks[1].attn.load_state_dict(tiny().model.blocks[1].attn.state_dict())
    ours.refold()
    assert not torch.equal(says(ours), says(other))


def test_a_model_that_was_changed_is_not_folded():
    ours = tiny()
    ours.model.blocks[1].mlp.act = nn.PReLU()
    with pytest.raises(ValueError, match=r"engine=False: block 1: mlp.act is a PReLU"):
        ours.refold()
    ours.model = of_timm("vit_small_patch14_reg4_dinov2")
    assert ours.engine is None
    assert "replaced after construction" in ours.explain()
    assert torch.equal(says(ours), ours.model.forward_features(image(SIZE))[:, 5:])


# --- dtypes and devices -----------------------------------------------------------------------------------------------


def test_casting_rounds_the_published_weights_once():
    there = says(tiny().to(torch.bfloat16))
    for way in (
        tiny(dtype=torch.bfloat16),
        tiny().half().to(torch.bfloat16),
        tiny().bfloat16().float().bfloat16(),
    ):
        assert torch.equal(says(way), there)
    assert torch.equal(says(tiny().bfloat16().float()), says(tiny()))
    published = pair(of_timm("vit_small_patch14_reg4_dinov2"))[0].double()
    assert_close(
        says(tiny().bfloat16().double(), dtype=torch.float64), says(published, dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_rotations_survive_a_cast():
    model = of_timm("vit_small_patch16_dinov3")
    ours = DINOv2Backbone(model=model, img_size=(32, 48))
    x = image((32, 48))
    with torch.no_grad():
        expected = ours(x)
        assert_close(ours.bfloat16().float()(x), expected, rtol=0, atol=0)


def on_meta() -> DINOv2Backbone:
    with torch.device("meta"):
        return DINOv2Backbone(model=of_timm("vit_small_patch14_reg4_dinov2"), img_size=SIZE)


@pytest.mark.parametrize("supervised", [False, True])
def test_built_on_meta_and_loaded(supervised):
    ours, other = on_meta(), tiny(1)
    assert {p.device.type for p in (*ours.parameters(), *ours.model.parameters())} == {"meta"}
    holder = make_supervision(ours, img_size=SIZE) if supervised else ours
    holder.to_empty(device="cpu")
    if supervised:
        with pytest.raises(RuntimeError, match="the teacher has no weights"):
            holder.encode(image(SIZE))
        with pytest.raises(RuntimeError, match=r"Missing key.*model\.cls_token"):
            ours.load_state_dict({})
        with pytest.raises(RuntimeError, match="the teacher has no weights"):
            holder.encode(image(SIZE))
    ours.load_state_dict({f"model.{name}": x for name, x in state_of(other).items()})
    assert torch.equal(says(ours), says(other))
    if supervised:
        assert holder.encode(image(SIZE))["patch"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_on_meta_and_assigned(dtype):
    ours, other = on_meta(), tiny(1).to(dtype)
    state = {name: x.to(dtype) for name, x in state_of(other).items()}
    ours.model.load_state_dict(state, assign=True)
    expected = tiny()
    expected.model.load_state_dict(state, assign=True)
    assert torch.equal(says(ours), says(expected.to(dtype)))
    assert {p.device.type for p in ours.parameters()} == {"cpu"}


def test_moved_to_meta_and_back_it_needs_its_weights():
    ours = tiny().to("meta")
    assert {p.device.type for p in ours.model.parameters()} == {"meta"}
    ours.to_empty(device="cpu").model.load_state_dict(state_of(tiny(1)))
    assert torch.equal(says(ours), says(tiny(1)))


# --- copies -----------------------------------------------------------------------------------------------------------


def memory(*backbones) -> dict[int, int]:
    tensors = (x for b in backbones for part in (b.engine, b.model) for x in (*part.parameters(), *part.buffers()))
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_have_weights_of_their_own(twin_of):
    for ours in (tiny(), DINOv2Backbone(model=official(), img_size=SIZE)):
        expected, twin = says(ours), twin_of(ours)
        assert torch.equal(says(twin), expected)
        assert not memory(ours).keys() & memory(twin).keys()
        twin.model.load_state_dict({name: 2 * x for name, x in twin.model.state_dict().items()})
        assert torch.equal(says(ours), expected)
        assert not torch.equal(says(twin), expected)


def test_a_copied_supervision_shares_both_kinds_of_weights():
    dino = make_supervision(tiny(), img_size=SIZE)
    alone, twin = memory(dino.teacher), copy.deepcopy(dino)
    assert memory(dino.teacher, twin.teacher) == alone


CHANGES = {
    "loaded": lambda teacher: teacher.model.load_state_dict(state_of(tiny(1))),
    "loaded from its parent": lambda teacher: into_the_backbone(teacher, state_of(tiny(1)), False),
    "assigned": lambda teacher: teacher.model.load_state_dict(state_of(tiny(1)), assign=True),
    "cast": lambda teacher: teacher.bfloat16(),
    "widened": lambda teacher: teacher.double(),
    "refolded": lambda teacher: teacher.refold(),
}


@pytest.mark.parametrize("first", [True, False], ids=["the copy changes", "the original changes"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_leaves_the_other(change, first):
    dino = make_supervision(tiny(), img_size=SIZE)
    twin = copy.deepcopy(dino)
    changed, left = (twin, dino) if first else (dino, twin)
    CHANGES[change](changed.teacher)
    assert torch.equal(says(left.teacher), says(tiny()))
    assert same(left.teacher.model.state_dict(), tiny().model.state_dict())
    if "load" in change or change == "assigned":
        assert torch.equal(says(changed.teacher), says(tiny(1)))
