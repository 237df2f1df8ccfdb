"""What a record says of a fused layer that its sources don't."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from convtool.checkpoint.record import FusionRecord
from convtool.core.bound import fused_geometry
from convtool.core.expression import joined
from convtool.core.fields import Fields, geometry_fields
from convtool.core.tree import Tree, leaves, map_leaves
from convtool.errors import ConvtoolError
from convtool.fusing.leaf import LoweredLayer
from convtool.fusing.lowering import stored_dtype


def fused_claims(
    fusion: FusionRecord, tree: Tree[LoweredLayer], fused: Tree[LoweredLayer]
) -> Iterator[tuple[str, str]]:
    """Yield what is recorded of the fused layer and isn't what its sources make it: another dtype or geometry."""
    if fusion.dtype != str(stored_dtype(list(leaves(tree)))).removeprefix("torch."):
        yield f"the fused {fusion.name}", f"stored in {fusion.dtype}"
    layer = next(leaf for leaf in leaves(fused) if leaf.own)
    expected: Fields = {}
    with contextlib.suppress(ConvtoolError):  # no single layer stands for it, and all of the fields are claimed
        expected = geometry_fields(fused_geometry(map_leaves(lambda leaf: leaf.conv, joined(tree))))
    recorded = {name: value for name, value in layer.fields.items() if name in fusion.fields}
    if layer.layer.kind.settable and any(expected.get(name) != value for name, value in recorded.items()):
        yield f"the fused {fusion.name}", layer.layer.kind.claim(recorded, layer.layer.shapes)
