"""Files of weights, read without running their code, under the official names of DINOv2.

A path is a file, or a folder as transformers' `save_pretrained` writes it, in one piece or in shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..validation import check_triple

IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PREPROCESSOR = "preprocessor_config.json"
PATCH_KEY = "patch_embed.proj.weight"
THEIR_PATCH_KEY = "embeddings.patch_embeddings.projection.weight"
OFFICIAL_NAMES = (  # of transformers' names, of its versions 4 and 5
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
)
JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}  # rows of one weight
GIVE_MODEL = "which loads by transformers: give model={0}.from_pretrained(...)"
MARKS = (  # a tensor that only another model has, and what that is
    (r"\blora_[AB]\b", "a LoRA adapter without the weights that it adapts"),
    (r"\.layernorm_before\.", "a plain ViT of transformers, as ViTModel is"),
    (r"\bembeddings\.class_embedding$", "a CLIP of transformers"),
    (r"\bembeddings\.patch_embedding\.", f"a SigLIP of transformers, {GIVE_MODEL.format('SiglipVisionModel')}"),
    (r"\bembeddings\.patch_embeddings\.weight$", f"a DINOv3 of transformers, {GIVE_MODEL.format('DINOv3ViTModel')}"),
    (r"\brope_embed\.|\.gamma_1$", "a DINOv3, EVA or BEiT"),
    (r"\bvisual\.", "a CLIP"),
    (r"\blayer1\.0\.conv1\.", "a ResNet"),
    (r"\bstages\.0\.", "a ConvNeXt, or another network in stages"),
    (r"\b(down_blocks|transformer_blocks)\.0\.", "a part of a diffusion model"),
    (r"\b(embed_tokens|word_embeddings|wte)\.weight$", "a language model"),
)
OTHER_FORMATS = {".h5": "TensorFlow's", ".msgpack": "Flax's", ".onnx": "ONNX", ".gguf": "GGUF", ".npz": "NumPy's"}
OTHER_BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS in the file's place: `git lfs pull` fetches the file",
    b"\x89HDF": "a file of TensorFlow's format",
    b"<": "a page of HTML or XML",
}


def find_file(path: Path) -> Path:
    """Return the file to read for a path that the argument `weights` names."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"weights: there is no file or folder {str(path)!r}")
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    found = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"weights: the folder {str(path)!r} needs one of {', '.join(IN_FOLDERS)}; it has {found}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the vision transformer in a file, under official or timm's names, or raise ValueError with what it holds.

    The wrappers state_dict, model and teacher, a prefix such as "backbone." and the chunks of blocks that the official
    training saves are taken off.
    """
    if re.search(r"-\d{5}-of-(?!00001)\d{5}\.", path.name):
        raise ValueError(f"it is one shard of several; {str(path.parent)!r}, their folder, would do")
    state = read_tensors(path)
    for wrapper in ("state_dict", "model", "teacher"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    state = {key: value for key, value in state.items() if isinstance(key, str)}
    named = [(key, ending) for key in state for ending in (PATCH_KEY, THEIR_PATCH_KEY) if key.endswith(ending)]
    prefixes = {key.removesuffix(ending) for key, ending in named}
    if len(prefixes) != 1:
        raise ValueError(
            f"it holds {len(prefixes)} vision transformers, by their {PATCH_KEY}, instead of one; it is "
            f"{what_it_is(state) or says_config(path) or 'unknown'}; its first tensors: {', '.join(list(state)[:3])}"
        )
    prefix = prefixes.pop()
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if other := what_it_is(state):
        raise ValueError(f"it is {other}")
    if THEIR_PATCH_KEY in state:
        return official_names(state)
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}


def read_tensors(path: Path) -> dict[Any, Any]:
    """Return what a file holds, or the files that an index of shards names."""
    if path.name.endswith(".index.json"):
        names = read_json(path).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError("it is an index without a weight_map, the shard of each tensor")
        shards = sorted(set(map(str, names.values())))
        if missing := [name for name in shards if not (path.parent / name).is_file()]:
            raise FileNotFoundError(f"weights: {str(path)!r} names {', '.join(missing)}, which is missing")
        return {key: value for name in shards for key, value in read_tensors(path.parent / name).items()}
    with path.open("rb") as file:
        head = file.read(32)
    if not head:
        raise ValueError("it is empty")
    for beginning, what in OTHER_BEGINNINGS.items():
        if head.startswith(beginning):
            raise ValueError(f"it is {what}")
    if path.suffix in OTHER_FORMATS:
        raise ValueError(f"it is of {OTHER_FORMATS[path.suffix]} format; .safetensors or torch.save's would do")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        from safetensors.torch import load_file

        return load_file(path)
    if not head.startswith((b"PK", b"\x80")):  # a zip, or the pickle that torch saved before its version 1.6
        raise ValueError(f"it is neither .safetensors nor torch.save's; it begins with {head[:16]!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can be broken in any way, and torch's words advise to run its code
        found = re.search(r"GLOBAL (\S+)", str(error))
        fault = f"it holds a {found[1]}, and not tensors alone" if found else "it is damaged"
        raise ValueError(f"{fault}; what torch.save writes of a state_dict() would do") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__} in place of tensors by name")
    return dict(state)


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a DINOv2 of transformers under the official names, its queries, keys and values in one weight."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in OFFICIAL_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for whole, parts in JOINED.items():
        for first in [key for key in renamed if f".{parts[0]}." in key]:
            keys = [first.replace(parts[0], part) for part in parts]
            if missing := [key for key in keys if key not in renamed]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            renamed[first.replace(parts[0], whole)] = torch.cat([renamed.pop(key) for key in keys])
    renamed.setdefault("mask_token", torch.zeros(1))  # timm knows official names by it, and leaves it out
    return renamed


def what_it_is(state: Mapping[str, Any]) -> str | None:
    """Return what a model is that is no DINOv2, by the names of its tensors, or None."""
    return next((what for pattern, what in MARKS if any(re.search(pattern, key) for key in state)), None)


def says_config(path: Path) -> str | None:
    """Return the model that config.json beside a file names, or None."""
    config = read_config(path)
    names = [*(config.get("architectures") or ()), config.get("_class_name"), config.get("model_type")]
    return next((f"a {name}, by {path.parent / 'config.json'}" for name in names if isinstance(name, str)), None)


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json beside a file, or {} if there is none."""
    config = path.parent / "config.json"
    return read_json(config) if config.is_file() else {}


def read_statistics(path: Path) -> dict[str, tuple[float, float, float]]:
    """Return 'mean' and 'std' of a preprocessor_config.json, or {} if there is no such file or it has none."""
    config = read_json(path) if path.is_file() else {}
    return {
        name: check_triple(f"image_{name} in {str(path)!r}", config[f"image_{name}"], positive=name == "std")
        for name in ("mean", "std")
        if config.get(f"image_{name}") is not None
    }


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}")
    return content
