"""Regions of the student's latent map, and their targets among the teacher's patch tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..reference.dtypes import upcast, without_autocast
from .grids import Grid, Regrid, average, product

LOCAL_HIDDEN_DIM = 256  # of the projector of regions
PATCH_TARGETS = ("region", "mean", "nearest", "attention")


class Patches(nn.Module):
    """Pools z_text, read as a map [B, C, h, w], to K regions, and makes their targets [B, K, D].

    The target of region k is made from the teacher's tokens t_n of the same image:

        region     the mean of the tokens that lie in it
        mean       the mean of all tokens
        nearest    the token with the largest cosine to the student's region; no gradient flows through the choice
        attention  sum_n softmax_n(<q_k, t_n> / sqrt(D)) t_n, with learnt queries q [K, D]

    With "attention" the loss moves queries and student towards each other, so that regions may collapse onto tokens
    that are easy to match. All but "region" ignore where a token lies.
    """

    def __init__(self, target: str, latent_shape: tuple[int, ...], onto: Grid, teacher_grid: Grid) -> None:
        super().__init__()
        self.target = target
        self.count = onto[0] * onto[1]
        self.pool = Regrid(average, (latent_shape[1], latent_shape[2]), onto)
        self.pool_teacher = Regrid(average, teacher_grid, onto) if target == "region" else None
        self.channels = latent_shape[0]

    def forward(self, z_text: Tensor) -> Tensor:
        """Return the student's regions [B, K, C]."""
        return self.pool(rearrange(z_text, "b (c n) -> b n c", c=self.channels))

    def targets(self, tokens: Tensor, student: Tensor, queries: Tensor | None) -> Tensor:
        """Return the targets [B, K, D] of tokens [B, N, D], student [B, K, D], and queries [K, D] for "attention"."""
        if self.pool_teacher is not None:
            return self.pool_teacher(tokens)
        if queries is not None:
            return attend(queries, tokens)
        if self.target == "nearest":
            return nearest(student, tokens)
        return tokens.mean(1, keepdim=True).expand(-1, self.count, -1)


@torch.no_grad()
def most_similar(student: Tensor, tokens: Tensor) -> Tensor:
    """Return for each student row [B, K, D] the index of the most similar token of [B, N, D], the first of equals."""
    with without_autocast(tokens):
        s, t = (F.normalize(x, dim=-1) for x in upcast(student, tokens))
        return (s @ t.mT).argmax(-1)


def nearest(student: Tensor, tokens: Tensor) -> Tensor:
    """Return for each student row its most similar token, [B, K, D]."""
    # The gradient of an index adds in a fixed order; that of gather adds with atomics.
    rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    return tokens[rows, most_similar(student, tokens)]


def attend(queries: Tensor, tokens: Tensor) -> Tensor:
    """Return each query's weighted mean of an image's tokens, in float32 (float64 if an input is)."""
    scores = product(queries, tokens.mT) / tokens.shape[-1] ** 0.5
    return product(scores.softmax(-1), tokens)
