"""A small flow-matching transformer on the demo's photographs, its hidden tokens aligned with a frozen teacher's.

python examples/align_tokens.py [steps]    needs pip install "fused_dino[demo]"; downloads nothing
"""

import sys

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fused_dino import DinoSupervision, DINOv2Backbone
from fused_dino.cli.demo.data import crop, embedded
from fused_dino.cli.demo.teacher import efficientnet_lite0, stand_in_file

SIZE, PATCH, WIDTH = 64, 8, 192


class Denoiser(nn.Module):
    """Noisy pixels [B, 3, SIZE, SIZE], times [B] -> (velocity, the hidden tokens [B, N, WIDTH] between two blocks)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.time = nn.Linear(3 * PATCH**2, WIDTH), nn.Linear(1, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, WIDTH))
        block = nn.TransformerEncoderLayer(WIDTH, 4, dropout=0.0, batch_first=True, norm_first=True)
        self.lower, self.upper = (nn.TransformerEncoder(block, 2, enable_nested_tensor=False) for _ in range(2))
        self.out = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patches(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH))
        hidden = self.lower(x + self.place + self.time(t[:, None]).unsqueeze(1))
        layout = {"h": SIZE // PATCH, "p": PATCH, "q": PATCH}
        return rearrange(self.out(self.upper(hidden)), "b (h w) (c p q) -> b c (h p) (w q)", **layout), hidden


def main(steps: int = 40) -> None:
    torch.manual_seed(0)
    draw, photos = torch.Generator().manual_seed(0), embedded()
    teacher = DINOv2Backbone(img_size=224, model=efficientnet_lite0(stand_in_file()))
    supervision = DinoSupervision(None, teacher=teacher, token_dim=WIDTH, alpha=1.0, warmup_steps=10)
    denoiser = Denoiser()
    optimizer = torch.optim.AdamW([*denoiser.parameters(), *supervision.parameters()], lr=3e-4)
    for step in range(steps):
        images = torch.stack([crop(photo.part(held_out=False), 224, draw) for photo in photos])
        clean, t = F.interpolate(images, (SIZE, SIZE), mode="area"), torch.rand(len(images), generator=draw)
        noise = torch.randn(clean.shape, generator=draw)
        velocity, hidden = denoiser(torch.lerp(noise, clean, t.view(-1, 1, 1, 1)), t)
        flow, losses = F.mse_loss(velocity, clean - noise), supervision.loss_dict(x_img=images, tokens=hidden)
        optimizer.zero_grad()
        (flow + losses["loss_dino"]).backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: flow {flow.item():.3f}, cosine to the teacher's {1 - losses['dino_token'].item():.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
