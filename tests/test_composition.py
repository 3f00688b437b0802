"""Supervision composes a teacher, terms and a schedule: the sum and the logs, its checkpoints, and sizes in buckets."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fused_dino as fd
from conftest import TinyTeacher, grads, make_supervision
from fused_dino import GlobalTerm, RegionTerm, Schedule, Supervision, Term, TokenTerm

C = 10


def terms(**options):
    return {
        "global": GlobalTerm(64, hidden_dim=32, weight=2.0, **options),
        "patch": RegionTerm((4, 4, 4), weight=0.3),
        "token": TokenTerm(C, weight=0.7),
    }


def hidden(batch=6, count=16, seed=5):
    return torch.randn(batch, count, C, generator=torch.Generator().manual_seed(seed))


def make(teacher, **options):
    torch.manual_seed(2)
    return Supervision(teacher, options.pop("terms", None) or terms(), img_size=56, **options)


@pytest.fixture
def students(batch):
    return {"global": batch[0], "patch": batch[0], "token": hidden()}


def test_it_is_dino_supervision_over_the_same_terms(teacher, batch, students):
    """The same values and gradients, bit for bit, from the same seed."""
    weights = {"w_global": 2.0, "w_patch": 0.3, "w_token": 0.7, "warmup_steps": 4, "alpha": 0.5}
    torch.manual_seed(2)
    old = make_supervision(teacher, use_patch=True, latent_shape=(4, 4, 4), token_dim=C, **weights)
    new = make(teacher, schedule=Schedule(0.5, 4))
    names = {"projector": "global", "local_projector": "patch", "token_projector": "token"}
    renamed = {}
    for name, value in old.state_dict().items():
        first, _, rest = name.partition(".")
        renamed[f"terms.{names[first]}.projector.{rest}" if first in names else name] = value
    assert renamed.keys() == new.state_dict().keys()
    new.load_state_dict(renamed)
    for _ in range(2):
        a = old.loss_dict(batch[0], batch[1], tokens=students["token"])
        b = new.loss_dict(batch[1], students)
        assert list(a) == list(b) == ["loss_dino", "dino_global", "dino_patch", "dino_token"]
        assert_close(a, b, rtol=0, atol=0)
    a["loss_dino"].backward()
    b["loss_dino"].backward()
    assert_close(grads(old), grads(new), rtol=0, atol=0)


def test_the_default_schedule_is_always_one(teacher, batch, students):
    module = make(teacher)
    loss, logs = module(batch[1], students)
    assert_close(loss, 2 * logs["dino_global"] + 0.3 * logs["dino_patch"] + 0.7 * logs["dino_token"])
    assert_close(module.loss_dict(batch[1], students)["loss_dino"], loss)
    cached = module(features=module.encode(batch[1]), students=students)
    assert_close(cached, (loss, logs))
    assert_close(module(batch[1], students, as_dict=True)["loss_dino"], loss)


class Distance(Term):
    """A user's term: it takes no scale, and has a log of its own."""

    def forward(self, student, features):
        distance = (student - features["global"]).square().mean()
        return distance, {"largest": student.detach().abs().max()}


def test_a_strangers_term_is_scaled_and_logged(teacher, batch):
    module = make(teacher, terms={"near": Distance(weight=3.0)}, schedule=Schedule(0.5, 0))
    student = torch.randn(6, 24, requires_grad=True)
    expected = (student - module.encode(batch[1])["global"]).square().mean()
    out = module.loss_dict(batch[1], {"near": student})
    assert list(out) == ["loss_dino", "dino_near", "dino_near_largest"]
    assert_close(out["loss_dino"], 1.5 * expected)
    assert_close(out["dino_near"], expected.detach())
    with pytest.raises(ValueError, match=r"^weight must be left out: none of the terms near takes it"):
        module(batch[1], {"near": student}, weight=torch.ones(6))
    both, students = make(teacher, terms={"near": Distance(), **terms()}), {"near": student, "patch": batch[0]}
    students.update({"global": batch[0], "token": hidden()})
    with pytest.raises(ValueError, match=r"^weight must be a dict by term, since near takes none"):
        both(batch[1], students, weight=torch.ones(6))
    both(batch[1], students, weight={"token": torch.ones(6)})


def test_logs_that_a_trainer_would_add_to_the_loss_are_refused(teacher, batch):
    class Loud(Distance):
        def forward(self, student, features):
            return super().forward(student, features)[0], {"raw_loss": student.mean()}

    module = make(teacher, terms={"near": Loud()})
    with pytest.raises(ValueError, match=r"^logs of near must have names without 'loss'.*raw_loss"):
        module(batch[1], {"near": torch.zeros(6, 24)})


def test_checkpoints_copies_and_hooks_keep_every_name(teacher, batch, students, tmp_path):
    """torch.distributed.checkpoint reads names from state_dict() and nothing else."""
    options = {"use_patch": True, "latent_shape": (4, 4, 4), "patch_target": "attention", "token_dim": C}
    for number, (source, target) in enumerate(
        [
            (make(teacher), make(TinyTeacher())),
            (make_supervision(teacher, **options), make_supervision(TinyTeacher(), **options)),
        ]
    ):
        assert not source._state_dict_hooks
        assert not source._load_state_dict_pre_hooks
        with torch.no_grad():
            for p in target.parameters():
                p.fill_(7)
        dcp.save(source.state_dict(), checkpoint_id=tmp_path / str(number), no_dist=True)
        state = target.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / str(number), no_dist=True)
        target.load_state_dict(state)
        assert_close(dict(target.named_parameters()), dict(source.named_parameters()), rtol=0, atol=0)
        arguments = [batch[1], students] if number == 0 else [batch[0], batch[1]]
        given = {} if number == 0 else {"tokens": students["token"]}
        expected = source(*arguments, **given)[0]
        for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
            assert torch.equal(twin(*arguments, **given)[0], expected)
            assert len(list(twin.parameters())) == len(list(source.parameters()))


def test_the_teacher_is_invisible_and_a_stopped_loss_reaches_everything(teacher, batch, students):
    module = make(teacher, schedule=Schedule(0.5, 0, stop_step=1))
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"terms"}
    students["token"].requires_grad_()
    for p in module.parameters():
        nn.init.constant_(p, float("nan"))
    loss = module.loss_dict(batch[1], students)["loss_dino"]
    assert loss == 0
    loss.backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (*module.parameters(), students["token"]))


def test_it_is_built_on_meta_with_a_real_teacher(teacher, batch, students):
    source = make(teacher)
    with torch.device("meta"):
        module = make(teacher)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    module.to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    assert torch.equal(module(batch[1], students)[0], source(batch[1], students)[0])


@pytest.mark.parametrize("wrap", ["ddp", "fsdp1", "fsdp2"])
def test_wrapped_it_learns_the_same(teacher, batch, students, wrap, tmp_path):
    plain = make(teacher, schedule=Schedule(0.5, 0, stop_step=2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        twin = copy.deepcopy(plain)
        on_cpu = {"device_id": torch.device("cpu"), "use_orig_params": True}
        wrapped = {
            "ddp": DistributedDataParallel,
            "fsdp1": lambda module: FullyShardedDataParallel(module, **on_cpu),
            "fsdp2": lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (1,))),
        }[wrap](twin)
        for _ in range(2):  # the second is the zero after the stop
            outs = []
            for module in (plain, wrapped):
                module.zero_grad()
                outs.append(module(batch[1], students, as_dict=True))
                outs[-1]["loss_dino"].backward()
            assert_close(*outs)
            for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
                assert_close(getattr(q.grad, "to_local", lambda q=q: q.grad)().view_as(p), p.grad)
    finally:
        dist.destroy_process_group()


def test_a_module_may_be_replaced_after_construction(teacher, batch):
    """Adapters and quantisation replace modules: the terms keep no reference to those of DinoSupervision."""
    module = make_supervision(teacher, token_dim=C, use_patch=True, latent_shape=(4, 4, 4))
    old = [weakref.ref(x) for x in (module.projector, module.local_projector, module.token_projector)]
    module.projector, module.local_projector, module.token_projector = (nn.Linear(n, 24) for n in (64, 4, C))
    module(*batch, tokens=hidden())[0].backward()
    assert all(p.grad.any() for p in module.parameters())
    gc.collect()
    assert [x() for x in old] == [None] * 3


def test_weights_and_indices_go_to_the_terms_that_are_named(teacher, batch, students):
    module, gate = make(teacher), torch.tensor([1.0, 0, 2, 0.5, 0, 1])
    logs = module(batch[1], students, weight=gate)[1]
    each = {name: module(batch[1], students, weight={name: gate})[1][f"dino_{name}"] for name in students}
    assert_close(logs, {f"dino_{name}": value for name, value in each.items()})
    some = torch.arange(5).expand(6, -1)
    chosen = module(batch[1], {**students, "token": hidden(count=5)}, index=some)[1]
    assert_close(module(batch[1], {**students, "token": hidden(count=5)}, index={"token": some})[1], chosen)
    assert_close(chosen["dino_global"], module(batch[1], students)[1]["dino_global"])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("students must be a dict with a tensor for each of the terms", {"students": {"global": torch.ones(6, 64)}}),
        ("students must be a dict with a tensor for each of the terms", {"students": None}),
        ("students must be a dict with a tensor for each of the terms", {"students": {"glob": torch.ones(6, 64)}}),
        ("weight is given to 'sample'; the terms that take it are global, patch, token", {"weight": {"sample": 1}}),
        ("index is given to 'global'; the terms that take it are token", {"index": {"global": torch.ones(6, 1)}}),
        ("weight must be of shape", {"weight": torch.ones(6, 2)}),
        ("weight must be of shape", {"weight": {"token": torch.ones(6, 15)}}),
        ("index must have a position for each", {"index": torch.zeros(6, 4, dtype=torch.long)}),
        ("token_grid must be", {"token_grid": 4}),
        ("tokens must be 3 x 5, by token_grid, and N is 16", {"token_grid": (3, 5)}),
        ("images must be \\[B, 3, H, W\\]", {"images": torch.zeros(6, 1, 56, 56)}),
        ("give images, the images, or features", {"images": None}),
        ("step must be left out", {"step": 3}),
        ("alpha must be left out", {"alpha": 0.5, "as_dict": True}),
    ],
)
def test_bad_calls_are_named_and_count_no_step(teacher, batch, students, message, options):
    module = make(teacher)
    arguments = {"images": batch[1], "students": students, **options}
    with pytest.raises(ValueError, match=f"^{message}"):
        module(**arguments)
    if not {"step", "alpha"} & options.keys():
        with pytest.raises(ValueError, match=f"^{message}"):
            module.loss_dict(**arguments)
    assert module.schedule.step == 0


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("terms must be a dict of at least one term", {"terms": {}}),
        ("terms must be a dict of at least one term", {"terms": [Distance()]}),
        ("terms must have names that are identifiers without 'loss'", {"terms": {"my_loss": Distance()}}),
        ("terms must have names that are identifiers without 'loss'", {"terms": {"a.b": Distance()}}),
        ("terms must have names that are identifiers .* and no dict's", {"terms": {"keys": Distance()}}),
        (r"terms\['near'\] must be a Term, got Linear", {"terms": {"near": nn.Linear(2, 2)}}),
        ("terms must be different ones, got the same for 'a' and 'b'", {"terms": dict.fromkeys("ab", Distance())}),
        ("schedule must be None or a Schedule", {"terms": {"near": Distance()}, "schedule": 0.5}),
        ("stopgrad_image=False needs a loss of global with detach_teacher=False",
         {"terms": {"global": GlobalTerm(64, loss=fd.CosineLoss())}, "stopgrad_image": False}),
    ],
)  # fmt: skip
def test_bad_constructions_are_named(teacher, message, options):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        Supervision(teacher, **options)


def test_vicreg_refuses_the_weight_of_a_call_by_name(teacher, batch, students):
    module = make(teacher, terms=terms(loss="vicreg"))
    assert "dino_global_vic_inv" in module(batch[1], students)[1]
    with pytest.raises(ValueError, match=r"^weight must be left out for VICRegLoss.*dict of the other terms"):
        module(batch[1], students, weight=torch.ones(6))
    module(batch[1], students, weight={"token": torch.ones(6)})
    old = make_supervision(teacher, loss_type="vicreg")
    with pytest.raises(ValueError, match=r"^weight must be left out for VICRegLoss"):
        old(*batch, weight=torch.ones(6))


class Colours(nn.Module):
    """A teacher whose tokens are the means of its patches, for any size."""

    embed_dim, patch_size = 3, 14

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        tokens = nn.functional.avg_pool2d(x, 14).flatten(2).mT * self.one
        return {"global": tokens.mean(1), "patch": tokens}


SIZES = [(64, 64), (32, 128), (128, 32), (48, 80), (96, 64)]  # of images, whose tokens are 16 x 16 pixels


def bucket(size, seed):
    rows, columns = size[0] // 16, size[1] // 16
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, 3, *size, generator=generator) * 2 - 1, hidden(3, rows * columns, seed)


def test_frames_of_videos_are_images(teacher):
    module = make(teacher, terms={"token": TokenTerm(C)})
    video = torch.rand(2, 3, 3, 60, 60, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = hidden(6)
    expected = module(video.flatten(0, 1), {"token": tokens})
    assert_close(module(video, {"token": tokens.unflatten(0, (2, 3))}), expected)
    assert_close(module(features=module.encode(video), students={"token": tokens}), expected)
    assert module.check(video) == module.check(video.flatten(0, 1))


def test_features_carry_the_grid_of_their_batch():
    module = Supervision(Colours(), {"token": TokenTerm(C)}, img_size=fd.Scaled(7 / 8))
    for size in SIZES:
        images, tokens = bucket(size, 0)
        found = module.encode(images)
        assert found["grid"] == (size[0] // 16, size[1] // 16)
        assert found["image_size"] == size
        assert_close(module(features=found, students={"token": tokens}), module(images, {"token": tokens}))


def test_five_aspect_ratios_train_with_a_compilation_each(fresh_compiler):
    """Compiled and eager learn the same; a second epoch compiles nothing more."""
    options = {"terms": {"token": TokenTerm(C)}, "schedule": Schedule(0.5, 2)}
    torch.manual_seed(0)
    eager = Supervision(Colours(), **options, img_size=fd.Scaled(7 / 8))
    twin = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin.loss_dict, fullgraph=True, backend=counter)
    counts = []
    for _ in range(2):
        for number, size in enumerate(SIZES):
            images, tokens = bucket(size, number)
            losses = [run(images, {"token": tokens})["loss_dino"] for run in (eager.loss_dict, compiled)]
            assert_close(*losses)
            for module, loss in zip((eager, twin), losses, strict=True):
                module.zero_grad()
                loss.backward()
                torch.optim.SGD(module.parameters(), 0.1).step()
        counts.append(counter.frame_count)
    assert counts[0] <= len(SIZES)
    assert counts[1] == counts[0]
    assert_close(dict(eager.named_parameters()), dict(twin.named_parameters()))
