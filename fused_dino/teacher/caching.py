"""Caches of results that depend on a module's weights: for the sizes used last, until it is moved, cast or loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = 16  # results that a module caches


class Cache:
    """Results for the keys used last. A copy and a pickle begin empty."""

    def __init__(self) -> None:
        self.results: dict[Hashable, tuple[Any, Any]] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Cache, ()

    def get(self, key: Hashable, sources: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
        """Return compute(), or its earlier result for this key and the same bits of its sources."""
        device = sources[0].device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        autocast = torch.is_autocast_enabled(device.type)
        bits = tuple((x.data_ptr(), x._version, x.dtype) for x in sources)
        key = key, bits, device, stream, autocast
        with self.lock:
            found = self.results.pop(key, None)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():  # it may serve a gradient later
                # Memory that an entry holds is no other tensor's: its address stays that of these bits.
                found = [x.detach() for x in sources], compute()
        with self.lock:
            self.results[key] = found
            if len(self.results) > LIMIT:
                del self.results[next(iter(self.results))]
        return found[1]


def may_cache(source: Tensor) -> bool:
    """Whether a result of a weight may be cached: not in a graph, under a transform, or with a gradient."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    plain = type(source) in (Tensor, nn.Parameter) and not source.is_inference() and not source.requires_grad
    plain = plain and not source.is_meta  # it has no bits to know again
    # A graph that is captured replays its own kernels, in memory of its own.
    return plain and not (source.is_cuda and torch.cuda.is_current_stream_capturing())


class Caching:
    """Lets a module cache results, out of its state_dict, until it is moved, cast or loaded."""

    cache: Cache

    def cached(self, key: Hashable, sources: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
        return self.cache.get(key, sources, compute) if all(map(may_cache, sources)) else compute()

    def _apply(self, *args: Any, **options: Any) -> Any:
        self.cache = Cache()
        return super()._apply(*args, **options)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        self.cache = Cache()
        super()._load_from_state_dict(*args)  # type: ignore[misc]
