"""The blocks of published models that the engine can rewrite, and the reasons to leave others as they are.

A model is known by the exact classes of all its parts, by their names: neither timm nor the hub's code is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .positions import Positions

MODELS = {
    "dinov2.models.vision_transformer.DinoVisionTransformer": "hub",
    "timm.models.vision_transformer.VisionTransformer": "timm",
    "timm.models.eva.Eva": "eva",
}
BLOCKS = {
    "dinov2.layers.block.Block",
    "dinov2.layers.block.NestedTensorBlock",
    "timm.models.vision_transformer.Block",
    "timm.models.eva.EvaBlock",
}
ATTENTIONS = {
    "dinov2.layers.attention.Attention",
    "dinov2.layers.attention.MemEffAttention",
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.eva.EvaAttention",
}
MLPS = {
    "dinov2.layers.mlp.Mlp": ("fc1", "fc2"),
    "dinov2.layers.swiglu_ffn.SwiGLUFFN": ("w12", "w3"),
    "dinov2.layers.swiglu_ffn.SwiGLUFFNFused": ("w12", "w3"),
    "timm.layers.mlp.Mlp": ("fc1", "fc2"),
    "timm.layers.mlp.GluMlp": ("fc1", "fc2"),
    "timm.layers.mlp.SwiGLU": ("fc1_g", "fc2"),
}
NORMS = {"torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm"}
SCALES = {"dinov2.layers.layer_scale.LayerScale", "timm.layers.layer_scale.LayerScale"}
LINEAR, IDENTITY = "torch.nn.modules.linear.Linear", "torch.nn.modules.linear.Identity"
INACTIVE = {  # outside of training
    IDENTITY,
    "torch.nn.modules.dropout.Dropout",
    "dinov2.layers.drop_path.DropPath",
    "timm.layers.drop.DropPath",
}
ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations")  # modules of classes without weights
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnlikeError(Exception):
    """A model, or a part of it, computes something else than the engine would. The message says what."""


class Linear(NamedTuple):
    """A product's weight [out, in] and bias [out] or None."""

    weight: Tensor
    bias: Tensor | None


class Block(NamedTuple):
    """What a published block computes: x + scale1 proj(attention(qkv(norm1 x))), then its MLP in the same way."""

    norm1: Any
    qkv: Linear
    heads: int
    rotates_halves: bool
    proj: Linear
    scale1: Tensor | None
    norm2: Any
    up: Linear  # of a gated MLP the gate's rows, then the values'
    act: nn.Module
    is_gated: bool
    down: Linear
    scale2: Tensor | None


class Published(NamedTuple):
    """What the engine needs to know of a published model.

    blocks: the modules, each of which read_block knows. prefix: how many tokens come before the patches. has_class:
    whether the first of them is a class token. has_scale: whether any block has a LayerScale.
    """

    kind: str
    blocks: list[nn.Module]
    prefix: int
    has_class: bool
    has_scale: bool
    dtype: torch.dtype


def read_model(model: Any) -> Published:
    """Return what the engine needs of a model, or raise UnlikeError where it would not compute the same."""
    base: Any = type(model).__bases__[1] if isinstance(model, Positions) else type(model)
    kind = MODELS.get(f"{base.__module__}.{base.__qualname__}")
    if kind is None:
        raise UnlikeError(f"{base.__name__} is none of the official DINOv2 and timm's VisionTransformer and Eva")
    for name, part in model.named_modules():
        check_part(name or "the model", part, is_root=part is model)
    if getattr(model, "grad_checkpointing", False):
        raise UnlikeError("the model checkpoints its blocks")
    dtype = check_weights(model)
    blocks, has_scale = list(list_blocks(model)), False
    for number, block in enumerate(blocks):
        try:
            found = read_block(block)
        except UnlikeError as error:
            raise UnlikeError(f"block {number}: {error}") from None
        has_scale = has_scale or found.scale1 is not None or found.scale2 is not None
    if not blocks:
        raise UnlikeError("it has no blocks")
    prefix = 1 + getattr(model, "num_register_tokens", 0) if kind == "hub" else model.num_prefix_tokens
    return Published(kind, blocks, prefix, prefix > 0 and model.cls_token is not None, has_scale, dtype)


def list_blocks(model: Any) -> Iterator[Any]:
    """Yield the blocks. The official code may hold them in chunks, with identities in place of those before."""
    for block in model.blocks:
        if name_of(block) == "dinov2.models.vision_transformer.BlockChunk":
            yield from (part for part in block if name_of(part) != IDENTITY)
        else:
            yield block


def name_of(part: Any) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def check_part(name: str, part: Any, *, is_root: bool) -> None:
    """Raise UnlikeError if a module was changed by hooks, which the model's own are not, or by methods of its own."""
    if not is_root and any(getattr(part, hooks, None) for hooks in HOOKS):
        raise UnlikeError(f"{name} has hooks")
    for key in vars(part):
        if callable(getattr(type(part), key, None)):
            raise UnlikeError(f"{name} has a {key} of its own")


def check_weights(model: nn.Module) -> torch.dtype:
    """Return the dtype of all weights, or raise UnlikeError if they have several, or are no plain tensors."""
    weights = list(model.parameters())
    if any(type(p) is not nn.Parameter or type(p.data) is not Tensor for p in weights):
        raise UnlikeError("its weights are no plain tensors")
    dtypes, devices = {p.dtype for p in weights}, {p.device for p in weights}
    if len(dtypes) > 1 or len(devices) > 1:
        raise UnlikeError(f"its weights have several dtypes or devices: {', '.join(map(str, dtypes | devices))}")
    (dtype,) = dtypes
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise UnlikeError(f"its weights are {dtype}")
    return dtype


def read_block(block: Any) -> Block:
    if name_of(block) not in BLOCKS:
        raise UnlikeError(f"it is a {type(block).__name__}")
    attention, mlp = block.attn, block.mlp
    for name in ("drop_path1", "drop_path2"):
        expect(getattr(block, name), INACTIVE, name)
    scale1, scale2 = (read_scale(block, number) for number in (1, 2))
    qkv = read_attention(attention)
    up, act, is_gated, down = read_mlp(mlp)
    return Block(
        read_norm(block.norm1, "norm1"), qkv, attention.num_heads, bool(getattr(attention, "rotate_half", False)),
        read_linear(attention.proj, "proj"), scale1,
        read_norm(block.norm2, "norm2"), up, act, is_gated, down, scale2,
    )  # fmt: skip


def expect(part: Any, names: Any, what: str) -> None:
    if name_of(part) not in names:
        raise UnlikeError(f"{what} is a {type(part).__name__}")


def read_linear(part: Any, what: str) -> Linear:
    expect(part, {LINEAR}, what)
    return Linear(part.weight, part.bias)


def read_norm(norm: Any, what: str) -> Any:
    expect(norm, NORMS, what)
    if getattr(norm, "_fast_norm", False):
        raise UnlikeError(f"{what} is timm's fast norm")
    return norm


def read_scale(block: Any, number: int) -> Tensor | None:
    """Return LayerScale's factor [D] after the attention (1) or the MLP (2), or None where there is none."""
    if name_of(block) == "timm.models.eva.EvaBlock":
        gamma: Tensor | None = getattr(block, f"gamma_{number}")
        return gamma
    scale = getattr(block, f"ls{number}")
    expect(scale, SCALES | {IDENTITY}, f"ls{number}")
    return getattr(scale, "gamma", None)


def read_attention(attention: Any) -> Linear:
    """Return the product that gives queries, keys and values, in this order."""
    expect(attention, ATTENTIONS, "attn")
    for name in ("q_norm", "k_norm", "norm"):
        if hasattr(attention, name):
            expect(getattr(attention, name), {IDENTITY}, f"attn.{name}")
    for name in ("attn_drop", "proj_drop"):
        if isinstance(getattr(attention, name), nn.Module):  # the official code also has a number
            expect(getattr(attention, name), INACTIVE, f"attn.{name}")
    if getattr(attention, "gate", None) is not None:
        raise UnlikeError("attn has a gate")
    if getattr(attention, "num_kv_groups", 1) != 1:
        raise UnlikeError("attn has fewer heads of keys than of queries")
    if getattr(attention, "qkv", None) is None:
        parts = [read_linear(getattr(attention, name), f"attn.{name}") for name in ("q_proj", "k_proj", "v_proj")]
        qkv = Linear(torch.cat([part.weight for part in parts]), join([part.bias for part in parts], parts[0].weight))
    else:
        qkv = read_linear(attention.qkv, "attn.qkv")
        if getattr(attention, "q_bias", None) is not None:
            biases = attention.q_bias, attention.k_bias.to(attention.q_bias), attention.v_bias
            qkv = qkv._replace(bias=torch.cat(biases))
    width = qkv.weight.shape[0] // 3 // attention.num_heads
    if attention.scale != width**-0.5:
        raise UnlikeError(f"attn has a scale of {attention.scale} where {width**-0.5} is usual")
    return qkv


def join(biases: list[Tensor | None], weight: Tensor) -> Tensor | None:
    """Return the biases of products one after the other; one that has none adds zeros. weight: of the first."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for bias in biases])


def read_mlp(mlp: Any) -> tuple[Linear, nn.Module, bool, Linear]:
    """Return the first product, the activation, whether it gates the other half, and the last product."""
    expect(mlp, MLPS, "mlp")
    first, last = MLPS[name_of(mlp)]
    for name in ("drop", "drop1", "drop2"):
        if hasattr(mlp, name):
            expect(getattr(mlp, name), INACTIVE, f"mlp.{name}")
    if hasattr(mlp, "norm"):
        expect(mlp.norm, {IDENTITY}, "mlp.norm")
    up, down = read_linear(getattr(mlp, first, None), f"mlp.{first}"), read_linear(getattr(mlp, last), f"mlp.{last}")
    if first == "w12":
        return up, nn.SiLU(), True, down
    if type(mlp.act).__module__ not in ACTIVATIONS or list(mlp.act.parameters()) + list(mlp.act.buffers()):
        raise UnlikeError(f"mlp.act is a {type(mlp.act).__name__}")
    if first == "fc1_g":
        values = read_linear(mlp.fc1_x, "mlp.fc1_x")
        up = Linear(torch.cat([up.weight, values.weight]), join([up.bias, values.bias], up.weight))
        return up, mlp.act, True, down
    if getattr(mlp, "gate_last", False):
        raise UnlikeError("mlp has its gate last")
    return up, mlp.act, hasattr(mlp, "gate_last"), down
