"""A term of your own beside one of this package's: it pushes a token no closer to the teacher's than a margin.

python -m examples.custom_term [steps]    runs on a CPU in seconds: a random teacher, nothing to download
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dino import DINOv2Backbone, Supervision, Term, TokenTerm
from fused_dino import functional as FD

WIDTH = 48


class MarginTerm(Term):
    """The mean of relu(1 - margin - cos(P h_n, g_n)), from the VF loss of LightningDiT (arXiv 2501.01423)."""

    needs = frozenset({"patch"})
    projector: nn.Module

    def __init__(self, in_dim: int, margin: float = 0.5, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.in_dim, self.margin = in_dim, margin

    def build(self, width: int) -> None:
        self.projector = nn.Linear(self.in_dim, width, bias=False)

    def forward(self, student: Tensor, features: dict) -> tuple[Tensor, dict[str, Tensor]]:
        distance = FD.cosine_loss(self.projector(student), features["patch"], reduction="none")  # 1 - cos, [B, N]
        return (distance - self.margin).relu().mean(), {"inside": (distance < self.margin).float().mean()}


def main(steps: int = 10) -> None:
    torch.manual_seed(0)
    teacher = DINOv2Backbone("vits14", 112, pretrained=False)  # random weights; leave pretrained out for DINOv2's
    supervision = Supervision(teacher, {"token": TokenTerm(WIDTH), "margin": MarginTerm(WIDTH, weight=0.5)})
    encoder = nn.Conv2d(3, WIDTH, 16, 16)  # your model: 8 x 8 tokens of 128 x 128 pixels
    optimizer = torch.optim.AdamW([*encoder.parameters(), *supervision.parameters()], lr=3e-3)
    for step in range(steps):
        images = F.interpolate(torch.randn(4, 3, 8, 8), (128, 128), mode="bicubic").clamp(-1, 1)
        hidden = encoder(images)  # a map, which TokenTerm takes as it is
        tokens = hidden.flatten(2).mT
        losses = supervision.loss_dict(images, {"token": hidden, "margin": tokens})
        optimizer.zero_grad()
        losses["loss_dino"].backward()
        optimizer.step()
        print(f"step {step}:", ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
