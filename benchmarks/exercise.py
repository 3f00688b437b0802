"""Each op once, small and on every backend of ours, forward and backward: what compute-sanitizer watches on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import harness, session

LARGEST = 2**22  # elements of an input: the sanitizer is slow


def main() -> None:
    device = session.default_device()
    for case in session.plan(harness.benches().values(), device, quick=False):
        if torch.Size(case.row.shape).numel() > LARGEST or case.bench.rooms is not None:
            continue
        row = replace(case.row, shape=(min(case.row.shape[0], 64), *case.row.shape[1:]))
        case = replace(case, row=row)
        inputs = harness.draw(case.bench, row, device)
        for provider in harness.providers(case.bench, row, device, inputs[0]):
            if provider.role == "ours":
                try:
                    harness.bind(case.bench, row, provider.make(), inputs, case.direction)()
                except harness.Unavailable as reason:
                    print(f"{case} {provider.name}: {reason}")
                else:
                    print(f"{case} {provider.name}: ran")
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
