"""What can be fused in a model, as a value and as a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile
from typing import Protocol, TypeVar

from convtool.core.fields import Fields
from convtool.core.names import is_written, toml_string
from convtool.core.tree import LayerRef, Sum, Tree, leaves, map_leaves, tree_text
from convtool.graph.flow import LeftAlone
from convtool.graph.judge import Cost, Judge, Merge
from convtool.graph.left_over import left_over
from convtool.kinds.kind import Layer
from convtool.kinds.stated import FieldSource, field_tables


class Named(Protocol):
    """What has the name of a layer."""

    @property
    def name(self) -> str:
        """Return it."""


AnyNamed = TypeVar("AnyNamed", bound=Named)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What can be fused in a model.

    Attributes:
        fusions: in the order in which they run.
        left_alone: what may have been expected and isn't among them.
        fields: geometry and eps of every layer in the fusions.
        total: cost of all convolutions, linear layers, batch norms and scales of the run, as they are.
        remarks: what to know of how the model's run was followed.
        uncounted: parameters of the model's other layers, which the total leaves out.
        unfused: whether the checkpoint was fused already; the total is that of the model as its code builds it.
    """

    fusions: tuple[Merge, ...]
    left_alone: tuple[LeftAlone, ...]
    fields: Mapping[str, Fields]
    total: Cost
    remarks: tuple[str, ...]
    uncounted: int = 0
    unfused: bool = False

    @classmethod
    def of(
        cls,
        judge: Judge,
        merges: Sequence[Merge],
        left_alone: Sequence[LeftAlone],
        layers: Iterable[Layer],
        fields: Mapping[str, Fields] | None = None,
        *,
        uncounted: int,
    ) -> Plan:
        """Return the plan of fusions that were chosen.

        Args:
            left_alone: what was seen to, and is not among them.
            layers: all of the model.
            fields: of its layers, where they aren't those of the run.
        """
        layers = list(layers)
        used = {leaf.name for one in merges for leaf in leaves(one.tree)}
        said = used.union(name for one in left_alone for name in one.layers)
        known = {layer.name: layer.fields for _, layer in judge.flow.calls()} if fields is None else fields
        return cls(
            tuple(merges),
            (*left_alone, *left_over(judge.flow, layers, said)),
            {one.name: known[one.name] for one in layers if one.name in used and known.get(one.name)},
            judge.total(),
            judge.flow.remarks,
            uncounted,
        )

    @property
    def geometry(self) -> FieldSource:
        """Return the fields as a source of them."""
        return FieldSource("the plan", self.fields, exact_names=True)

    @property
    def total_after(self) -> Cost:
        """Return the total with the fusions carried out."""
        return reduce(lambda total, one: total - one.before + one.after, self.fusions, self.total)

    def renamed(self, names: Mapping[str, str], *, unfused: bool) -> Plan:
        """Return the plan for a checkpoint that calls the layers otherwise; fusions and fields are by its names."""

        def new(name: str) -> str:
            return names.get(name, name)

        def rename(merge: Merge) -> Merge:
            tree = map_leaves(lambda leaf: replace(leaf, name=new(leaf.name)), merge.tree)
            return replace(merge, name=new(merge.name), tree=tree)

        fields = {new(name): fields for name, fields in self.fields.items()}
        return replace(self, fusions=tuple(map(rename, self.fusions)), fields=fields, unfused=unfused)

    def recipe(self) -> str:
        """Return the plan as a recipe in TOML, all of its names spelled out."""
        lines = ["# Written by `convtool plan`; for `convtool fuse CKPT --recipe THIS_FILE -o OUT`."]
        for one in self.fusions:
            lines += ["", "[[fuse]]", f"name = {toml_string(one.name)}", *_rule(one)]
        return "\n".join([*lines, "", "[geometry]", *field_tables(self.fields)]) + "\n"


def _rule(merge: Merge) -> Iterator[str]:
    tree = merge.tree
    yield f"sum = {_parts(tree)}" if isinstance(tree, Sum) else f"chain = {_parts(tree)}"
    if merge.only_size is not None:
        yield f"input_size = {list(merge.only_size)}"


def _parts(tree: Tree[LayerRef]) -> str:
    parts = (tree,) if isinstance(tree, LayerRef) else tree.parts
    return f"[{', '.join(map(_part, parts))}]"


def _part(tree: Tree[LayerRef]) -> str:
    if isinstance(tree, LayerRef):
        return toml_string(tree.name)
    return f"{{ sum = {_parts(tree)} }}" if isinstance(tree, Sum) else _parts(tree)


def tree_in_short(*trees: Tree[AnyNamed]) -> str:
    """Return trees with what their names share said once: 'layer1.0: conv1 → bn1 = conv1'."""
    shared = shared_path([leaf.name for tree in trees for leaf in leaves(tree) if not is_written(leaf.name)])
    text = " = ".join(tree_text(tree, lambda leaf: less(leaf.name, shared)) for tree in trees)
    return f"{shared.removesuffix('.')}: {text}" if shared else text


def names_in_short(names: Sequence[str]) -> str:
    """Return names with what they share said once: 'layer1.0: conv1, bn1'."""
    shared = shared_path(names)
    text = ", ".join(less(name, shared) for name in names)
    return f"{shared.removesuffix('.')}: {text}" if shared else text


def grouped_reasons(left_alone: Iterable[LeftAlone]) -> list[tuple[str, str]]:
    """Return the layers that are left alone for one reason in one line, whichever of them it is about."""
    grouped: dict[str, list[LeftAlone]] = {}
    for one in left_alone:
        about, _, what = one.reason.partition(": ")
        grouped.setdefault(what if about in one.layers else one.reason, []).append(one)
    lines = []
    for why, (first, *others) in grouped.items():
        more = f" and {len(others)} more" if others else ""
        lines.append((names_in_short(first.layers) + more, why if others else first.reason))
    return lines


def shared_path(names: Sequence[str]) -> str:
    """Return the path that all of the names begin with, its dot included."""
    each = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, each))


def less(name: str, shared: str) -> str:
    """Return a name without what is shared: 'conv1', or '[0]' of a number, as '0 → 1 = 0' would read like a sum."""
    rest = name.removeprefix(shared)
    return f"[{rest}]" if shared and rest.isdigit() else rest
