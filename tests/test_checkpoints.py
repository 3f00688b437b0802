"""Saving, resuming, and loading what the eager recipe saved."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import recipe
from conftest import TinyTeacher
from fused_dino import DinoSupervision

LATENT = (4, 4, 4)


class Old(nn.Module):
    """A user's model with the recipe pasted in."""

    def __init__(self, patch=True):
        super().__init__()
        self.text = nn.Linear(10, 64)
        pasted = recipe.Recipe(TinyTeacher(), 64, 32, 56, "cosine", LATENT if patch else None)
        for name, child in list(pasted.named_children()):
            setattr(self, name, child)


class New(nn.Module):
    """The same model after the swap."""

    def __init__(self, patch=True):
        super().__init__()
        self.text = nn.Linear(10, 64)
        self.dino = supervision(patch)


def supervision(patch=True):
    return DinoSupervision(64, teacher=TinyTeacher(), hidden_dim=32, img_size=56, use_patch=patch, latent_shape=LATENT)


def same(ours, theirs):
    return all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_round_trip():
    old, new = New(), New()
    old.dino.schedule.step.fill_(123)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.load_state_dict(old.state_dict())
    assert same(new, old)
    assert new.dino.schedule.step == 123


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"net": m}), lambda m: nn.Sequential(m)])
@pytest.mark.parametrize("revive", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_loads_the_recipes_checkpoint_at_its_parents_prefix(patch, wrap, revive):
    old, new = Old(patch), New(patch)
    state = wrap(old).state_dict()
    saved = dict(state)
    whole = revive(wrap(new))
    with pytest.warns(UserWarning, match=r"tensors renamed, 4 of .*dino_model dropped.*no .*step") as caught:
        result = whole.load_state_dict(state)
    assert len(caught) == 1
    assert not result.missing_keys
    assert not result.unexpected_keys
    new = next(m for m in whole.modules() if isinstance(m, New))
    assert same(new.dino.projector, old.dino_t_head)
    assert not patch or same(new.dino.local_projector, old.dino_local_head)
    assert same(new.text, old.text)
    assert state.keys() == saved.keys(), "the caller's dict is left alone"


def test_loads_it_at_its_own_prefix():
    old, new = Old(), supervision()
    state = {name: value for name, value in old.state_dict().items() if name.startswith("dino_")}
    with pytest.warns(UserWarning, match="12 tensors renamed"):
        new.load_state_dict(state)
    assert same(new.projector, old.dino_t_head)
    assert same(new.local_projector, old.dino_local_head)


def test_nothing_vanishes_silently():
    old = Old(patch=True)
    with (
        pytest.warns(UserWarning, match="dropped"),
        pytest.raises(RuntimeError, match=r"Unexpected key.*dino_local_head"),
    ):
        New(patch=False).load_state_dict(old.state_dict())
    both = {**New().state_dict(), **Old().state_dict()}
    with pytest.warns(UserWarning, match="dropped"), pytest.raises(RuntimeError, match=r"Unexpected key.*dino_t_head"):
        New().load_state_dict(both)
    missing = New().state_dict()
    del missing["dino.projector.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*dino\.projector\.0\.weight"):
        New().load_state_dict(missing)


def test_the_parents_own_modules_are_left_alone():
    new = New()
    new.dino_model = nn.Linear(2, 2)
    new.load_state_dict(copy.deepcopy(new).state_dict())
    state = {**new.state_dict(), "dino_model.weight": torch.full((2, 2), 7.0)}
    new.load_state_dict(state)
    assert (new.dino_model.weight == 7).all()


def test_two_supervisions_in_one_model_are_ambiguous():
    new = New()
    new.second = supervision()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*dino_t_head"):
        new.load_state_dict({**new.state_dict(), **Old().state_dict()})


def test_the_optimizer_resumes_by_position():
    """The seed has its head before its local head: torch's optimizers match parameters by their index."""
    old, new = Old(), New()
    theirs = [p for name, p in old.named_parameters() if not name.startswith("dino_model")]
    for p in theirs:
        p.grad = torch.full_like(p, float(p.numel()))
    before = torch.optim.AdamW(theirs)
    before.step()
    after = torch.optim.AdamW(new.parameters())
    after.load_state_dict(before.state_dict())
    for p in new.parameters():
        assert torch.equal(after.state[p]["exp_avg"], torch.full_like(p, 0.1 * p.numel()))
