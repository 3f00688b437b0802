"""The training of a text head under `DinoSupervision`, and its test: held-out captions retrieve held-out crops."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dino import DinoSupervision, DINOv2Backbone

from .data import Photo, bag_of_words, crop
from .ranks import Ranks
from .teacher import IMG_SIZE

LOSSES = ("cosine", "mse", "vicreg")
BUCKETS, LATENT, HIDDEN = 1024, 512, 1024
CROPS_PER_STEP = 18
WARMUP_STEPS = 15
LEARNING_RATE = 3e-4
EXAM_ROUNDS = 8  # held-out crops of each photograph


@dataclass(frozen=True)
class Settings:
    loss: str = "cosine"
    steps: int = 80
    seconds: float | None = None
    seed: int = 0
    device: str = "cpu"


class Student(nn.Module):
    """A text head from hashed words to a latent, with a supervision, and one optimizer over both."""

    def __init__(self, teacher: DINOv2Backbone, settings: Settings) -> None:
        super().__init__()
        # Normalised MSE is 2(1 - cos) / D: with alpha 1 its gradients would drown in Adam's eps.
        alpha = teacher.embed_dim / 2 if settings.loss == "mse" else 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = nn.Sequential(nn.Linear(BUCKETS, LATENT), nn.GELU(), nn.Linear(LATENT, LATENT))
            self.supervision = DinoSupervision(
                LATENT,
                teacher=teacher,
                img_size=IMG_SIZE,
                loss_type=settings.loss,
                alpha=alpha,
                warmup_steps=WARMUP_STEPS,
                hidden_dim=HIDDEN,
            )
        self.device = settings.device
        self.to(self.device)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)

    def words(self, captions: list[str]) -> Tensor:
        return bag_of_words(captions, BUCKETS).to(self.device)

    def forward(self, words: Tensor, features: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.supervision.loss_dict(self.head(words), features=features)

    def learn(self, captions: list[str], features: Mapping[str, Any], parallel: nn.Module | None = None) -> float:
        """Take a step of AdamW and return the loss before it, without alpha and warm-up. parallel: this in DDP."""
        losses = (parallel or self)(self.words(captions), features)
        self.optimizer.zero_grad()
        losses["loss_dino"].backward()
        self.optimizer.step()
        return losses["dino_global"].item()

    @torch.no_grad()
    def read(self, captions: list[str]) -> Tensor:
        """Return the captions in the teacher's space, [len(captions), D]."""
        return self.supervision.projector(self.head(self.words(captions)))


@dataclass
class Course:
    """The record of a training run, which may have been interrupted."""

    losses: list[float] = field(default_factory=list)
    control_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def train(
    student: Student,
    control: Student,
    photos: list[Photo],
    settings: Settings,
    on_step: Callable[[float], None],
    ranks: Ranks | None = None,
) -> Course:
    """Train both students on the same crops, each rank on its part. `control` gets captions of random photographs.

    The random captions are drawn anew at every step and tell nothing about the crop, so the control's result is chance.
    Fixed wrong captions would teach it to avoid the right answer.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    course = Course()
    ranks = ranks or Ranks()
    parallel, parallel_control = ranks.parallel(student), ranks.parallel(control)
    start = time.perf_counter()
    try:
        for _ in range(settings.steps):
            crops, captions, strangers = map(ranks.own_part, lesson(photos, generator))
            features = student.supervision.encode(crops)
            course.losses.append(ranks.mean(student.learn(captions, features, parallel)))
            course.control_losses.append(ranks.mean(control.learn(strangers, features, parallel_control)))
            course.seconds = ranks.mean(time.perf_counter() - start)  # so that all stop at the same step
            on_step(course.losses[-1])
            if settings.seconds is not None and course.seconds >= settings.seconds:
                break
    except KeyboardInterrupt:
        course.interrupted = True
    course.seconds = time.perf_counter() - start
    return course


def lesson(photos: list[Photo], generator: torch.Generator) -> tuple[Tensor, list[str], list[str]]:
    """Return crops of the photographs in turn, a caption for each crop, and a caption of a random photograph."""

    def pick(length: int) -> int:
        return int(torch.randint(length, (), generator=generator))

    rounds = -(-CROPS_PER_STEP // len(photos))
    order = [i for _ in range(rounds) for i in torch.randperm(len(photos), generator=generator).tolist()]
    chosen = [photos[i] for i in order[:CROPS_PER_STEP]]
    anyone = [photos[pick(len(photos))] for _ in chosen]
    crops = torch.stack([crop(photo.part(held_out=False), IMG_SIZE, generator) for photo in chosen])
    captions, strangers = ([p.learn[pick(len(p.learn))] for p in group] for group in (chosen, anyone))
    return crops, captions, strangers


@dataclass(frozen=True)
class Result:
    """The result of an exam. similarity: cosines [captions, photographs], averaged over the held-out crops."""

    top1: float
    per_photo: list[float]
    similarity: Tensor


class Exam:
    """A test of retrieval: in each round, each held-out caption picks a photograph by a held-out crop of each."""

    def __init__(self, photos: list[Photo], student: Student, settings: Settings) -> None:
        generator = torch.Generator().manual_seed(settings.seed + 1)
        self.captions = [caption for photo in photos for caption in photo.held_out]
        self.owner = torch.tensor([i for i, photo in enumerate(photos) for _ in photo.held_out])
        self.chance = 1 / len(photos)
        crops = []  # EXAM_ROUNDS x [P, D]
        for _ in range(EXAM_ROUNDS):
            images = torch.stack([crop(photo.part(held_out=True), IMG_SIZE, generator) for photo in photos])
            encoded = [student.supervision.encode(part)["global"] for part in images.split(CROPS_PER_STEP)]
            crops.append(torch.cat(encoded).float().cpu())
        self.crops = F.normalize(torch.stack(crops), dim=-1)  # [rounds, P, D]

    def sit(self, student: Student) -> Result:
        read = F.normalize(student.read(self.captions).float().cpu(), dim=-1)
        similarity = torch.einsum("cd,rpd->crp", read, self.crops)
        right = (similarity.argmax(-1) == self.owner[:, None]).float().mean(1)  # [captions]
        photos = range(self.crops.shape[1])
        per_photo = [right[self.owner == photo].mean().item() for photo in photos]
        return Result(right.mean().item(), per_photo, similarity.mean(1))
