"""REPA in one call: a small flow-matching transformer, its hidden tokens aligned with a frozen teacher's.

python -m examples.repa [steps]    runs on a CPU in seconds: random images, a random teacher, nothing to download
"""

import sys

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fused_dino import DINOv2Backbone, recipes

SIZE, PATCH, WIDTH = 32, 2, 96  # of the latents, which a VAE would make of images of 256 x 256


class Denoiser(nn.Module):
    """Noisy latents [B, 3, SIZE, SIZE], times [B] -> (velocity, the hidden tokens [B, N, WIDTH] between two blocks)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.time = nn.Linear(3 * PATCH**2, WIDTH), nn.Linear(1, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, WIDTH))
        self.lower, self.upper = (
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.out = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patches(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH))
        hidden = self.lower(x + self.place + self.time(t[:, None]).unsqueeze(1))
        layout = {"h": SIZE // PATCH, "p": PATCH, "q": PATCH}
        return rearrange(self.out(self.upper(hidden)), "b (h w) (c p q) -> b c (h p) (w q)", **layout), hidden


def main(steps: int = 10) -> None:
    torch.manual_seed(0)
    teacher = DINOv2Backbone("vits14", pretrained=False)  # random weights; teacher="vitb14" has REPA's
    supervision, denoiser = recipes.repa(WIDTH, teacher=teacher), Denoiser()
    optimizer = torch.optim.AdamW([*denoiser.parameters(), *supervision.parameters()], lr=3e-4)
    for step in range(steps):
        images = F.interpolate(torch.randn(2, 3, 8, 8), (256, 256), mode="bicubic").clamp(-1, 1)
        clean, t = F.interpolate(images, (SIZE, SIZE), mode="area"), torch.rand(len(images))
        noise = torch.randn_like(clean)
        velocity, hidden = denoiser(torch.lerp(noise, clean, t.view(-1, 1, 1, 1)), t)
        flow, losses = F.mse_loss(velocity, clean - noise), supervision.loss_dict(images, {"token": hidden})
        optimizer.zero_grad()
        (flow + losses["loss_dino"]).backward()
        optimizer.step()
        print(f"step {step}: flow {flow.item():.3f}, cosine to the teacher's {-losses['dino_token'].item():.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
