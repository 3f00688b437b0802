"""A supervision with a known cosine similarity: the student gives vectors in a plane, and the teacher (1, 0)."""

import torch
from torch import Tensor, nn

from fused_dino import BySimilarity, GlobalTerm, Schedule, Supervision, Weight

IMAGES = torch.zeros(3, 3, 14, 14, dtype=torch.float64)


class Axis(nn.Module):
    """A teacher that gives (1, 0) for each image, and counts its calls."""

    embed_dim, patch_size = 2, 14

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not torch.compiler.is_compiling():
            self.calls += 1
        return {"global": torch.stack([self.one, self.one * 0]).expand(len(x), 2)}


class Model(nn.Module):
    """A model with a supervision, which makes latents [3, 2] of a given cosine by one weight."""

    def __init__(self, stop: BySimilarity, terms: dict | None = None, alpha: float = 0.5, accumulate: int = 1) -> None:
        super().__init__()
        self.length = nn.Parameter(torch.ones((), dtype=torch.float64))
        terms = {"global": plane()} if terms is None else terms
        schedule = Schedule(weight=Weight(alpha), stop=stop, accumulate=accumulate)
        self.dino = Supervision(Axis(), terms, schedule, img_size=14)

    def forward(self, cosine: Tensor, step: int | None = None) -> dict[str, Tensor]:
        z = torch.stack([cosine * self.length, (1 - cosine**2).sqrt()]).expand(3, 2)
        return self.dino.loss_dict(IMAGES, dict.fromkeys(self.dino.terms, z), step)

    def run(self, *cosines: float) -> list[float]:
        """Return the weight that each loss had, read from a gradient with respect to the length."""
        return [self.weight_of(c) for c in cosines]

    def weight_of(self, cosine: float, step: int | None = None) -> float:
        out = self(as_tensor(cosine), step)
        (grad,) = torch.autograd.grad(out["loss_dino"], self.length)
        slope = -(cosine - cosine**3)  # of 1 - cos in the length
        return float(grad / slope)

    @property
    def average(self) -> float:
        return float(self.dino.schedule.watch.value())


def as_tensor(cosine: float) -> Tensor:
    return torch.tensor(cosine, dtype=torch.float64)


def plane(**options) -> GlobalTerm:
    """Return a term of latents [B, 2] without a projector."""
    return GlobalTerm(2, projector=nn.Identity(), out_dim=2, **options)
