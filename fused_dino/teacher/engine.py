"""The engine of a frozen teacher: exact rewrites of a published vision transformer.

Attention is one op, LayerNorm's affine and LayerScale are part of the weights beside them, and the last block computes
only the tokens that are wanted.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Linear, Published


class Engine(nn.Module):
    """Computes the tokens of a published model, from weights of its own.

    They are frozen parameters and no buffers: a wrapper such as DistributedDataParallel sends buffers in every step.
    shell is the published model without its blocks: its embedding, its last norm and its head.
    """

    def __init__(self, model: nn.Module, published: Published, dtype: torch.dtype) -> None:
        """Fold the published weights, in float32 or wider, and round them to dtype once."""
        super().__init__()
        self.kind, self.prefix, self.has_class = published.kind, published.prefix, published.has_class
        self.has_scale = any(block.scale1 is not None for block in published.blocks)
        self.shell: Any = copy_shell(model).to(dtype)
        self.blocks = nn.ModuleList(FoldedBlock(block, dtype) for block in published.blocks)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        """Return the normalised tokens [B, P + N, D] of images x, or the class token alone, [B, 1, D]."""
        tokens, ropes = self.embed(x)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, ropes[number], class_only and number == last)
        return self.shell.norm(tokens)  # type: ignore[no-any-return]

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the tokens of images before the first block, and the rotation of each block or None."""
        shell, depth = self.shell, len(self.blocks)
        if self.kind == "hub":
            return shell.prepare_tokens_with_masks(x), [None] * depth
        if self.kind == "timm":
            return shell.norm_pre(shell.patch_drop(shell._pos_embed(shell.patch_embed(x)))), [None] * depth
        tokens, rope = shell._pos_embed(shell.patch_embed(x))
        if rope is not None:
            rope = self.keep_prefix(rope)
        ropes = rope if rope is not None and shell.rope_mixed else [rope] * depth
        return shell.norm_pre(tokens), ropes

    def describe(self, model: nn.Module) -> list[str]:
        """Return a line for each rewrite. model: the published one."""
        weight = next(self.parameters())
        scaled = "folded into the product before it" if self.has_scale else "there is none"
        last = "of the class token alone where no patch token is wanted"
        if not self.has_class:
            last = "of every token, since the global feature is pooled from the patches"
        folded, published = (sum(p.nbytes for p in part.parameters()) / 1e6 for part in (self, model))
        return [
            f"engine: on, {len(self.blocks)} blocks in {str(weight.dtype).removeprefix('torch.')} on {weight.device}",
            "  attention            one scaled_dot_product_attention",
            "  LayerNorm's affine   folded into the product after it",
            f"  LayerScale           {scaled}",
            f"  the last block       {last}",
            f"  weights              {folded:,.1f} MB on {weight.device}, {published:,.1f} MB as published on the host",
        ]

    def keep_prefix(self, rope: Tensor) -> Tensor:
        """Return rotations [..., P + N, 2 d] of all tokens for those [..., N, 2 d] of patches: prefix tokens stay."""
        still = rope.new_zeros(*rope.shape[:-2], self.prefix, rope.shape[-1] // 2)
        return torch.cat([torch.cat([still, still + 1], -1), rope], -2)


class FoldedBlock(nn.Module):
    """A block whose products hold LayerNorm's affine and LayerScale."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.rotates_halves = block.heads, block.rotates_halves
        self.act, self.is_gated = block.act, block.is_gated
        self.eps = block.norm1.eps, block.norm2.eps
        self.set("qkv", fold_norm(block.qkv, block.norm1, dtype))
        self.set("proj", fold_scale(block.proj, block.scale1, dtype))
        self.set("up", fold_norm(block.up, block.norm2, dtype))
        self.set("down", fold_scale(block.down, block.scale2, dtype))

    def set(self, name: str, folded: Linear) -> None:
        for kind, x in folded._asdict().items():
            self.register_parameter(f"{name}_{kind}", None if x is None else nn.Parameter(x, requires_grad=False))

    def forward(self, x: Tensor, rope: Tensor | None = None, first_only: bool = False) -> Tensor:
        """Return tokens [B, N, D] for tokens, or the first of them, [B, 1, D]. rope: the tokens' rotations."""
        attended = self.attend(F.layer_norm(x, x.shape[-1:], eps=self.eps[0]), rope, first_only)
        x = (x[:, :1] if first_only else x) + attended
        hidden = F.linear(F.layer_norm(x, x.shape[-1:], eps=self.eps[1]), self.up_weight, self.up_bias)
        if self.is_gated:
            gate, values = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * values
        else:
            hidden = self.act(hidden)
        return x + F.linear(hidden, self.down_weight, self.down_bias)

    def attend(self, x: Tensor, rope: Tensor | None, first_only: bool) -> Tensor:
        width = self.proj_weight.shape[1]
        if first_only:
            weights, bias = self.qkv_weight, self.qkv_bias
            q = self.split(F.linear(x[:, :1], weights[:width], None if bias is None else bias[:width]), 1)[0]
            kv = self.split(F.linear(x, weights[width:], None if bias is None else bias[width:]), 2)
            k, v = kv.unbind(0)
            if rope is not None:
                k = rotate(k, rope, self.rotates_halves)
        else:
            qkv = self.split(F.linear(x, self.qkv_weight, self.qkv_bias), 3)
            q, k, v = qkv.unbind(0)
            if rope is not None:
                q, k = rotate(qkv[:2], rope, self.rotates_halves).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(out, self.proj_weight, self.proj_bias)

    def split(self, x: Tensor, parts: int) -> Tensor:
        """Return products [B, N, parts * heads * d] as [parts, B, heads, N, d]."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


def rotate(x: Tensor, rope: Tensor, halves: bool) -> Tensor:
    """Rotate queries or keys [..., heads, N, d] by sines and cosines [..., N, 2 d], as timm's apply_rot_embed_cat does.

    halves: whether numbers d / 2 apart are a pair, and not neighbours.
    """
    sin, cos = rope.chunk(2, dim=-1)
    if halves:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).type_as(x)


def fold_norm(linear: Linear, norm: Any, dtype: torch.dtype) -> Linear:
    """Return the product of a LayerNorm without its affine for that of one with it."""
    weight, bias = linear
    folded = weight.to(widest(weight.dtype, dtype), copy=True)
    if norm.bias is not None:
        shift = weight.double() @ norm.bias.double()
        bias = shift if bias is None else bias.double() + shift
    if norm.weight is not None:
        folded *= norm.weight.to(folded)
    return Linear(folded.to(dtype), None if bias is None else bias.to(dtype, copy=True))


def fold_scale(linear: Linear, scale: Tensor | None, dtype: torch.dtype) -> Linear:
    """Return the product whose rows are scaled, for one that a LayerScale follows."""
    weight, bias = (None if x is None else x.to(widest(x.dtype, dtype), copy=True) for x in linear)
    if scale is not None:
        weight *= scale.to(weight)[:, None]
        if bias is not None:
            bias *= scale.to(bias)
    return Linear(weight.to(dtype), None if bias is None else bias.to(dtype))


def widest(*dtypes: torch.dtype) -> torch.dtype:
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def copy_shell(model: Any) -> Any:
    """Return a copy of a published model without its blocks, and without the hooks that load it."""
    memo: dict[int, Any] = {id(model.blocks): nn.Sequential()}
    for part in model.modules():
        for hooks in (part._load_state_dict_pre_hooks, part._load_state_dict_post_hooks):
            memo[id(hooks)] = OrderedDict()
    return copy.deepcopy(model, memo)
