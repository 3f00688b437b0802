"""Cosine, forward and backward in float32: the recipe in eager and compiled PyTorch against ours.

pytest-benchmark prints the providers of one size side by side, with their ratio to the fastest in brackets. A provider
whose loss or gradient is wrong is not timed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from benchmarks.shapes import ROWS
from fused_dino import functional as FD


def recipe(student, teacher):
    return (1 - (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)).mean()


def ours(student, teacher):
    return FD.cosine_loss(student, teacher)


PROVIDERS = {"recipe": lambda: recipe, "recipe compiled": lambda: torch.compile(recipe), "fused_dino": lambda: ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", ROWS, ids=lambda shape: f"{shape.rows}x{shape.width}")
def test_forward_and_backward(benchmark, shape, provider):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape.rows, shape.width, generator=generator) for _ in range(2))
    student.requires_grad_()
    loss = PROVIDERS[provider]()

    def step():
        out = loss(student, teacher)
        return out, torch.autograd.grad(out, student)[0]

    exact = student.detach().double().requires_grad_()
    true = recipe(exact, teacher.double())
    out, grad = step()
    assert_close(out.double(), true, rtol=1e-5, atol=1e-6)
    true_grad = torch.autograd.grad(true, exact)[0]
    assert_close(grad.double(), true_grad, rtol=1e-4, atol=1e-5 * true_grad.abs().max().item())
    benchmark.group = f"cosine {shape.rows} x {shape.width} float32, forward and backward"
    benchmark(step)
