"""The principal components of the teacher's patch tokens, as colours."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dino import DINOv2Backbone, Preprocess

from .data import Photo


@torch.no_grad()
def patch_colours(photos: list[Photo], teacher: DINOv2Backbone, device: str) -> list[Tensor]:
    """Return the first three principal components of all photographs' patch tokens, as blue, red and green.

    Each photograph's result is [h, w, 3] in 0..1. A sigmoid about the median keeps the extremes of one photograph from
    taking the contrast of the others.
    """
    teacher = teacher.to(device)
    preprocess = Preprocess(teacher.img_size, antialias=True, mean=teacher.mean, std=teacher.std)
    images = [preprocess(photo.pixels[None].to(device), out_dtype=torch.float32) for photo in photos]
    tokens = torch.cat([teacher(image)["patch"].float().cpu() for image in images])  # [P, N, D]
    flat = F.normalize(tokens, dim=-1).flatten(0, 1)
    flat = flat - flat.mean(0)
    _, axes = torch.linalg.eigh(flat.T @ flat)  # the last are the largest
    components = flat @ axes[:, [-2, -3, -1]]  # red, green, blue
    components = components * -components.pow(3).sum(0).sign()  # an axis has no sign of its own: the longer tail is low
    colours = torch.sigmoid(1.7 * (components - components.median(0).values) / components.std(0).clamp_min(1e-6))
    return list(colours.view(len(photos), *teacher.grid, 3))
