"""A text-to-image model for mmengine's Runner, and pairs of text and images to train it on."""

import torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn
from torch.utils.data import Dataset


@MODELS.register_module()
class TextToImage(BaseModel):
    """A text encoder whose latent a flow model would take; `dino` aligns it with the image's features."""

    def __init__(self, text_dim: int, latent_dim: int, dino: dict, data_preprocessor: dict | None = None) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.text = nn.Linear(text_dim, latent_dim)
        self.dino = MODELS.build(dino)

    def text2image_loss(self, text: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what mmengine adds up (every key with "loss" in it) and what it logs."""
        z_text = self.text(text)
        losses = {"loss_flow": z_text.square().mean()}  # your own loss
        losses.update(self.dino.loss_dict(z_text, images))
        return losses

    def forward(self, text: torch.Tensor, images: torch.Tensor, mode: str = "tensor") -> object:
        return self.text2image_loss(text, images) if mode == "loss" else self.text(text)


@DATASETS.register_module()
class RandomPairs(Dataset):
    """Pairs of a text's features and an image in -1..1."""

    def __init__(self, count: int, text_dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.texts = torch.randn(count, text_dim, generator=generator)
        self.images = torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"text": self.texts[i], "images": self.images[i]}
