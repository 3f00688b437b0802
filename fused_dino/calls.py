"""What a supervision gives each of its terms: a teacher and its width, the options of a call, and targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .terms.base import Alignment, Term


def check_terms(terms: Any) -> None:
    """Check terms by name. No name may contain "loss", since trainers add up every log that does."""
    if not isinstance(terms, Mapping) or not terms:
        raise ValueError(f"terms must be a dict of at least one term by name, got {terms!r}")
    for name, term in terms.items():
        if not isinstance(name, str) or not name.isidentifier() or "loss" in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"terms must have names that are identifiers without 'loss', and no dict's, got {name!r}")
        if not isinstance(term, Term):
            raise TypeError(f"terms[{name!r}] must be a Term, got {type(term).__name__}")
        if (first := next(other for other, x in terms.items() if x is term)) != name:
            raise ValueError(f"terms must be different ones, got the same for {first!r} and {name!r}; make two")


def share_out(terms: Mapping[str, Term], **options: Any) -> dict[str, dict[str, Any]]:
    """Return the options of a call by term. A dict names its terms; any other value goes to all terms that take it.

    Weights leave images out of the loss. So a term that takes none must not be given them silently.
    """
    shares: dict[str, dict[str, Any]] = {name: {} for name in terms}
    for option, value in options.items():
        takers = [name for name, term in terms.items() if option in term.takes]
        if value is None:
            continue
        if not takers:
            raise ValueError(f"{option} must be left out: none of the terms {', '.join(terms)} takes it")
        if not isinstance(value, Mapping):
            if option == "weight" and len(takers) < len(terms):
                others = ", ".join(name for name in terms if name not in takers)
                raise ValueError(f"weight must be a dict by term, since {others} takes none")
            if option == "index" and len(takers) > 1:
                raise ValueError(f"index must be a dict by term, since several take one: {', '.join(takers)}")
            value = dict.fromkeys(takers, value)
        for name, its in value.items():
            if name not in takers:
                raise ValueError(f"{option} is given to {name!r}; the terms that take it are {', '.join(takers)}")
            if its is not None:
                shares[name][option] = its
    return shares


def layers_of(terms: Mapping[str, Term]) -> dict[str | None, list[int]]:
    """Return the layers that the terms read of each teacher."""
    layers: dict[str | None, list[int]] = {}
    for term in terms.values():
        layers.setdefault(term.teacher, []).extend(n for n in term.layers)
    return {name: list(dict.fromkeys(its)) for name, its in layers.items()}


def width_of(name: str, term: Any, sources: Mapping[Any, Any]) -> int | None:
    """Return the width of a term's features: its out_dim, else its teacher's, or None where neither is known.

    sources: what holds the teachers, by name.
    """
    own = getattr(term, "out_dim", None)
    if term.teacher in sources:
        return own or int(sources[term.teacher].teacher.embed_dim)
    known = "the one teacher has no name" if None in sources else f"the teachers are {list(sources)}"
    if term.teacher is not None:
        raise ValueError(f"terms[{name!r}] has teacher={term.teacher!r}, and {known}")
    if term.layers and isinstance(term, Alignment):
        raise ValueError(f"terms[{name!r}] must name its teacher, whose layers {term.layers} it reads; {known}")
    if own is None and isinstance(term, Alignment):
        raise ValueError(f"terms[{name!r}] must name its teacher, or have out_dim, its targets' width; {known}")
    return own


def take_targets(terms: Mapping[str, Any], targets: Any, sources: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the targets of a call as features, by term. A term without a teacher must have one."""
    if targets is not None and not (isinstance(targets, Mapping) and targets.keys() <= terms.keys()):
        got = sorted(map(str, targets)) if isinstance(targets, Mapping) else type(targets).__name__
        raise ValueError(f"targets must be a dict with tensors of some of the terms {sorted(terms)}, got {got}")
    given = {name: target for name, target in (targets or {}).items() if target is not None}
    for name, term in terms.items():
        if name in given:
            given[name] = term.read_target(f"targets[{name!r}]", given[name], width_of(name, term, sources))
        elif term.teacher not in sources:
            raise ValueError(f"targets must have a tensor for {name!r}, which has no teacher")
    return given


def check_batch(batch: int | None, targets: Mapping[str, Any]) -> int | None:
    """Return the batch size of a call, from its images or its targets."""
    for name, target in targets.items():
        count = next(len(x) for x in target.values() if isinstance(x, Tensor))
        batch = count if batch is None else batch
        if count != batch:
            raise ValueError(f"targets[{name!r}] must be of {batch} images, as the others are, got {count}")
    return batch
