"""The choice of an implementation: the order of its sources, what is refused, and what is said about it."""

import pytest
import torch

import fused_dino
import table
from fused_dino import backend as selection
from fused_dino import functional as FD
from fused_dino import registry
from fused_dino.registry import OpInfo

X = torch.ones(2, 4)


def call(op):
    inputs = tuple(x.cpu() for x in op.draw(op.shape(2, 4)))
    return lambda **options: op.run(*inputs, **options)


CALLS = {op.name: call(op) for op in table.OPS if not op.part_of}
WITH_KERNELS = [name for name, op in registry.OPS.items() if name in CALLS and op.triton is not None]


GROUP = "vicreg_loss(group)"  # VICReg over the rows of a process group


def test_every_op_is_listed():
    assert {*CALLS, GROUP} == set(registry.OPS)


def test_a_group_runs_on_what_one_process_does(monkeypatch):
    """test_distributed.py and test_distributed_triton.py have a group, and call it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fused_dino.explain_backend(GROUP, X).startswith("torch: ")
    assert fused_dino.explain_backend(GROUP, X, backend="triton").startswith(f"none: {GROUP} cannot run on triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused_dino.explain_backend(GROUP, X, backend="triton").startswith("triton: ")


@pytest.mark.parametrize("op", CALLS)
def test_what_runs_on_a_cpu_without_a_choice(op, monkeypatch):
    monkeypatch.delenv(selection.VARIABLE, raising=False)
    assert fused_dino.explain_backend(op, X).startswith("torch: ")
    for backend in (None, "auto", "torch", "reference"):
        assert CALLS[op](backend=backend) is not None


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_triton_on_a_cpu_raises_and_says_why(op, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f"{op} cannot run on triton.*the tensor is on cpu"):
        CALLS[op](backend="triton")
    assert fused_dino.explain_backend(op, X, backend="triton").startswith("none: ")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused_dino.explain_backend(op, X, backend="triton").startswith("triton: ")
    assert fused_dino.explain_backend(op, X).startswith("torch: "), "only an explicit choice takes the interpreter"
    monkeypatch.setattr(selection, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        CALLS[op](backend="triton")
    assert CALLS[op]() is not None


@pytest.mark.parametrize("op", CALLS)
def test_triton_without_a_kernel_raises_and_names_the_op(op, monkeypatch):
    monkeypatch.setitem(registry.OPS, op, OpInfo(registry.OPS[op].reference))
    assert "no closed form yet" in fused_dino.explain_backend(op, X)
    for choose in (lambda: CALLS[op](backend="triton"), under("triton", CALLS[op])):
        with pytest.raises(NotImplementedError, match=op):
            choose()
    assert fused_dino.explain_backend(op, X, backend="triton").startswith("none: ")


def under(name, call):
    def run():
        with fused_dino.use_backend(name):
            return call()

    return run


def test_the_argument_beats_the_context_beats_the_variable(monkeypatch):
    monkeypatch.setitem(registry.OPS, "mse_loss", OpInfo(registry.OPS["mse_loss"].reference))
    monkeypatch.setenv(selection.VARIABLE, "triton")
    with pytest.raises(NotImplementedError, match=selection.VARIABLE):
        FD.mse_loss(X, X)
    with fused_dino.use_backend("torch"):
        FD.mse_loss(X, X)
        assert "use_backend" in fused_dino.explain_backend("mse_loss", X)
        with pytest.raises(NotImplementedError, match="the argument backend="):
            FD.mse_loss(X, X, backend="triton")
        with fused_dino.use_backend("triton"):
            FD.mse_loss(X, X, backend="auto")
            with pytest.raises(NotImplementedError, match="use_backend"):
                FD.mse_loss(X, X)
        FD.mse_loss(X, X)
    assert selection.VARIABLE in fused_dino.explain_backend("mse_loss", X)
    monkeypatch.setenv(selection.VARIABLE, "reference")
    assert fused_dino.explain_backend("mse_loss", X).startswith("reference: reference by the environment variable")


def test_the_context_ends_with_an_error_too():
    with pytest.raises(KeyError), fused_dino.use_backend("triton"):
        raise KeyError
    FD.cosine_loss(X, X)


def test_unknown_names_raise_at_once(monkeypatch):
    with pytest.raises(ValueError, match="^backend is 'fast'"), fused_dino.use_backend("fast"):
        pass
    monkeypatch.setenv(selection.VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{selection.VARIABLE} is 'fast'"):
        FD.cosine_loss(X, X)
    with pytest.raises(ValueError, match="^op is 'cosine'"):
        fused_dino.explain_backend("cosine", X)
    with pytest.raises(TypeError, match="^tensor is a list"):
        fused_dino.explain_backend("cosine_loss", [1.0])


def test_a_compiled_function_follows_the_context(monkeypatch):
    monkeypatch.setitem(registry.OPS, "mse_loss", OpInfo(registry.OPS["mse_loss"].reference))
    compiled = torch.compile(lambda x: FD.mse_loss(x, x + 1), fullgraph=True, backend="eager")
    expected = compiled(X)
    with fused_dino.use_backend("reference"):
        assert torch.equal(compiled(X), expected)
    with fused_dino.use_backend("triton"), pytest.raises(Exception, match="mse_loss has no Triton kernel"):
        compiled(X)
