"""Features of chosen blocks of a model from one forward, as the official `get_intermediate_layers` returns them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor, nn

from .embedding import caller
from .transformers_model import CLASSES, is_known

NORMS = ("layernorm", "norm", "post_layernorm")  # the last norm, by its names in transformers


class Layers(NamedTuple):
    """The chosen layers of a model: each as it was given -> the number of its block, from 0."""

    blocks: dict[int, int]
    depth: int
    kind: str  # of the model: "hub", "timm" or "transformers"
    waiting: dict[int, dict[int, Tensor]]  # by thread, the outputs of blocks that a Tap keeps


class Tap:
    """A forward hook that keeps the output of a block until its caller takes it.

    transformers' own hooks for `output_hidden_states` cannot be pickled. They are made in the first forward, which no
    compiler can trace.
    """

    def __init__(self, block: int, waiting: dict[int, dict[int, Tensor]]) -> None:
        self.block, self.waiting = block, waiting

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        found = self.waiting.get(caller())
        if found is not None:
            found[self.block] = output[0] if isinstance(output, tuple) else output


def find_layers(layers: Any, model: Any) -> Layers | None:
    """Check the argument `layers` of DINOv2Backbone. A negative number counts from the end."""
    if layers is None:
        return None
    several = isinstance(layers, Sequence) and not isinstance(layers, (str, bytes))
    if not several or not layers or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in layers):
        raise ValueError(f"layers must be None or a sequence of ints such as (-4, -1), got {layers!r}")
    kind, depth = find_blocks(model)
    if not all(-depth <= n < depth for n in layers):
        raise ValueError(f"layers must be from {-depth} to {depth - 1}, the model's blocks, got {layers!r}")
    chosen = Layers({int(n): int(n) % depth for n in layers}, depth, kind, {})
    if kind == "transformers":
        parts = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)
        for block in {*chosen.blocks.values()} - {depth - 1}:
            parts[block].register_forward_hook(Tap(block, chosen.waiting))
    return chosen


def find_blocks(model: Any) -> tuple[str, int]:
    """Return the kind of a model and how many blocks it has, or raise ValueError where it gives no features of them."""
    if is_known(model):
        return "transformers", int(model.config.num_hidden_layers)
    run = getattr(model, "forward_intermediates", None)
    if run is not None and {"norm", "return_prefix_tokens"} <= inspect.signature(run).parameters.keys():
        return "timm", len(model.blocks)
    if hasattr(model, "get_intermediate_layers") and hasattr(model, "n_blocks"):
        return "hub", int(model.n_blocks)
    raise ValueError(
        f"layers must be left out: model {type(model).__name__} gives no features of its blocks, as these do: the "
        f"official DINOv2, timm's vision transformers, and of transformers' models {', '.join(CLASSES.values())}"
    )


def wants(name: str, needs: frozenset[str] | None) -> bool:
    """Whether features of this name are read. needs: the names of those that are, or None for all."""
    return needs is None or name in needs


def wants_last(needs: frozenset[str] | None, layers: Layers | None) -> bool:
    """Whether features of the last block are read: not if the chosen layers are read alone."""
    return layers is None or wants("global", needs) or wants("patch", needs) or not wants("layers", needs)


def run_layers(
    model: Any, layers: Layers, prefix: int, options: Mapping[str, Any], x: Tensor
) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
    """Run a model once on images x. Return its features, and (global, patch) of each layer as it was given.

    prefix: how many tokens come before the patches; options: of a call of transformers' models. Each layer has the
    model's last norm. Without a class token the mean of the patch tokens stands for it.
    """
    last = layers.depth - 1
    earlier = sorted({*layers.blocks.values()} - {last})
    if layers.kind == "hub":
        several = model.get_intermediate_layers(x, n=[*earlier, last], return_class_token=True, norm=True)
        found = {block: (token, patch) for block, (patch, token) in zip([*earlier, last], several, strict=True)}
        out: Any = dict(zip(("global", "patch"), found[last], strict=True))
        return out, {n: found[block] for n, block in layers.blocks.items()}
    if layers.kind == "timm":
        how: dict[str, Any] = {"norm": True, "output_fmt": "NLC", "return_prefix_tokens": prefix > 0}
        run = model.forward_intermediates
        out, several = run(x, indices=earlier, **how) if earlier else (model.forward_features(x), [])
        tokens: dict[int, Any] = {
            block: (y[1], y[0]) if prefix else (None, y) for block, y in zip(earlier, several, strict=True)
        }
        tokens[last] = out[:, :prefix], out[:, prefix:]
    else:
        ends = layers.waiting[caller()] = {}
        try:
            out, norm = model(x, **options), find_norm(model)
        finally:
            del layers.waiting[caller()]
        ends = {block: norm(ends[block]) for block in earlier} | {last: out["last_hidden_state"]}
        tokens = {block: (y[:, :prefix], y[:, prefix:]) for block, y in ends.items()}
    has_class = prefix and getattr(model, "cls_token", True) is not None  # prefix tokens may all be registers
    found = {block: (first[:, 0] if has_class else patch.mean(1), patch) for block, (first, patch) in tokens.items()}
    return out, {n: found[block] for n, block in layers.blocks.items()}


def find_norm(model: Any) -> Any:
    """Return the norm after the last block of a known model of transformers."""
    core = getattr(model, "vision_model", model)  # SigLIP's before transformers 5
    return next(getattr(core, name) for name in NORMS if hasattr(core, name))
