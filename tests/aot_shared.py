"""What the shared memory of a kernel costs it on sm_90: wavefronts, bank conflicts and barriers.

PTX, run by ptx.py, has the addresses; the machine code must have the same accesses, each as wide as it is taken to be.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import ptx
from ptx import Access

BANKS, WORD = 32, 4  # of shared memory, and the bytes of each that one wavefront serves


class Traffic(NamedTuple):
    """The use of shared memory by one program in a turn of its outermost loop."""

    wavefronts: float
    conflicts: int  # the most words in one bank that lanes which are served together ask for
    barriers: float


def traffic(code: str, sass: str, threads: int, arguments: Sequence[Any], turns: int) -> Traffic:
    accesses = list(joined(ptx.run(code, threads, arguments)))
    expected = Counter(name(access.kind, 8 * access.size) for access in {each.line: each for each in accesses}.values())
    found = Counter(
        name(kind, int(bits or 0)) for kind, bits in re.findall(r"\b(STS|LDS|BAR)\b(?:\.U?\.?(\d+))?", sass)
    )
    if found != expected:
        raise ValueError(f"the machine code has {dict(found)} where its PTX has {dict(expected)}")
    served = [wavefronts(access) for access in accesses if access.kind != "BAR"]
    barriers = sum(access.kind == "BAR" for access in accesses)
    worst = max((most for groups in served for most in groups), default=0)
    return Traffic(sum(map(sum, served)) / turns, worst, barriers / turns)


def name(kind: str, bits: int) -> str:
    """Return the name of an access in the machine code."""
    return f"{kind}.{bits}" if bits > 32 else kind


def joined(accesses: Sequence[Access]) -> Iterator[Access]:
    """Join accesses as the assembler does: consecutive stores of a thread to adjacent words become one."""
    start = 0
    while start < len(accesses):
        count = next(n for n in (4, 2, 1) if is_one(accesses[start : start + n], n))
        yield accesses[start]._replace(size=count * accesses[start].size)
        start += count


def is_one(parts: Sequence[Access], count: int) -> bool:
    first, size = parts[0], count * parts[0].size
    return count == 1 or (
        len(parts) == count
        and size <= 4 * WORD
        and all((part.kind, part.size) == ("STS", first.size) for part in parts)
        and all(np.array_equal(part.live, first.live) for part in parts)
        and all(np.array_equal(part.address, first.address + i * first.size) for i, part in enumerate(parts))
        and not (first.address % size).any()
    )


def wavefronts(access: Access) -> list[int]:
    """Return the most words in one bank for each group of lanes that is served together, of at most 128 bytes."""
    lanes = min(32, BANKS * WORD // access.size)
    found = []
    for start in range(0, len(access.live), lanes):
        addresses = access.address[start : start + lanes][access.live[start : start + lanes]]
        words = np.unique(addresses[:, None] // WORD + np.arange(max(1, access.size // WORD)))
        if words.size:
            found.append(int(np.bincount(words % BANKS).max()))
    return found
