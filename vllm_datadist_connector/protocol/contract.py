"""LayoutContract: what both ends must agree on for P's bytes to mean on D what they meant on P.

Versions of vLLM may differ (rolling upgrades pair them), and with them which settings a model's configuration lists:
ends of the same software must list the same ones, others are compared by what both list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Final

import msgspec

MAX_SETTINGS: Final = 512
MAX_SETTING_NAME: Final = 160
MAX_SETTING_VALUE: Final = 64
_MAX_TOLD: Final = 8
"""Differing settings that a refusal lists: two unlike models differ in dozens."""

NOT_LISTED: Final = "not listed"

DUMMY: Final = "dummy"
"""Scheme of weights that were never read from a checkpoint."""

_Name = Annotated[str, msgspec.Meta(max_length=512)]


class LayoutContract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: _Name
    """Architecture (not the path: instances may mount a model at different places)."""
    kv_cache_dtype: _Name
    kv_packing: _Name
    """In what order a platform keeps the bytes of a head's tokens in a block."""
    software: _Name
    """What made `settings`: with another version they may be other ones."""
    settings: Annotated[
        dict[
            Annotated[str, msgspec.Meta(max_length=MAX_SETTING_NAME)],
            Annotated[str, msgspec.Meta(max_length=MAX_SETTING_VALUE)],
        ],
        msgspec.Meta(max_length=MAX_SETTINGS),
    ]
    """Of the model's effective configuration, all that shapes its KV: name to value, or to a digest of a long one."""
    weights: _Name
    """`scheme:identity`, the same for any sharding; empty if not known. Only those of one scheme can be compared."""


OVERRIDABLE: Final = ("model", "weights")
"""Fields that an operator may allow to differ, as well as any of the settings: the others say how bytes are read."""


def find_mismatches(ours: LayoutContract, theirs: LayoutContract, may_differ: Collection[str] = ()) -> list[str]:
    """Why two instances cannot exchange blocks: one line per field with both values; empty if they may try.

    What the contract leaves open is judged when caches are paired, see worker/pairing.py.

    Args:
        may_differ: names of OVERRIDABLE fields and of settings, or of a whole branch of these (`a` for `a.b`).
    """
    found = [
        f"{name}: ours {getattr(ours, name)!r}, theirs {getattr(theirs, name)!r}"
        for name in ("model", "kv_cache_dtype", "kv_packing")
        if getattr(ours, name) != getattr(theirs, name) and not _is_allowed(name, may_differ, OVERRIDABLE)
    ]
    settings = [each for each in _differing_settings(ours, theirs) if not _is_allowed(each, may_differ)]
    for name in settings[:_MAX_TOLD]:
        values = (side.settings.get(name, NOT_LISTED) for side in (ours, theirs))
        found.append("{}: ours {}, theirs {}".format(name, *values))
    if len(settings) > _MAX_TOLD:
        found.append(f"{len(settings) - _MAX_TOLD} more settings of the model")
    others = are_weights_comparable(ours, theirs) and ours.weights != theirs.weights
    if others and not _is_allowed("weights", may_differ):
        found.append(f"weights: ours {ours.weights}, theirs {theirs.weights}")
    return found


def are_weights_comparable(ours: LayoutContract, theirs: LayoutContract) -> bool:
    """Whether both ends know their weights, and by one scheme; dummy ones are nobody else's."""
    schemes = {each.weights.partition(":")[0] for each in (ours, theirs)}
    return "" not in schemes and (len(schemes) == 1 or DUMMY in schemes)


def _differing_settings(ours: LayoutContract, theirs: LayoutContract) -> Iterator[str]:
    if ours.software == theirs.software:
        names = sorted(ours.settings.keys() | theirs.settings.keys())
    else:
        names = sorted(ours.settings.keys() & theirs.settings.keys())
    return (name for name in names if ours.settings.get(name) != theirs.settings.get(name))


def _is_allowed(name: str, may_differ: Collection[str], among: Collection[str] | None = None) -> bool:
    if among is not None and name not in among:
        return False
    return any(name == each or name.startswith(f"{each}.") for each in may_differ)
