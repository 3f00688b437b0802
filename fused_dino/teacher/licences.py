"""Licences of teachers' weights, by timm's names, and whether they allow commercial use."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple


class Licence(NamedTuple):
    """A licence of weights.

    commercial: Whether it allows commercial use, or None where that is unknown.
    source: Its text.
    """

    name: str
    commercial: bool | None
    source: str


LICENCES = {
    "apache-2.0": Licence("Apache-2.0", True, "https://www.apache.org/licenses/LICENSE-2.0"),
    "mit": Licence("MIT", True, "https://opensource.org/license/mit"),
    "bsd-3-clause": Licence("BSD-3-Clause", True, "https://opensource.org/license/bsd-3-clause"),
    "cc-by-4.0": Licence("CC-BY-4.0", True, "https://creativecommons.org/licenses/by/4.0/"),
    "cc-by-nc-4.0": Licence("CC-BY-NC-4.0", False, "https://creativecommons.org/licenses/by-nc/4.0/"),
    "dinov3-license": Licence(
        "DINOv3 License", True, "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
    ),
    "fair-noncommercial-research-license": Licence(
        "FAIR Noncommercial Research License",
        False,
        "https://huggingface.co/facebook/fair-noncommercial-research-license",
    ),
    "nvidia-open-model-license": Licence(
        "NVIDIA Open Model License",
        True,
        "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
    ),
}


def licence_of(config: Any) -> Licence:
    """Return the licence that a model's pretrained_cfg of timm names. One without a name is unknown."""
    name = (config or {}).get("license") or "unknown"
    return LICENCES.get(name, Licence(name, None, "unknown"))


@cache
def warn_of(model: str, licence: Licence) -> None:
    """Warn once of a licence that forbids commercial use."""
    if licence.commercial is False:
        warnings.warn(
            f"the weights of {model} must not be used commercially: {licence.name}, {licence.source}", stacklevel=2
        )
