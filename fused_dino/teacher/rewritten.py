"""A backbone whose published model an engine computes, if the engine knows the model exactly.

The published weights stay on the host, in their stored dtype, and out of the module: a wrapper such as
DistributedDataParallel refuses a module with parameters on two kinds of devices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hidden import FRESH, keeps_values, own
from ..live import dtype_of
from .blocks import UnlikeError, read_model
from .engine import Engine
from .pixels import find_obstacle

HOST = torch.device("cpu")
FOLDED = "resized and normalised by the patch embedding, where a patch has a window of whole pixels"


class Rewritten(nn.Module):
    """Holds `model` as a submodule, or outside of its submodules where `engine` computes it."""

    model: Any
    engine: Any  # Engine or None
    refused: str  # why there is no engine
    takes_raw: bool  # whether resize and normalisation may be folded into the patch embedding

    @torch.no_grad()
    def rewrite(self, enabled: bool, dtype: torch.dtype | None) -> None:
        """Build the engine in dtype, if it is enabled and the model is known exactly; else cast the model to dtype."""
        self.engine, self.refused = None, ""
        try:
            if not enabled:
                raise UnlikeError("engine=False")
            published = read_model(self.model)
        except UnlikeError as error:
            self.refused = str(error)
            self.model.to(dtype=dtype)
            return
        model = self.model.requires_grad_(False).eval()
        device = next(model.parameters()).device
        to_host(model)
        dtype = published.dtype if dtype is None else dtype
        if holds(dtype, published.dtype):
            model.to(dtype=dtype)
        self.engine = Engine(model, published, dtype)
        if device.type != "meta":
            self.engine.to(device)
        del self.model
        self.__dict__["model"] = model
        model.register_load_state_dict_post_hook(self._fold_what_was_loaded)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model" and name in self.__dict__:
            self.engine, self.refused = None, "the model was replaced after construction"
        super().__setattr__(name, value)

    @property
    def computing(self) -> Any:
        """The module with the embedding, the last norm and the head that are computed with."""
        return self.model if self.engine is None else self.engine.shell

    @torch.no_grad()
    def refold(self) -> None:
        """Fold weights of `model` anew after they were written in place. Loading and casting do so themselves.

        Raises:
            ValueError: If the model is no longer one that the engine knows exactly.
        """
        if self.engine is None:
            return
        to_host(self.model)
        weight = next(self.engine.parameters())
        try:
            published = read_model(self.model)
        except UnlikeError as error:
            raise ValueError(f"the model cannot be folded any more, build it with engine=False: {error}") from None
        has_memory = not weight.is_meta or next(self.model.parameters()).is_meta
        new = Engine(self.model, published, weight.dtype if has_memory else published.dtype)
        if not has_memory:
            self.engine = new
            return
        for part in self.engine.modules():
            own(part)
        for old, x in zip(tensors_of(self.engine), tensors_of(new), strict=True):
            old.copy_(x)

    def _fold_what_was_loaded(self, *_: Any) -> None:
        self.refold()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.engine is None:
            return super()._apply(fn, recurse)
        before = dtype_of(self.engine)
        keeps, _ = keeps_values(fn)
        super()._apply(fn, recurse)

        def publish(x: Tensor) -> Tensor:
            if x.is_meta or not keeps:
                x = fn(x)
                return x if x.is_meta else x.to(HOST)
            dtype = fn(x.new_empty(0)).dtype
            return x.to(dtype) if holds(dtype, x.dtype) else x

        self.model._apply(publish)
        if dtype_of(self.engine) != before:
            self.refold()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        _, missing, unexpected, errors = args
        its = f"{prefix}model."
        weights = {key: x for key, x in state_dict.items() if key.startswith(its)}
        if self.engine is None:
            if not weights and FRESH not in self.__dict__:
                # A checkpoint as state_dict() leaves it: strict loading finds what is loaded already.
                state_dict.update(self.model.state_dict(prefix=its, keep_vars=True))
        else:
            if weights or FRESH in self.__dict__:
                own_names = {key.removeprefix(its): state_dict.pop(key) for key in weights}
                assign = local_metadata.get("assign_to_params_buffers", False)
                try:
                    found = self.model.load_state_dict(own_names, strict=False, assign=assign)
                    missing += [its + name for name in found.missing_keys]
                    unexpected += [its + name for name in found.unexpected_keys]
                except RuntimeError as error:
                    errors.append(str(error))
            state_dict.update(self.engine.state_dict(prefix=f"{prefix}engine.", keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def explain(self) -> str:
        """Return which exact rewrites of the model hold, and why the others do not."""
        lines = [f"engine: off, the model runs as it was published: {self.refused}"]
        if self.engine is not None:
            lines = self.engine.describe(self.model)
        if self.takes_raw:
            lines.append(f"  raw images           {find_obstacle(self) or FOLDED}")
        return "\n".join(lines)

    @torch.no_grad()
    def check(self, images: Tensor) -> str:
        """Compare the features of images with those of the published model, in the dtype of its weights.

        Args:
            images (Tensor): Normalised floats, as ``forward`` takes them.

        Returns:
            str: The cosines of global and patch features with the published model's, and the largest differences. They
            include what a narrower dtype costs. The published weights are on the device for as long as this takes.

        Raises:
            ValueError: If the images do not fit.
        """
        if self.engine is None:
            return f"the model runs as it was published, and there is nothing to compare: {self.refused}"
        device = next(self.engine.parameters()).device
        published = copy.copy(self)
        published.__dict__.update(_modules={"engine": None, "model": self.model.to(device)}, compiled=None)
        try:
            expected, found = published(images), self(images)
        finally:
            to_host(self.model)
        dtypes = f"{dtype_of(self.engine)} with the published weights in {dtype_of(self.model)}"
        lines = [f"{len(images)} images, {dtypes}:".replace("torch.", "")]
        for name in ("global", "patch"):
            if found[name] is not None:
                lines.append(f"  {name:<6}  {compare(found[name].double().cpu(), expected[name].double().cpu())}")
        return "\n".join(lines)


def compare(found: Tensor, expected: Tensor) -> str:
    """Say how far features [..., D] are from those that are expected."""
    cosine = F.cosine_similarity(found, expected, dim=-1)
    worst = (found - expected).abs().max()
    return f"cosine {cosine.mean():.6f} on average, {cosine.min():.6f} at least; largest error {worst:.1e}"


def to_host(model: nn.Module) -> None:
    """Move weights to the host. A device without memory has none to move."""
    model._apply(lambda x: x if x.is_meta else x.to(HOST))


def holds(dtype: torch.dtype, values: torch.dtype) -> bool:
    """Whether a dtype holds every value of another floating one."""
    return values.is_floating_point and torch.promote_types(dtype, values) == dtype


def tensors_of(engine: Engine) -> list[Tensor]:
    return [*engine.parameters(), *engine.buffers()]
