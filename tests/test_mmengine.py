"""mmengine builds our modules from configs, and its Runner trains, logs, checkpoints and resumes them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")
from mmengine.config import Config
from mmengine.registry import MODELS, Registry
from mmengine.runner import Runner

from fused_dino import (
    AtStep,
    BySimilarity,
    CosineLoss,
    DinoSupervision,
    MSELoss,
    Preprocess,
    Scaled,
    VICRegLoss,
    Weight,
)
from fused_dino.integrations import mmengine as integration

EXAMPLES = Path(__file__).parent.parent / "examples/mmengine"
TEACHER = {"type": "DINOv2Backbone", "variant": "vits14", "img_size": 28, "pretrained": False}
SUPERVISION = {"type": "DinoSupervision", "in_dim": 8, "hidden_dim": 4, "img_size": 28}


@pytest.fixture
def builder():
    """A registry of a trainer's own, as xtuner's BUILDER is."""
    registry = Registry("builder")
    integration.register(registry)
    return registry


@pytest.mark.parametrize("registry", ["models", "own"])
def test_nested_configs_build_in_the_registry_that_called(registry, builder):
    registry = MODELS if registry == "models" else builder
    loss, images = {"type": "VICRegLoss", "gamma": 2.0}, {"type": "Preprocess", "size": 28, "antialias": True}
    dino = registry.build({**SUPERVISION, "teacher": TEACHER, "loss_type": loss, "preprocess": images})
    assert type(dino) is DinoSupervision
    assert type(dino.loss) is VICRegLoss
    assert dino.loss.options["gamma"] == 2.0
    assert type(dino.preprocess) is Preprocess
    assert dino.teacher.variant == "vits14"


def test_a_module_of_ones_own_builds_in_ones_own_registry(builder):
    @builder.register_module()
    class OwnLoss(nn.Module):
        def forward(self, student, target):
            return (student - target).abs().mean()

    dino = builder.build({**SUPERVISION, "teacher": TEACHER, "loss_type": {"type": "OwnLoss"}})
    assert type(dino.loss) is OwnLoss
    with pytest.raises(KeyError, match="OwnLoss"):
        MODELS.build({**SUPERVISION, "teacher": TEACHER, "loss_type": {"type": "OwnLoss"}})


def test_teachers_by_name_layers_and_several_widths_build_from_a_config(builder):
    config = Config(
        {
            "type": "Supervision",
            "teacher": {"dino": {**TEACHER, "layers": [-1, 0]}, "other": TEACHER},
            "terms": {"token": {"type": "TokenTerm", "in_dim": [6, 4], "teacher": "dino", "layer": [-1, 0]}},
        }
    )
    module = builder.build(config._cfg_dict)
    assert list(module.teachers["dino"].teacher.layers.blocks) == [-1, 0]
    assert module.teachers["other"].teacher.layers is None
    assert module.terms["token"].in_dim == (6, 4)
    students = {"token": [torch.zeros(2, 4, 6), torch.zeros(2, 4, 4)]}
    assert module(torch.zeros(2, 3, 28, 28), students)[0].isfinite()


def test_a_supervision_builds_from_its_terms(builder):
    config = {
        "type": "Supervision",
        "teacher": {**TEACHER, "img_size": {"type": "Scaled", "ratio": 0.875}},
        "terms": {"token": {"type": "TokenTerm", "in_dim": 6, "loss": {"type": "MSELoss"}}},
        "schedule": {"type": "Schedule", "alpha": 0.5, "warmup_steps": 0},
    }
    dino = builder.build(config)
    out = dino.loss_dict(torch.zeros(2, 3, 32, 64), {"token": torch.randn(2, 8, 6)})
    assert out.keys() == {"loss_dino", "dino_token"}
    assert dino.img_size == Scaled(7 / 8)
    assert type(dino.terms["token"].loss) is MSELoss


def test_a_schedule_builds_from_its_parts(builder):
    weight = {"type": "Weight", "alpha": 0.5, "decay": "linear", "end_step": 9}
    stop = {"type": "BySimilarity", "threshold": 0.8, "mode": "recoverable"}
    schedule = builder.build({"type": "Schedule", "weight": weight, "stop": stop, "accumulate": 2})
    assert schedule.weight == Weight(0.5, decay="linear", end_step=9)
    assert schedule.stop == BySimilarity(0.8, mode="recoverable")
    assert builder.build({"type": "Schedule", "stop": {"type": "AtStep", "step": 3}}).stop == AtStep(3)


def test_configs_in_a_list_build(builder):
    projectors = [{"type": "Projector", "in_dim": width, "hidden_dim": 4, "out_dim": 5} for width in (6, 4)]
    term = builder.build({"type": "TokenTerm", "in_dim": [6, 4], "out_dim": 5, "projector": projectors})
    assert [projector[0].in_features for projector in term.projector] == [6, 4]


def test_types_that_are_no_names_build_what_is_nested(tmp_path):
    """A pure Python config of mmengine imports its types, lazily."""
    (tmp_path / "config.py").write_text(
        "from fused_dino.integrations.mmengine import CosineLoss, DINOv2Backbone, DinoSupervision\n"
        "dino = dict(type=DinoSupervision, in_dim=8, hidden_dim=4, img_size=28, loss_type=dict(type=CosineLoss),\n"
        "    teacher=dict(type=DINOv2Backbone, variant='vits14', img_size=28, pretrained=False, dtype='bfloat16'))\n"
    )
    dino = MODELS.build(Config.fromfile(tmp_path / "config.py").dino)
    assert type(dino) is DinoSupervision
    assert type(dino.loss) is CosineLoss
    assert next(dino.teacher.parameters()).dtype == torch.bfloat16
    with pytest.raises(ImportError):
        from fused_dino.integrations.mmengine import NoSuchModule  # noqa: F401


def test_modules_may_be_registered_again_and_never_in_anothers_place(builder):
    integration.register(builder)
    integration.register(MODELS)
    assert type(builder.build({"type": "MSELoss"})) is type(MODELS.build({"type": "MSELoss"})) is MSELoss
    foreign = Registry("foreign")
    foreign.register_module(name="MSELoss", module=nn.MSELoss)
    with pytest.raises(KeyError, match="MSELoss is already registered"):
        integration.register(foreign)


def test_dtypes_by_name(builder):
    teacher = builder.build({**TEACHER, "dtype": "bfloat16"})
    assert next(teacher.parameters()).dtype == torch.bfloat16
    preprocess = builder.build({"type": "Preprocess", "size": 28, "out_dtype": "torch.float16"})
    assert preprocess.options["out_dtype"] == torch.float16
    with pytest.raises(ValueError, match="dtype is 'bf16', which is no dtype"):
        builder.build({**TEACHER, "dtype": "bf16"})


def test_losses_build(builder):
    assert type(builder.build({"type": "CosineLoss", "reduction": "sum"})) is CosineLoss
    assert type(builder.build({"type": "MSELoss"})) is MSELoss


def train(path, folder, iterations, resume=False):
    """Return the Runner and what it logged of each iteration."""
    config = Config.fromfile(path)
    config.work_dir, config.resume = str(folder), resume
    config.train_cfg.max_iters = iterations
    config.experiment_name = f"{folder.name}-{iterations}-{resume}"
    runner = Runner.from_cfg(config)
    log = Path(runner.log_dir, "vis_data/scalars.json")  # named by the second, in which two runs may begin
    before = len(log.read_text().splitlines()) if log.exists() else 0
    runner.train()
    logged = log.read_text().splitlines()[before:]
    return runner, {line["step"]: line for line in map(json.loads, logged)}


@pytest.mark.parametrize("name", ["config.yaml", "config.py"])
def test_the_examples_train_and_resume_to_equal_losses(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runner, whole = train(EXAMPLES / name, tmp_path / "whole", 4)
    train(EXAMPLES / name, tmp_path / "parts", 2)
    resumed_runner, resumed = train(EXAMPLES / name, tmp_path / "parts", 4, resume=True)
    assert sorted(resumed) == [3, 4]
    for step, line in resumed.items():
        for key in ("loss", "loss_flow", "loss_dino", "dino_global"):
            assert line[key] == whole[step][key]
        assert line["loss"] == pytest.approx(line["loss_flow"] + line["loss_dino"])
    dino = resumed_runner.model.dino
    assert int(dino.schedule.step) == 4
    trained = {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in runner.model.parameters()}
    assert not trained & {id(p) for p in runner.model.dino.teacher.parameters()}


def test_a_checkpoint_may_name_nothing_but_a_historys_statistics():
    history = integration.HistoryBuffer
    assert integration.history_method(history, "mean") is history.mean
    for owner, name in ((torch, "load"), (history, "__init__"), (history.mean, "x")):
        with pytest.raises(ValueError, match="is no statistic of a history"):
            integration.history_method(owner, name)
