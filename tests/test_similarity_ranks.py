"""BySimilarity over real gloo processes: all ranks stop together, by the average of their means, and rarely talk."""

import functools

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from fused_dino import BySimilarity
from fused_dino.schedule import stop as stops
from similarity import Model, as_tensor
from test_distributed import spawn

EACH = [[0.4, 0.7, 0.9, 0.9, 0.3, 0.1, 0.2, 0.1], [0.2, 0.5, 0.5, 0.9, 0.7, 0.3, 0.2, 0.1]]  # by rank
D, THRESHOLD = 0.5, 0.6


def expected(values, every, mode):
    """Return the losses' weights and the average of a single process, written anew."""
    average, stopped, weights = None, False, []
    for step, value in enumerate(values, 1):
        due = step % every == 0
        if not stopped or (due and mode == "recoverable"):
            average = value if average is None else D * average + (1 - D) * value
            if due:
                stopped = average >= THRESHOLD
        weights.append(0.0 if stopped else 0.5)
    return weights, average


def count_talks(monkeypatch):
    talks, real = [], stops.all_reduce
    monkeypatch.setattr(stops, "all_reduce", lambda *args: talks.append(1) or real(*args))
    return talks


def ranks_stop_together(rank, world, how="plain", mode="recoverable"):
    with pytest.MonkeyPatch.context() as patch:
        talks = count_talks(patch)
        model = Model(BySimilarity(THRESHOLD, decay=D, every=2, mode=mode))
        run = {
            "plain": lambda: model,
            "ddp": lambda: DistributedDataParallel(model),
            "compiled": lambda: torch.compile(model, fullgraph=True, backend="aot_eager"),
        }[how]()
        weights = []
        for value in EACH[rank]:
            out = run(as_tensor(value))
            out["loss_dino"].backward()
            weights.append(float(out["dino_alpha"]))
        means = [sum(pair) / 2 for pair in zip(*EACH, strict=True)]
        wanted, average = expected(means, 2, mode)
        assert weights == wanted
        assert set(wanted) == {0.0, 0.5}
        assert model.average == pytest.approx(average, abs=1e-12)
        # At each decision while eager code looks; every call where buffers are broadcast or nothing is known.
        looked = model.dino.teacher.calls
        decisions = 2 if mode == "permanent" else 4
        assert len(talks) == {"plain": decisions, "ddp": looked, "compiled": 8}[how]


def permanent_stops_together(rank, world):
    ranks_stop_together(rank, world, mode="permanent")


def ddp_does_not_take_the_average_of_one_rank(rank, world):
    ranks_stop_together(rank, world, "ddp")


def compiled_ranks_stop_together(rank, world):
    ranks_stop_together(rank, world, "compiled")


def a_group_of_its_own_decides_alone(rank, world):
    model = Model(BySimilarity(THRESHOLD, decay=D, every=1, mode="recoverable", group=None))
    wanted, average = expected(EACH[rank], 1, "recoverable")
    assert [float(model(as_tensor(value))["dino_alpha"]) for value in EACH[rank]] == wanted
    assert model.average == pytest.approx(average, abs=1e-12)


def nan_of_one_rank_is_left_out(rank, world):
    model = Model(BySimilarity(2.0, decay=D, every=1))
    model(as_tensor(torch.nan if rank == 0 else 0.25))
    assert model.average == pytest.approx(0.25, abs=1e-12)
    model(as_tensor(0.5 if rank == 0 else torch.nan))
    assert model.average == pytest.approx((0.375 + 0.25) / 2, abs=1e-12)


def all_of_them(checks, rank, world):
    for check in checks:
        check(rank, world)


def test_ranks_agree(tmp_path):
    checks = (
        ranks_stop_together,
        permanent_stops_together,
        ddp_does_not_take_the_average_of_one_rank,
        a_group_of_its_own_decides_alone,
        nan_of_one_rank_is_left_out,
        compiled_ranks_stop_together,
    )
    spawn(functools.partial(all_of_them, checks), 2, tmp_path)
