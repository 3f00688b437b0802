"""The engine of a frozen teacher: exact rewrites of a published vision transformer.

Attention is one op, LayerNorm's affine and LayerScale are part of the adjacent weights, and the last block computes
only the tokens that are read.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import Block, Linear, Published, read_block


class Engine(nn.Module):
    """Computes the tokens of a published model, from weights of its own.

    They are frozen parameters and no buffers: a wrapper such as DistributedDataParallel sends buffers in every step.
    shell is the published model without its blocks: its embedding, its last norm and its head.
    """

    def __init__(self, model: nn.Module, published: Published, dtype: torch.dtype) -> None:
        """Fold the published weights, in float32 or wider, and round them to dtype once."""
        super().__init__()
        self.kind, self.prefix, self.has_class = published.kind, published.prefix, published.has_class
        self.has_scale = published.has_scale
        self.shell: Any = copy_shell(model).to(dtype)
        self.blocks = nn.ModuleList(FoldedBlock(read_block(block), dtype) for block in published.blocks)
        self.requires_grad_(False).eval()

    def forward(
        self,
        x: Tensor,
        layers: Mapping[int, int],
        wants_last: bool = True,
        wants_patch: bool = True,
        grad_checkpointing: bool = False,
    ) -> tuple[Tensor | None, dict[int, tuple[Tensor, Tensor]]]:
        """Return the last tokens of images x, and (global, patch) of chosen layers, all by the last norm.

        layers: each as it was given -> its block. The last tokens are [B, P + N, D], or [B, 1, D] if the class token
        alone is read, or None. No block runs after the last one that is read. A model without a class token has the
        mean of its patch tokens in place of it. grad_checkpointing: whether a backward runs each block again from its
        input.
        """
        last = len(self.blocks) - 1
        needed = {*layers.values(), *([last] if wants_last else [])}
        class_only = self.has_class and not wants_patch and last not in layers.values()
        tokens, ropes = self.embed(x)
        found: dict[int, Tensor] = {}
        runs_again = grad_checkpointing and torch.is_grad_enabled()
        for number in range(max(needed) + 1):
            block: Any = self.blocks[number]
            if runs_again:
                block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            tokens = block(tokens, ropes[number], class_only and number == last)
            if number in needed:
                found[number] = self.shell.norm(tokens)
        return found.get(last), {n: self.take(found[block]) for n, block in layers.items()}

    def take(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        patch = tokens[:, self.prefix :]
        return tokens[:, 0] if self.has_class else patch.mean(1), patch

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
        last = "of the class token alone where no patch token is needed"
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
        self.qkv = fold_norm(block.qkv, block.norm1, dtype)
        self.proj = fold_scale(block.proj, block.scale1, dtype)
        self.up = fold_norm(block.up, block.norm2, dtype)
        self.down = fold_scale(block.down, block.scale2, dtype)

    def forward(self, x: Tensor, rope: Tensor | None = None, first_only: bool = False) -> Tensor:
        """Return tokens [B, N, D] for tokens, or the first of them, [B, 1, D]. rope: the tokens' rotations."""
        attended = self.attend(F.layer_norm(x, x.shape[-1:], eps=self.eps[0]), rope, first_only)
        x = (x[:, :1] if first_only else x) + attended
        hidden = self.up(F.layer_norm(x, x.shape[-1:], eps=self.eps[1]))
        if self.is_gated:
            gate, values = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * values
        else:
            hidden = self.act(hidden)
        return x + self.down(hidden)

    def attend(self, x: Tensor, rope: Tensor | None, first_only: bool) -> Tensor:
        if first_only:
            width, (weight, bias) = self.proj.in_features, (self.qkv.weight, self.qkv.bias)
            of_query, of_rest = (None, None) if bias is None else (bias[:width], bias[width:])
            q = self.split(F.linear(x[:, 0], weight[:width], of_query).unsqueeze(1), 1)[0]
            k, v = self.split(F.linear(x, weight[width:], of_rest), 2).unbind(0)
            k = k if rope is None else rotate(k, rope, self.rotates_halves)
        else:
            qkv = self.split(self.qkv(x), 3)
            v = qkv[2]
            q, k = (qkv[:2] if rope is None else rotate(qkv[:2], rope, self.rotates_halves)).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

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


def fold_norm(linear: Linear, norm: Any, dtype: torch.dtype) -> nn.Linear:
    """Return the product that a LayerNorm without its affine needs in place of the one after it."""
    weight, bias = linear
    if norm.bias is not None:
        shift = weight.double() @ norm.bias.double()
        bias = shift if bias is None else bias.double() + shift
    if norm.weight is not None:
        acc_dtype = widest(weight.dtype, dtype)
        weight = weight.to(acc_dtype) * norm.weight.to(acc_dtype)
    return make_linear(weight, bias, dtype)


def fold_scale(linear: Linear, scale: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """Return the product whose rows are scaled, for one that a LayerScale follows."""
    weight, bias = linear
    if scale is not None:
        factor = scale.to(widest(weight.dtype, dtype))
        weight, bias = weight * factor[:, None], None if bias is None else bias * factor
    return make_linear(weight, bias, dtype)


def make_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """Return a module with copies of a weight [out, in] and a bias in dtype."""
    linear = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype, copy=True))
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype, copy=True))
    return linear


def widest(*dtypes: torch.dtype) -> torch.dtype:
    acc_dtype = torch.float32
    for dtype in dtypes:
        acc_dtype = torch.promote_types(acc_dtype, dtype)
    return acc_dtype


def copy_shell(model: Any) -> Any:
    """Return a copy of a published model without its blocks, and without the hooks that load it."""
    memo: dict[int, Any] = {id(model.blocks): nn.Sequential()}
    for part in model.modules():
        for hooks in (part._load_state_dict_pre_hooks, part._load_state_dict_post_hooks):
            memo[id(hooks)] = OrderedDict()
    return copy.deepcopy(model, memo)
