"""The four targets of regions, each against its formula in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.testing import assert_close

from conftest import TinyTeacher, check_slope, grads, make_supervision
from fused_dino import CosineLoss, DinoSupervision, Preprocess
from fused_dino.terms.regions import PATCH_TARGETS, attend, most_similar, nearest
from proving import DEVICE, IMPLEMENTATIONS

LATENT = (4, 4, 4)


def make(teacher, target="region", **options):
    torch.manual_seed(2)
    regions = {"use_patch": True, "latent_shape": LATENT, "patch_target": target}
    return make_supervision(teacher, **(regions | options))


def oracle(module, z, tokens):
    """Return the patch loss by its formulas, in plain torch."""
    (rows, columns), (h, _), (c, y, x) = module.patch_grid, module.teacher_grid, module.latent_shape
    pooled = F.adaptive_avg_pool2d(z.view(-1, c, y, x), (rows, columns)).flatten(2).mT
    student = module.local_projector(pooled)
    if module.patch_target == "region":
        target = F.adaptive_avg_pool2d(rearrange(tokens, "b (h w) d -> b d h w", h=h), (rows, columns)).flatten(2).mT
    elif module.patch_target == "mean":
        target = repeat(tokens.mean(1), "b d -> b k d", k=rows * columns)
    elif module.patch_target == "nearest":
        choice = F.cosine_similarity(student.unsqueeze(2), tokens.unsqueeze(1), dim=-1).argmax(-1)
        target = torch.stack([t[i] for t, i in zip(tokens, choice, strict=True)])
    else:
        weights = (module.patch_queries @ tokens.mT / tokens.shape[-1] ** 0.5).softmax(-1)
        target = weights @ tokens
    return (1 - F.cosine_similarity(student, target, dim=-1)).mean()


SHAPES = [
    {},
    {"patch_grid": (3, 2)},
    {"img_size": (56, 28), "latent_shape": (2, 4, 8), "patch_grid": (4, 1)},
    {"img_size": (28, 70), "latent_shape": (1, 16, 4), "patch_grid": (3, 4)},
]


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("target", PATCH_TARGETS)
def test_is_its_formula_in_value_and_gradient(teacher, batch, target, shape, backend):
    options = {"w_global": 0.0, "w_patch": 1.0, "preprocess": Preprocess(shape.get("img_size", 56)), **shape}
    module = make(teacher, target, backend=backend, **options).to(DEVICE, torch.float64)
    z, x = (v.to(DEVICE, torch.float64) for v in batch)
    z.requires_grad_()
    features = module.encode(x)
    loss, logs = module(z, features=features)
    expected = oracle(module, z, features["patch"])
    assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    assert_close(logs["dino_patch"], expected.detach(), rtol=1e-11, atol=1e-12)
    leaves = [z, *module.local_projector.parameters()]
    if target == "attention":
        leaves.append(module.patch_queries)
    assert_close(*(torch.autograd.grad(x, leaves) for x in (loss, expected)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", PATCH_TARGETS)
def test_only_regions_know_where_a_token_lies(teacher, batch, target):
    module = make(teacher, target)
    z, x = batch
    features = module.encode(x)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = {**features, "patch": features["patch"][:, order]}
    loss, turned = (module(z, features=f)[1]["dino_patch"] for f in (features, shuffled))
    if target == "region":
        assert (loss - turned).abs() > 1e-4
    else:
        assert_close(loss, turned)


def test_the_default_is_the_region(teacher, batch):
    module = make(teacher)
    assert DinoSupervision.__init__.__kwdefaults__["patch_target"] == module.patch_target == "region"
    features = module.encode(batch[1])
    expected = features["patch"].view(6, 2, 2, 2, 2, 24).mean((2, 4)).view(6, 4, 24)
    assert_close(module.patches.targets(features["patch"], expected, None), expected)


def test_equal_tokens_leave_the_first():
    tokens = torch.eye(4).repeat(2, 2, 1)  # each twice
    student = torch.eye(4).flip(0).expand(2, -1, -1)
    assert most_similar(student, tokens).tolist() == [[3, 2, 1, 0]] * 2
    assert (most_similar(torch.zeros(2, 3, 4), tokens) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_neither_the_choice_nor_the_attention(dtype):
    generator = torch.Generator().manual_seed(0)
    student, tokens = (torch.randn(3, n, 64, generator=generator).to(dtype) for n in (8, 50))
    queries = torch.randn(8, 64, generator=generator).requires_grad_()
    choice, target = most_similar(student, tokens), attend(queries, tokens)
    (grad,) = torch.autograd.grad(target.square().sum(), queries)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(most_similar(student, tokens), choice)
        again = attend(queries, tokens)
        assert again.dtype == torch.float32
        assert torch.equal(again, target)
        assert torch.equal(torch.autograd.grad(again.square().sum(), queries)[0], grad)


def test_the_nearest_token_gets_the_gradient_and_the_choice_none():
    student = torch.randn(2, 3, 5, requires_grad=True)
    tokens = torch.randn(2, 7, 5, requires_grad=True)
    picked = nearest(student, tokens)
    (grad,) = torch.autograd.grad(picked.sum(), tokens)
    counts = F.one_hot(most_similar(student, tokens), 7).sum(1).float()
    assert torch.equal(grad, counts.unsqueeze(-1).expand(-1, -1, 5))
    assert torch.autograd.grad(nearest(student, tokens).sum(), student, allow_unused=True)[0] is None


@pytest.mark.parametrize("target", PATCH_TARGETS)
def test_the_image_gets_a_gradient_through_every_target(teacher, batch, target):
    z, x = (v.double() for v in batch)
    x.requires_grad_()
    options = {"w_global": 0.0, "w_patch": 1.0}
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(make(teacher, target, **options).double()(z, x)[0], x)
    module = make(teacher, target, stopgrad_image=False, **options).double()
    check_slope(lambda x: module(z, x)[0], x)


def test_features_of_the_call_are_detached_and_queries_are_not(teacher, batch):
    module = make(teacher, "attention")
    features = module.encode(batch[1])
    for name in ("global", "patch"):
        features[name].requires_grad_()
    module(batch[0], features=features)[0].backward()
    assert all(features[name].grad is None for name in ("global", "patch"))
    assert module.patch_queries.grad.abs().sum() > 0


def test_queries_start_near_the_mean_and_learn(teacher, batch):
    module, twin = (make(teacher, "attention", warmup_steps=0, alpha=1.0) for _ in range(2))
    assert torch.equal(module.patch_queries, twin.patch_queries), "the same seed"
    features = module.encode(batch[1])
    target = module.patches.targets(features["patch"], None, module.patch_queries)
    assert_close(target, features["patch"].mean(1, keepdim=True).expand(-1, 4, -1), rtol=0.1, atol=0.02)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = module.loss_dict(batch[0], features=features)
        out["loss_dino"].backward()
        optimizer.step()
        losses.append(out["dino_patch"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.allclose(module.patch_queries, twin.patch_queries, atol=0.01)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(module.patch_queries, twin.patch_queries)


@pytest.mark.parametrize("target", PATCH_TARGETS)
def test_state_has_only_parameters_and_the_step(teacher, target):
    names = {name.partition(".")[0] for name in make(teacher, target).state_dict()}
    queries = {"patch_queries"} if target == "attention" else set()
    assert names == {"projector", "local_projector", "schedule"} | queries


@pytest.mark.parametrize("target", ["nearest", "attention"])
def test_compiles_as_one_graph(fresh_compiler, teacher, batch, target):
    module = make(teacher, target)
    twin = copy.deepcopy(module)
    a, b = module.loss_dict(*batch), torch.compile(twin.loss_dict, fullgraph=True, backend="aot_eager")(*batch)
    assert_close(a, b)
    a["loss_dino"].backward()
    b["loss_dino"].backward()
    assert_close(grads(module), grads(twin))


@pytest.mark.parametrize("target", PATCH_TARGETS)
def test_a_teacher_without_patches_warns_once_and_says_so_in_the_logs(batch, target):
    module = make(TinyTeacher(patches=False), target)
    with pytest.warns(UserWarning, match="no patch tokens") as caught:
        loss, logs = module(*batch)
        module(*batch)
    assert len(caught) == 1
    assert logs["dino_patch_is_global"] == 1
    expected = CosineLoss()(
        module.local_projector(batch[0].view(6, 4, 2, 2, 2, 2).mean((3, 5)).flatten(2).mT),
        module.encode(batch[1])["global"].unsqueeze(1).expand(6, 4, 24),
    )
    assert_close(logs["dino_patch"], expected.detach())
    loss.backward()
    assert target != "attention" or not module.patch_queries.grad.any(), "a zero, not none: every parameter has one"


def test_a_stopped_loss_reaches_the_queries(teacher, batch):
    module = make(teacher, "attention", stop_step=1)
    with torch.no_grad():
        module.patch_queries.fill_(float("nan"))
    loss = module.loss_dict(*batch)["loss_dino"]
    assert loss == 0
    loss.backward()
    assert torch.equal(module.patch_queries.grad, torch.zeros(4, 24))
