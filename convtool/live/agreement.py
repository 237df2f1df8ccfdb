"""A model held against a checkpoint: which of its layers are which of the file's, and where the two disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from convtool.checkpoint import Checkpoint, Layer
from convtool.core.names import grouped, some_of, unwrap
from convtool.errors import UsageError
from convtool.kinds.stated import FieldSource
from convtool.live.inside import fields_inside
from convtool.live.layers import module_layers
from convtool.live.state import COUNTERS, StateCheckpoint

FUSED = "convtool fused it already"
FOLDED = "it has a bias in the checkpoint and none in the model: another program may have fused it already"
MOST_NAMES = 6  # named one by one before the rest is only counted


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a model says of a checkpoint's layers.

    Attributes:
        model: that one.
        checkpoint: the other side.
        geometry: the fields of every layer that both have and agree on, by the checkpoint's names.
        names: the checkpoint's name of each layer of the model that both have.
        unlike: layers of the model that the checkpoint lacks or has otherwise, with the reason.
        differences: names and shapes that disagree, and layers whose code tells nothing, a line each.
    """

    model: nn.Module
    checkpoint: Checkpoint
    geometry: FieldSource
    names: Mapping[str, str]
    unlike: Mapping[str, str]
    differences: tuple[str, ...]

    def is_biased(self, name: str) -> bool:
        """Return whether the checkpoint's bias of a layer of the model may have anything but zeros in it."""
        return name not in self.names or self.checkpoint.is_biased(self.names[name])

    @property
    def was_fused(self) -> bool:
        """Return whether layers of the model aren't in the checkpoint, or have a bias there, as they were fused."""
        return any(why in (FUSED, FOLDED) for why in self.unlike.values())

    def check(self, spec: str) -> None:
        """Raise UsageError where the model, called `spec`, is of another network than the checkpoint."""
        if not self.names:
            ours = ", ".join(name for name, _ in list(self.model.named_parameters())[:2])
            theirs = ", ".join(list(self.checkpoint.infos)[:2])
            raise UsageError(
                f"--model: {spec} and {self.checkpoint.path} have no layer in common: the model has"
                f" {ours or 'no tensors'}, ..., the checkpoint {theirs or 'none'}, ..."
            )
        # Folding takes out as many layers as it leaves, and gives these a bias; a new head has another shape: more than
        # that is no accident.
        strange = [name for name, why in self.unlike.items() if why not in (FUSED, FOLDED)]
        every = len(self.names.keys() | self.unlike.keys())
        if 3 * len(strange) > 2 * every:
            raise UsageError(
                f"--model: {spec} is of another network than {self.checkpoint.path}: of its {every} layers"
                f" {len(strange)} aren't in the checkpoint or have other shapes there, such as {', '.join(strange[:2])}"
            )


def agree(model: nn.Module, checkpoint: Checkpoint, origin: str = "--model") -> Agreement:
    """Hold a model's layers against a checkpoint's, by name and shape.

    Wrappers' prefixes ('module.') don't count, and neither does one prefix that all names of one side have and the
    other's lack. Layers that convtool fused have the geometry that its record says, not the model's.
    """
    ours = StateCheckpoint.of(model).layers
    theirs = checkpoint.layers
    names = _names(ours, theirs)
    record = checkpoint.record
    fused = set(record.fields()) if record else set()
    gone = {source.name for fusion in (record.fusions if record else ()) for source in fusion.sources} | fused
    shapes = {name: line for name, other in names.items() if (line := _shapes(ours[name], theirs[other]))}
    biased = [name for name, line in shapes.items() if line == f"{names[name]}.bias: only in the checkpoint"]
    known = module_layers(model)
    inside = fields_inside(model, known)
    tables = {
        names[name]: fields
        for name, fields in ({one: known.layers[one].fields for one in known.called()} | inside).items()
        if fields and name in names and names[name] not in fused and name not in shapes
    }
    found = set(names.values())
    unlike = {
        **{name: "it isn't in the checkpoint" for name in ours if name not in names},
        **{name: f"model and checkpoint disagree: {line}" for name, line in shapes.items()},
        **dict.fromkeys(biased, FOLDED),
        **{name: FUSED for name, other in names.items() if other in gone},
    }
    differences = [
        *_listed("only in the checkpoint", (name for name in theirs if name not in found | gone)),
        *_listed("only in the model", (name for name in ours if name not in names and name not in gone)),
        *_listed("a bias only in the checkpoint", (name for name in biased if names[name] not in fused)),
        *(line for name, line in shapes.items() if names[name] not in fused and name not in biased),
        *grouped(
            (name, f"the model doesn't tell stride, padding or eps of {reason}")
            for name, reason in known.foreign.items()
            if known.layers[name].fields and name not in inside
        ),
    ]
    geometry = FieldSource(origin, tables, exact_names=True)
    return Agreement(model, checkpoint, geometry, names, unlike, tuple(differences))


def _names(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Return the checkpoint's name of each layer of the model, where there is exactly one."""
    plain: dict[str, list[str]] = {}
    for name in theirs:
        plain.setdefault(unwrap(name), []).append(name)
    bare = {name: unwrap(name) for name in ours}
    mine = set(bare.values())
    apart = mine.isdisjoint(plain)
    ahead, behind = (_prefix(mine, set(plain)), _prefix(set(plain), mine)) if apart else ("", "")
    found = {name: plain.get(ahead + one.removeprefix(behind), []) for name, one in bare.items()}
    known = {name for names in plain.values() for name in names}
    return {name: name if name in known else one[0] for name, one in found.items() if name in known or len(one) == 1}


def _prefix(ours: set[str], theirs: set[str]) -> str:
    """Return what the other side has in front of every name of this one; '' where nothing."""
    longest = max(ours, key=lambda name: (len(name), name), default="")
    ahead = (other.removesuffix(longest) for other in sorted(theirs) if other.endswith(f".{longest}"))
    return next((prefix for prefix in ahead if all(prefix + name in theirs for name in ours)), "")


def _shapes(ours: Layer, theirs: Layer) -> str:
    """Say where tensors of a layer differ in shape, or only one side has them; '' where they agree."""
    mine, other = ({key: info.shape for key, info in layer.tensors.items()} for layer in (ours, theirs))
    for key in ("weight", *mine):  # the weight says most
        if key in mine and key in other and mine[key] != other[key]:
            return f"{theirs.name}.{key}: {_sized(other[key])} in the checkpoint, {_sized(mine[key])} in the model"
    if "weight" in mine and "weight" in other:  # of which one side may hold the parts
        mine, other = ({key: x for key, x in side.items() if key in ("weight", "bias")} for side in (mine, other))
    for key in sorted((mine.keys() ^ other.keys()) - COUNTERS):
        return f"{theirs.name}.{key}: only in the {'model' if key in mine else 'checkpoint'}"
    return ""


def _sized(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _listed(what: str, names: Iterable[str]) -> list[str]:
    found = [name or "(bare module)" for name in names]
    if not found:
        return []
    return [f"{what}: {some_of(found, MOST_NAMES)}"]
