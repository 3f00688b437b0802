"""Regions of the student's latent map, and what each is compared with among the teacher's patch tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .grids import Grid, Regrid, average, product
from .reference.dtypes import upcast, without_autocast

PATCH_TARGETS = ("region", "mean", "nearest", "attention")


class Patches(nn.Module):
    """z_text read as a map [B, C, h, w] and pooled to K regions, and the teacher's side of them, [B, K, D].

    target: of region k, from the teacher's tokens t_n of the same image,

        region     the mean of the tokens that lie in it
        mean       the mean of all tokens
        nearest    the token with the largest cosine to the student's region; no gradient flows through the choice
        attention  sum_n softmax_n(<q_k, t_n> / sqrt(D)) t_n, with learnt queries q [K, D]

    With "attention" the loss pulls queries and student towards each other, so that regions may collapse onto the tokens
    that are easiest to meet. All but "region" are blind to where a token lies.
    """

    def __init__(self, target: str, latent_shape: tuple[int, ...], onto: Grid, teacher_grid: Grid) -> None:
        super().__init__()
        self.target = target
        self.count = onto[0] * onto[1]
        self.pool = Regrid(average, (latent_shape[1], latent_shape[2]), onto)
        self.pool_teacher = Regrid(average, teacher_grid, onto) if target == "region" else None
        self.channels = latent_shape[0]

    def forward(self, z_text: Tensor) -> Tensor:
        """The student's regions [B, K, C]."""
        return self.pool(rearrange(z_text, "b (c n) -> b n c", c=self.channels))

    def targets(self, tokens: Tensor, student: Tensor, queries: Tensor | None) -> Tensor:
        """tokens [B, N, D], student [B, K, D], queries [K, D] for "attention" -> [B, K, D]."""
        if self.pool_teacher is not None:
            return self.pool_teacher(tokens)
        if queries is not None:
            return attend(queries, tokens)
        if self.target == "nearest":
            return nearest(student, tokens)
        return tokens.mean(1, keepdim=True).expand(-1, self.count, -1)


@torch.no_grad()
def most_similar(student: Tensor, tokens: Tensor) -> Tensor:
    """Finds for each student row [B, K, D] the most similar token of [B, N, D]: its index, the first of equals."""
    with without_autocast(tokens):
        s, t = (F.normalize(x, dim=-1) for x in upcast(student, tokens))
        return (s @ t.mT).argmax(-1)


def nearest(student: Tensor, tokens: Tensor) -> Tensor:
    # An index's gradient has a fixed order, where that of gather adds with atomics.
    rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    return tokens[rows, most_similar(student, tokens)]


def attend(queries: Tensor, tokens: Tensor) -> Tensor:
    """Each query's weighted mean of an image's tokens, in float32 (float64 if an input is)."""
    scores = product(queries, tokens.mT) / tokens.shape[-1] ** 0.5
    return product(scores.softmax(-1), tokens)
