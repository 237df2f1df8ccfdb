"""Names of layers, and what training leaves in them that says nothing about the layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

# Containers around a network or a part of it: DataParallel and DDP, torch.compile, Lightning Fabric, FSDP, activation
# checkpointing.
WRAPPERS = frozenset(
    {
        *("module", "_orig_mod", "_forward_module"),
        *("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_mp_wrapped_module"),
    }
)
MOST_NAMES = 3  # named one by one before the rest is only counted
CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)  # a layer without tensors, as it is written: 'avg_pool(2)'


def is_written(name: str) -> bool:
    """Return whether the name is that of a layer without tensors."""
    return CALL.fullmatch(name) is not None


def unwrap(name: str) -> str:
    """Return the name without wrappers' components, at whatever depth they stand."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def toml_string(text: str) -> str:
    """Return a string in TOML: as in JSON, but with characters beyond U+FFFF as they are, and U+007F escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def grouped(said: Iterable[tuple[str, str]]) -> list[str]:
    """Return what is said of layers, (layer, what), as lines; once where it is the same of many."""
    layers: dict[str, list[str]] = {}
    for layer, what in dict.fromkeys(said):
        layers.setdefault(what, []).append(layer)
    return [
        f"{name}: {what}"
        for what, names in layers.items()
        for name in (names if len(names) <= MOST_NAMES else [some_of(names)])
    ]


def some_of(names: Sequence[str], most: int = MOST_NAMES) -> str:
    """Return the first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
