"""The eager recipe that the package replaces, written anew from its formulas: the truth of the parity tests."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(x: Tensor, size: int) -> Tensor:
    mean, std = (torch.tensor(v, dtype=x.dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    return F.interpolate(((x + 1) / 2 - mean) / std, size=(size, size), mode="bilinear", align_corners=False)


def cosine(y: Tensor, g: Tensor) -> Tensor:
    return (1 - (F.normalize(y, dim=-1) * F.normalize(g, dim=-1)).sum(-1)).mean()


def mse(y: Tensor, g: Tensor, normalize: bool = True, whiten: bool = False, eps: float = 1e-5) -> Tensor:
    if normalize:
        y, g = F.normalize(y, dim=-1), F.normalize(g, dim=-1)
    if whiten:
        y, g = ((x - x.mean(0)) / (x.std(0) + eps) for x in (y, g))
    return F.mse_loss(y, g)


def vicreg(y, g, inv_w=25.0, var_w=10.0, cov_w=0.5, gamma=1.0, eps=1e-4) -> tuple[Tensor, tuple[Tensor, ...]]:
    inv = (y - g).pow(2).mean()
    var = torch.relu(gamma - y.var(dim=0, unbiased=False).add(eps).sqrt()).mean()
    yc = y - y.mean(dim=0, keepdim=True)
    c = yc.t() @ yc / max(len(y) - 1, 1)
    cov = (c - torch.diag(torch.diag(c))).pow(2).mean()
    return inv_w * inv + var_w * var + cov_w * cov, (inv, var, cov)


def head(in_dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, out_dim))


class Recipe(nn.Module):
    """The attributes that the recipe adds to the user's model, and its two methods."""

    def __init__(self, teacher, in_dim, hidden, size, loss_type, latent_shape=None, grid=(2, 2), warmup=5000):
        super().__init__()
        self.dino_model = teacher.eval().requires_grad_(False)
        self.dino_t_head = head(in_dim, hidden, teacher.embed_dim)
        if latent_shape:
            self.dino_local_head = head(latent_shape[0], 256, teacher.embed_dim)
        self.size, self.loss_type, self.latent_shape, self.grid, self.warmup = (
            size,
            loss_type,
            latent_shape,
            grid,
            warmup,
        )
        self.steps = 0

    def compute_dino_loss(self, z: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            features = self.dino_model(preprocess(x, self.size))
        g, tokens = features["global"], features["patch"]
        y = self.dino_t_head(z)
        logs = {}
        if self.loss_type == "vicreg":
            loss, terms = vicreg(y, g)
            logs = dict(zip(("dino_vic_inv", "dino_vic_var", "dino_vic_cov"), terms, strict=True))
        else:
            loss = {"cosine": cosine, "mse": mse}[self.loss_type](y, g)
        logs["dino_global"] = loss
        if self.latent_shape:
            c, h, w = self.latent_shape
            pooled = F.adaptive_avg_pool2d(rearrange(z, "b (c h w) -> b c h w", c=c, h=h, w=w), self.grid)
            y_local = self.dino_local_head(rearrange(pooled, "b c h w -> b (h w) c"))
            target = tokens.mean(1, keepdim=True).expand_as(y_local)
            patch = 1 - F.cosine_similarity(F.normalize(y_local, dim=-1), F.normalize(target, dim=-1), dim=-1).mean()
            loss = loss + 0.2 * patch
            logs["dino_patch"] = patch
        return loss, logs

    def loss_dict(self, z: Tensor, x: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        loss, logs = self.compute_dino_loss(z, x)
        return {"loss_dino": 0.2 * min(1.0, self.steps / self.warmup) * loss, **logs}
