"""Batches of several aspect ratios: each reaches the teacher in its own shape, and tokens meet one to one.

python -m examples.buckets    runs on a CPU in seconds: a random teacher, nothing to download
"""

import torch
from torch import nn

from fused_dino import DINOv2Backbone, Scaled, Supervision, TokenTerm

WIDTH = 48
BUCKETS = ((256, 256), (192, 320), (320, 192))  # heights and widths


def main() -> None:
    torch.manual_seed(0)
    # A student's token has 16 pixels a side, a teacher's patch 14.
    teacher = DINOv2Backbone("vits14", Scaled(7 / 8), pretrained=False)  # random; leave pretrained out for DINOv2's
    supervision = Supervision(teacher, {"token": TokenTerm(WIDTH)})
    encoder = nn.Conv2d(3, WIDTH, 16, 16)  # your model
    for size in BUCKETS:
        images = torch.rand(2, 3, *size) * 2 - 1
        hidden = encoder(images).flatten(2).mT  # [B, N, WIDTH]: the images' aspect ratio says their grid
        features = supervision.encode(images)
        losses = supervision.loss_dict(None, {"token": hidden}, features=features)
        losses["loss_dino"].backward()
        rows, columns = features["grid"]
        print(f"{size[0]} x {size[1]}: {hidden.shape[1]} tokens against {rows} x {columns} of the teacher's")


if __name__ == "__main__":
    main()
