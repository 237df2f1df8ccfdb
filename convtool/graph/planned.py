"""What can be fused in a model, as a value and as a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from convtool.core.fields import Fields
from convtool.core.names import toml_string
from convtool.core.tree import Chain, LayerRef, Sum, Tree, leaves, map_leaves, tree_text
from convtool.graph.judge import Cost, Exact, Piece
from convtool.kinds.stated import FieldSource, field_tables


@dataclass(frozen=True, slots=True, eq=False)
class PlannedPiece:
    """One fusion of a plan.

    Attributes:
        name: of the fused layer: one of those that it stands for.
        piece: these, and what the fused one costs.
        seconds: before and after on this machine, where measured.
    """

    name: str
    piece: Piece
    seconds: tuple[float, float] | None = None

    @property
    def only_size(self) -> tuple[int, ...] | None:
        """Return the one input size that it is exact at, channels in front; None where it is at every size."""
        return self.piece.input_size if self.piece.exact is Exact.THIS_SIZE else None


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """Layers with nothing in between that stay apart, and why."""

    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What can be fused in a model.

    Attributes:
        fusions: in the order in which they run.
        left_alone: what may have been expected and isn't among them.
        fields: geometry and eps of every layer in the fusions.
        total: cost of all convolutions, linear layers, batch norms and scales of the run, as they are.
        tracer: what followed the model's run.
        remarks: what to know of that.
    """

    fusions: tuple[PlannedPiece, ...]
    left_alone: tuple[LeftAlone, ...]
    fields: Mapping[str, Fields]
    total: Cost
    tracer: str
    remarks: tuple[str, ...]

    @property
    def geometry(self) -> FieldSource:
        """The same as a source of fields."""
        return FieldSource("the plan", self.fields, exact_names=True)

    @property
    def total_after(self) -> Cost:
        """The same with the fusions carried out."""
        saved = [(one.piece.before, one.piece.after) for one in self.fusions]
        return Cost(
            self.total.parameters - sum(before.parameters - after.parameters for before, after in saved),
            self.total.multiply_adds - sum(before.multiply_adds - after.multiply_adds for before, after in saved),
        )

    def renamed(self, names: Mapping[str, str]) -> Plan:
        """The same for a checkpoint that calls the layers otherwise; fields and fusions are by its names."""

        def ref(leaf: LayerRef) -> LayerRef:
            return replace(leaf, name=names.get(leaf.name, leaf.name))

        fusions = tuple(
            replace(
                one, name=names.get(one.name, one.name), piece=replace(one.piece, tree=map_leaves(ref, one.piece.tree))
            )
            for one in self.fusions
        )
        return replace(
            self, fusions=fusions, fields={names.get(name, name): fields for name, fields in self.fields.items()}
        )

    def recipe(self) -> str:
        """The plan as a recipe in TOML, all of its names spelled out."""
        lines = ["# Written by `convtool plan`; for `convtool fuse CKPT --recipe THIS_FILE -o OUT`."]
        for one in self.fusions:
            lines += ["", "[[fuse]]", f"name = {toml_string(one.name)}", *_rule(one.piece)]
        used = {leaf.name for one in self.fusions for leaf in leaves(one.piece.tree)}
        lines += ["", "[geometry]", *field_tables({name: f for name, f in self.fields.items() if name in used})]
        return "\n".join(lines) + "\n"


def _rule(piece: Piece) -> Iterator[str]:
    tree = piece.tree
    if isinstance(tree, Sum):
        yield f"sum = [{', '.join(_part(part) for part in tree.parts)}]"
    else:
        parts = tree.parts if isinstance(tree, Chain) else (tree,)
        yield f"chain = [{', '.join(_part(part) for part in parts)}]"
    if piece.exact is Exact.THIS_SIZE:
        yield f"input_size = {list(piece.input_size)}"


def _part(tree: Tree[LayerRef]) -> str:
    if isinstance(tree, Chain):
        return f"[{', '.join(_part(part) for part in tree.parts)}]"
    if isinstance(tree, Sum):
        return f"{{ sum = [{', '.join(_part(part) for part in tree.parts)}] }}"
    return toml_string(tree.name)


def tree_in_short(tree: Tree[LayerRef]) -> str:
    """'layer1.0: conv1 + bn1' for a chain; '(a | b)' for a sum."""
    names = [leaf.name for leaf in leaves(tree) if not leaf.written]
    shared = _shared(names)
    text = tree_text(tree, lambda leaf: leaf.name.removeprefix(shared))
    return f"{shared.removesuffix('.')}: {text}" if shared else text


def names_in_short(names: Sequence[str]) -> str:
    """'layer1.0: conv1, bn1'."""
    shared = _shared(names)
    text = ", ".join(name.removeprefix(shared) for name in names)
    return f"{shared.removesuffix('.')}: {text}" if shared else text


def _shared(names: Sequence[str]) -> str:
    """The path that all of the names begin with, its dot included."""
    split = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)
