"""The frozen teacher is invisible to the trainer and yet goes wherever the module goes."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from conftest import TinyTeacher, grads
from fused_dino import DinoSupervision


class Model(nn.Module):
    """A user's model, which returns its own loss and ours."""

    def __init__(self, teacher, **options):
        super().__init__()
        self.text = nn.Linear(10, 64)
        self.dino = DinoSupervision(64, teacher=teacher, hidden_dim=32, img_size=56, warmup_steps=10, **options)

    def forward(self, text, x):
        z = self.text(text)
        return {"loss_flow": z.square().mean(), **self.dino.loss_dict(z, x)}


@pytest.fixture
def text():
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(4))


def owned(module):
    """Addresses of the teacher's tensors."""
    return {x.data_ptr() for x in (*module.teacher.parameters(), *module.teacher.buffers())}


def test_no_list_of_the_trainer_holds_the_teacher(teacher):
    model = Model(teacher)
    hidden = owned(model.dino)
    assert hidden
    assert not hidden & {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert all(m is not teacher for m in model.modules())
    assert not any("teacher" in name or "embed.weight" in name for name in model.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    assert not hidden & {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}


def test_frozen_and_in_eval_mode_whatever_it_was(teacher, batch):
    teacher.train().requires_grad_(True)
    model = Model(teacher)
    model.train()
    model.requires_grad_(True)
    model.apply(lambda m: m.train())
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    first, second = (model.dino.encode(batch[1])["global"] for _ in range(2))
    assert torch.equal(first, second), "its dropout is off"
    model.dino.teacher = TinyTeacher().train()
    assert "teacher" not in model.dino._modules
    assert not model.dino.teacher.training


def test_moves_and_casts_carry_the_teacher(teacher):
    model = Model(teacher)
    assert next(model.double().dino.teacher.parameters()).dtype == torch.float64
    assert next(model.to("meta").dino.teacher.parameters()).device.type == "meta"


@pytest.mark.parametrize(
    "duplicate",
    [lambda m: copy.deepcopy(m).double().float(), lambda m: pickle.loads(pickle.dumps(m)), lambda m: reload(m)],
    ids=["deepcopy and a cast", "pickle", "torch.save"],
)
def test_copies_have_their_own_teacher(teacher, batch, text, duplicate):
    model = Model(teacher)
    twin = duplicate(model)
    assert not owned(twin.dino) & owned(model.dino)
    assert twin.dino.teacher is not teacher
    a, b = model(text, batch[1]), twin(text, batch[1])
    assert a.keys() == b.keys()
    assert_close(list(a.values()), list(b.values()), rtol=0, atol=0)


def reload(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_an_average_of_the_weights_leaves_it_out(teacher, batch, text):
    model = Model(teacher)
    average = AveragedModel(model)
    before = model.dino.projector[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        sum(v for k, v in model(text, batch[1]).items() if "loss" in k).backward()
        optimizer.step()
        average.update_parameters(model)
    mine, averaged = (dict(m.dino.teacher.named_parameters()) for m in (model, average.module))
    assert all(torch.equal(mine[name], averaged[name]) for name in mine)
    moved = average.module.dino.projector[0].weight
    assert not torch.equal(moved, before)
    assert not torch.equal(moved, model.dino.projector[0].weight)


def test_distributed_data_parallel(teacher, batch, text, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model(teacher, loss_type="vicreg")
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        for module in (model, wrapped):
            sum(v for k, v in module(text, batch[1]).items() if "loss" in k).backward()
        assert_close(grads(model), grads(wrapped.module))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"loss_type": "vicreg"}, {"use_patch": True, "latent_shape": (4, 4, 4)}])
def test_compiles_as_one_graph_once(teacher, batch, text, options):
    plain = Model(teacher, **options)
    twin = copy.deepcopy(plain)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(twin, fullgraph=True, backend=count)
    for _ in range(3):
        a, b = plain(text, batch[1]), compiled(text, batch[1])
        assert a.keys() == b.keys()
        assert_close(list(a.values()), list(b.values()))
    assert len(graphs) == 1, "the warm-up must not recompile"
    assert twin.dino.schedule.step == 3
    a["loss_dino"].backward()
    b["loss_dino"].backward()
    assert_close(grads(plain.dino), grads(twin.dino))


def test_compiled_code_stops_too(teacher, batch, text):
    model = Model(teacher, stop_step=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, *later = (compiled(text, batch[1])["loss_dino"] for _ in range(3))
    assert first > 0
    for loss in later:
        assert loss == 0
    model.zero_grad()
    later[-1].backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.dino.parameters())


def test_exports(teacher, batch):
    module = DinoSupervision(64, teacher=teacher, hidden_dim=32, img_size=56)
    exported = torch.export.export(module, batch).module()
    assert_close(exported(*batch)[0], module(*batch)[0])


@pytest.mark.parametrize("loss_type", ["cosine", "vicreg"])
def test_a_grad_scaler_steps_as_without(teacher, batch, text, loss_type):
    """The forward has written the gradient before the scale is known."""
    plain = Model(teacher, loss_type=loss_type)
    scaled = copy.deepcopy(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for model in (plain, scaled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = sum(value for name, value in model(text, batch[1]).items() if "loss" in name)
            if model is plain:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    assert_close(list(plain.parameters()), list(scaled.parameters()))


def test_gradient_scaling_and_accumulation(teacher, batch, text):
    """Half the batch twice, scaled, is the whole batch once: no state stays between calls."""
    whole = Model(teacher)
    halves = copy.deepcopy(whole)
    whole.dino.loss_dict(whole.text(text), batch[1], step=5)["loss_dino"].backward()
    for part in (slice(0, 3), slice(3, 6)):
        loss = halves.dino.loss_dict(halves.text(text[part]), batch[1][part], step=5)["loss_dino"]
        (1024 * loss / 2).backward()
    assert_close([grad / 1024 for grad in grads(halves)], grads(whole), rtol=1e-4, atol=1e-8)
