"""What state_dict() leaves out survives the ways in which trainers build and load models, and copies share it."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from conftest import TinyTeacher, make_supervision
from fused_dino import CosineLoss, DINOv2Backbone, Schedule, VICRegLoss, Weight
from test_distributed import spawn

OPTIONS = {"use_patch": True, "latent_shape": (4, 4, 4), "token_dim": 8, "token_grid": (6, 6), "warmup_steps": 0}
TOKENS = torch.ones(6, 36, 8)


class Model(nn.Module):
    """A user's model with a supervision inside."""

    def __init__(self, teacher, **options):
        super().__init__()
        self.dino = make_supervision(teacher, **(OPTIONS | options))


def real_teacher():
    torch.manual_seed(0)
    return TinyTeacher()


def losses(model, batch):
    return model.dino.loss_dict(*batch, tokens=TOKENS)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """to_empty fills floats with NaN and integers with their largest value."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_meta(**options):
    with torch.device("meta"):
        return Model(**options)


def to_empty(model, state):
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=True)


def assign(model, state):
    model.load_state_dict(state, strict=True, assign=True)


def dispatch(model, state, folder):
    accelerate = pytest.importorskip("accelerate")
    torch.save(state, folder / "pytorch_model.bin")
    accelerate.load_checkpoint_and_dispatch(model, str(folder / "pytorch_model.bin"), device_map={"": "cpu"})


@pytest.mark.parametrize("how", ["to_empty", "assign", "dispatch"])
def test_a_model_built_on_meta_has_the_saved_losses(how, batch, tmp_path):
    saved = Model(real_teacher())
    model = on_meta(teacher=real_teacher())
    ways = {"to_empty": to_empty, "assign": assign, "dispatch": partial(dispatch, folder=tmp_path)}
    ways[how](model, saved.state_dict())
    assert_close(losses(model, batch), losses(saved, batch))


def test_accelerates_empty_model_refuses_a_teacher_without_weights(batch, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    saved = Model(real_teacher())
    with accelerate.init_empty_weights():
        empty, whole = Model(TinyTeacher()), Model(saved.dino.teacher)
    for model in (empty, whole):
        dispatch(model, saved.state_dict(), tmp_path)
    assert_close(losses(whole, batch), losses(saved, batch))
    with pytest.raises(RuntimeError, match="the teacher has no weights"):
        losses(empty, batch)


def test_a_teacher_built_on_meta_has_no_weights_until_it_is_loaded(batch):
    saved = Model(real_teacher())
    with torch.device("meta"):
        model = Model(TinyTeacher())
    with pytest.raises(RuntimeError, match="the teacher has no weights"):
        model.dino.encode(batch[1])
    to_empty(model, saved.state_dict())
    with pytest.raises(RuntimeError, match="the teacher has no weights"):
        losses(model, batch)
    model.dino.teacher.load_state_dict(saved.dino.teacher.state_dict())
    model.dino.schedule.step.zero_()
    assert_close(losses(model, batch), losses(saved, batch))


def test_a_backbone_is_loaded_by_its_models_weights_and_by_no_empty_checkpoint():
    """A DINOv2Backbone's own state_dict() is empty, and must not pass for its weights."""
    real = DINOv2Backbone("vits14", 28, pretrained=False)
    with torch.device("meta"):
        dino = make_supervision(DINOv2Backbone("vits14", 28, pretrained=False), img_size=28)
    dino.to_empty(device="cpu")
    images = torch.zeros(1, 3, 28, 28)
    with pytest.raises(RuntimeError, match="Missing key"):
        dino.teacher.load_state_dict(real.state_dict())
    with pytest.raises(RuntimeError, match="the teacher has no weights"):
        dino.encode(images)
    dino.teacher.model.load_state_dict(real.model.state_dict())
    assert_close(dino.encode(images)["global"], real(dino.preprocess(images))["global"])


def test_a_named_teacher_is_built_with_its_weights(monkeypatch):
    with torch.device("meta"):
        model = make_supervision("vits14", pretrained=False)
    assert not any(x.is_meta for x in model.teacher.parameters())
    assert all(x.is_meta for x in model.parameters())


def test_transformers_loads_a_model_that_holds_a_supervision(batch, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Pretrained(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.dino = make_supervision(given, **OPTIONS)
            self.dino.schedule = Schedule(weight=Weight(0.5, 4), accumulate=2)
            self.post_init()

    given = real_teacher()
    saved = Pretrained(transformers.PretrainedConfig())
    saved.save_pretrained(tmp_path)
    given = real_teacher()
    loaded = Pretrained.from_pretrained(tmp_path).train()
    assert_close(losses(loaded, batch), losses(saved, batch))


def sharded_from_meta(rank, world):
    batch = torch.ones(6, 64), torch.ones(6, 3, 56, 56)
    saved, model = Model(real_teacher()), on_meta(teacher=real_teacher())
    fully_shard(model.dino)
    model.to_empty(device="cpu")
    set_model_state_dict(model, saved.state_dict(), options=StateDictOptions(full_state_dict=True))
    assert_close(losses(model, batch), losses(saved, batch))
    dist.barrier()


def test_fsdp_builds_on_meta(tmp_path):
    spawn(sharded_from_meta, 1, tmp_path)


def test_tensor_options_of_losses_survive_fresh_memory():
    student, target = torch.randn(6, 4), torch.randn(6, 4)
    for loss in (VICRegLoss(inv_weight=torch.tensor(3.0)), CosineLoss(scale=torch.tensor(0.5))):
        expected = loss(student, target)
        assert_close(loss.to_empty(device="cpu")(student, target), expected)
        assert_close(loss.half()(student, target), expected)
        assert_close(copy.deepcopy(loss)(student, target), expected)
        assert not loss.state_dict()


def test_a_tensor_option_without_a_value_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="^inv_weight is on the meta device"):
        VICRegLoss(inv_weight=torch.tensor(3.0))


def storages(*modules):
    tensors = (x for module in modules for x in (*module.teacher.parameters(), *module.teacher.buffers()))
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def size(*modules):
    return sum(storages(*modules).values())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda dino: AveragedModel(nn.Sequential(dino)).module[0],
        lambda dino: ModelEmaV3(dino).module,
        lambda dino: copy.deepcopy(copy.deepcopy(dino)),
        lambda dino: copy.deepcopy(dino).to("cpu", torch.float32),
    ],
)
def test_a_copy_holds_no_second_teacher(teacher, batch, copied):
    dino = make_supervision(teacher)
    alone = size(dino)
    twin = copied(dino)
    assert size(dino, twin) == alone
    assert_close(twin(*batch), dino(*batch))


CHANGES = {
    "cast": lambda dino: dino.double(),
    "the teacher cast": lambda dino: dino.teacher.double(),
    "the teacher loaded": lambda dino: dino.teacher.load_state_dict(other_weights(dino)),
    "a part of the teacher loaded": lambda dino: dino.teacher.embed.load_state_dict(
        {name: 2 * x for name, x in dino.teacher.embed.state_dict().items()}
    ),
    "made trainable": lambda dino: dino.teacher.requires_grad_(True).train(),
    "replaced": lambda dino: setattr(dino, "teacher", TinyTeacher()),
}


def other_weights(dino):
    return {name: 2 * x for name, x in dino.teacher.state_dict().items()}


@pytest.mark.parametrize("first", [True, False], ids=["the copy changes", "the original changes"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_leaves_the_other(teacher, batch, change, first):
    dino = make_supervision(teacher)
    twin = copy.deepcopy(dino)
    changed, left = (twin, dino) if first else (dino, twin)
    expected = left.encode(batch[1])
    CHANGES[change](changed)
    assert_close(left.encode(batch[1]), expected)
    assert not any(p.requires_grad for p in left.teacher.parameters())
    if change != "made trainable":
        assert not storages(dino).keys() & storages(twin).keys() or change == "a part of the teacher loaded"


def test_a_pickle_has_a_teacher_of_its_own(teacher, batch):
    dino = make_supervision(teacher)
    loaded = pickle.loads(pickle.dumps(copy.deepcopy(dino)))
    assert not storages(dino).keys() & storages(loaded).keys()
    assert_close(loaded(*batch), dino(*batch))
