"""Files of adapters merged into a checkpoint: which of its layers each of their modules changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite, nan, prod
from pathlib import Path
from typing import Any

from convtool.checkpoint import Checkpoint
from convtool.checkpoint.record import full_name
from convtool.core.fields import Fields
from convtool.core.names import some_of, unwrap
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves
from convtool.errors import InputError, RefusedError, UsageError
from convtool.formats.strict_json import parse_json
from convtool.fusing.recipe import PlannedFusion
from convtool.kinds.found import other_adapter
from convtool.kinds.kind import Layer
from convtool.kinds.scaling import Scaling
from convtool.kinds.stated import FieldSource, FieldSources

CONFIG = "adapter_config.json"  # where PEFT keeps alpha and rank
_PEFT = "base_model.model."
_TRAINER = re.compile(r"^(lora_|lycoris_|base_model\.model\.)")  # what trainers put in front of a layer's whole name
# What an adapter's file calls the network that a module is of, in front of the module's own name.
_COMPONENT = re.compile(
    r"(lora_(?:unet|te[0-9]?|transformer|prior_unet|prior_te|prior)_|lycoris_(?:unet_|te[0-9]?_|transformer_)?|"
    r"base_model\.model\.|(?:unet|transformer|text_encoder(?:_[0-9])?|text_model|diffusion_model|prior)\."
    r"(?:base_model\.model\.)?|)(.+)"
)
# What files of several networks have in front of each.
_NETWORKS = (
    *("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "text_encoder.", "text_encoder_2."),
    *("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
)
# Stable Diffusion's own names of its UNet's blocks, of which every third begins a level; _ for dots.
_BLOCK = re.compile(r"(?:(input|output)_blocks_([0-9]+)_([0-9]+)|middle_block_([0-9]+))_(.+)")
_INSIDE = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_SAMPLERS = {"op": "down_blocks_{}_downsamplers_0_conv", "conv": "up_blocks_{}_upsamplers_0_conv"}
_AROUND = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
# diffusers' older names: the layers of a processor, which stood beside those that they change.
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out|add_[kqv]_proj)_lora")


def adapted(
    checkpoints: Mapping[str, Checkpoint], sources: FieldSources, strengths: Sequence[str], leave: Sequence[str]
) -> tuple[list[PlannedFusion], FieldSources]:
    """Return a fusion for each layer that a module of the other checkpoints changes; and where fields come from then.

    The fusions are in the order of the checkpoint.

    Args:
        strengths: what --strength says, X or NAME=X; 1 where it says nothing.
        leave: patterns of modules to leave out.

    Raises:
        RefusedError: some modules of a network fit and others don't; or a form that isn't known, or can't be negative.
        UsageError: nothing fits, or a module fits several layers.
    """
    sources = sources.with_first(_configured(checkpoints))
    _check_scaled(checkpoints, sources.fields)
    base, said = checkpoints[BASE], parse_strengths(strengths, checkpoints)
    places = _places(base)
    changes: dict[str, list[Tree[LayerRef]]] = {}
    for source, opened in checkpoints.items():
        for layer, name in _fitting(source, opened, places, base, leave).items() if source != BASE else ():
            strength = said.get(source, 1.0)
            if strength < 0 and {"dora_scale", "magnitude"} & opened.layers[name].tensors.keys():
                raise RefusedError(f"{source}:{name}: a DoRA isn't taken out again by a negative strength")
            ref = LayerRef(name, source, layer)
            scaled = Chain((ref, LayerRef(f"scale({strength!r})")))
            changes.setdefault(layer, []).append(ref if strength == 1 else scaled)
    fusions = [PlannedFusion(one, Sum((LayerRef(one), *changes[one]))) for one in base.layers if one in changes]
    return fusions, sources


@dataclass(frozen=True, slots=True)
class Merged:
    """Modules of an adapter's file that change layers by the same factor.

    Attributes:
        source: the name of the file's --with.
        modules: how many they are.
    """

    source: str
    modules: int
    scaling: Scaling


def merged(
    checkpoints: Mapping[str, Checkpoint], trees: Iterable[Tree[LayerRef]], fields: Callable[[str], Fields]
) -> list[Merged]:
    """Return by what the adapters in fusions are multiplied."""
    alike: Counter[tuple[str, Scaling]] = Counter()
    for ref in (leaf for tree in trees for leaf in leaves(tree) if leaf.source != BASE):
        opened = checkpoints[ref.source]
        found = None if ref.written else scaling(opened, ref.name, fields(full_name(ref.name, ref.source)))
        if found is not None:
            alike[ref.source, found] += 1
    return [Merged(source, count, one) for (source, one), count in alike.items()]


def scaling(opened: Checkpoint, name: str, fields: Fields) -> Scaling | None:
    """Return by what a module's change is multiplied; None of a layer that is no adapter."""
    layer = opened.layers[name]
    alpha = layer.tensors.get("alpha") if layer.kind.adapts else None
    return layer.kind.scaling(layer.shapes, None if alpha is None else opened.tensor(alpha.name), fields, name)


def parse_strengths(texts: Sequence[str], names: Collection[str]) -> dict[str, float]:
    """Return --strength X and NAME=X by the names of --with; that of all of them is BASE's as well."""
    found: dict[str, float] = {}
    for text in sorted(texts, key=lambda one: "=" in one):
        name, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = nan
        if not isfinite(number) or (equals and name not in names):
            raise UsageError(f"--strength: expected a number, or NAME=X with the NAME of a --with, got {text!r}")
        found |= {name: number} if equals else dict.fromkeys(names, number)
    return found


def _places(base: Checkpoint) -> dict[str, list[str]]:
    """Return the layers that have a weight by all the names that adapters' files may have for them, _ for dots."""
    found: dict[str, list[str]] = {}
    for name, layer in base.layers.items():
        if layer.kind.main and "weight" in layer.tensors:
            bare = unwrap(name).removesuffix(".base_layer")
            keys = {bare, *(bare.removeprefix(network) for network in _NETWORKS)}
            for key in {_in_one_spelling(key) for key in keys}:
                found.setdefault(key, []).append(name)
    return found


def _fitting(
    source: str, opened: Checkpoint, places: Mapping[str, list[str]], base: Checkpoint, leave: Sequence[str]
) -> dict[str, str]:
    """Return the module that changes each layer, of one adapter's file."""
    found: dict[str, str] = {}
    whole: dict[str, list[str]] = {}  # the base's layers by their names in full, _ for dots
    for one in base.layers:
        whole.setdefault(unwrap(one).removesuffix(".base_layer").replace(".", "_"), []).append(one)
    for name, layer in opened.layers.items():
        if not layer.kind.adapts or _left_out(name, leave):
            continue
        # A layer of just that name is the one, whatever else a part of the name may be of.
        named = whole.get(_TRAINER.sub("", name).replace(".", "_")) or places.get(_split(name)[1], [])
        fitting = [one for one in named if _may_change(layer, base.layers[one])]
        if len(fitting) > 1:
            raise UsageError(f"{source}:{name} could change {' or '.join(fitting)}; --root opens one of the networks")
        for target in fitting:
            if target in found:
                raise UsageError(
                    f"{source}: {found[target]} and {name} both change {target}; --leave PATTERN leaves one out"
                )
            found[target] = name
    if not found and any(layer.kind.adapts for layer in base.layers.values()):
        raise UsageError(
            f"{source}: nothing in it changes a layer of the checkpoint, which holds adapters itself: give the base"
            f" first, and the adapters as --with {source}={base.path}"
        )
    if not found:
        modules = [f"{layer.name} ({', '.join(layer.tensors)})" for layer in opened.layers.values()]
        raise UsageError(f"{source}: nothing in it changes a layer of the checkpoint; it holds {some_of(modules)}")
    check_complete(source, opened, set(found.values()), leave, lambda name: _split(name)[0])
    return found


def check_complete(
    source: str, opened: Checkpoint, used: Collection[str], leave: Sequence[str], component: Callable[[str], str]
) -> None:
    """Raise RefusedError where some modules of a component are merged, and others are neither merged nor left out.

    A component that has no module in the checkpoint, such as a text encoder's, is another network's.

    Args:
        used: the modules that are merged.
        component: returns what a module's name says that it is a part of.
    """
    merged = {component(name) for name in used}
    lacking = [
        name for name in opened.layers if name not in used and component(name) in merged and not _left_out(name, leave)
    ]
    if lacking:
        others = {what for name in lacking if (what := other_adapter(opened.layers[name]))}
        are = f" ({', '.join(sorted(others))}, which can't be merged here)" if others else ""
        raise RefusedError(
            f"{source}: {len(lacking)} of its modules fit no layer, or are of a form that isn't known: "
            f"{some_of(lacking)}{are}; merged without them it would mean something else. --leave PATTERN leaves modules"
            " out"
        )


def _left_out(name: str, leave: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in leave)


def _split(name: str) -> tuple[str, str]:
    """Return the network that a module of an adapter's file is of, and the name of the layer in it, _ for dots."""
    match = _COMPONENT.fullmatch(name)
    component, rest = (match[1], match[2]) if match else ("", name)
    if old := _PROCESSOR.fullmatch(rest):
        rest = f"{old[1]}.{old[2]}{'.0' if old[2] == 'to_out' else ''}"
    return component, _in_one_spelling(rest)


def _in_one_spelling(name: str) -> str:
    """Return a layer's name with _ for dots, and as diffusers has it where it is one of Stable Diffusion's own."""
    flat = name.replace(".", "_")
    if flat in _AROUND:
        return _AROUND[flat]
    match = _BLOCK.fullmatch(flat)
    if match is None:
        return flat
    side, number, inner, middle, rest = match.groups()
    inside = _INSIDE.get(rest, rest)
    if middle:
        return f"mid_block_{'attentions_0' if middle == '1' else f'resnets_{int(middle) // 2}'}_{inside}"
    level, place = divmod(int(number) - (side == "input"), 3)
    if rest in _SAMPLERS:
        return _SAMPLERS[rest].format(level)
    part = f"{'attentions' if inner == '1' else 'resnets'}_{place}"
    return f"{'down' if side == 'input' else 'up'}_blocks_{level}_{part}_{inside}"


def _may_change(layer: Layer, base: Layer) -> bool:
    """Return whether a module's change can have the shape of a layer's weight, as far as outputs tell."""
    shapes, weight = layer.shapes, base.shapes["weight"]
    if "up" in shapes:
        return len(weight) > 1 and (shapes["up"][0] == weight[0] or shapes["up"][0] == weight[1])
    if "diff" in shapes:
        return prod(shapes["diff"]) == prod(weight)
    return True


def _configured(checkpoints: Mapping[str, Checkpoint]) -> FieldSource:
    """Return what the files beside adapters say of how they are scaled: PEFT's adapter_config.json.

    Raises:
        InputError: it is damaged.
    """
    tables: dict[str, Fields] = {}
    for source, opened in checkpoints.items():
        config = None if source == BASE else _config(opened.path)
        for layer in opened.layers.values() if config else ():
            if layer.kind.adapts and "alpha" not in layer.tensors:
                tables[full_name(layer.name, source)] = _scaling(config or {}, layer, opened.path)
    return FieldSource(CONFIG, tables, exact_names=True)


def _check_scaled(checkpoints: Mapping[str, Checkpoint], fields: Callable[[str], Fields]) -> None:
    """Raise UsageError for a file in PEFT's names of whose alpha nobody says anything."""
    for source, opened in checkpoints.items():
        for layer in opened.layers.values() if source != BASE else ():
            unsaid = layer.kind.adapts and not {"alpha", "diff"} & layer.tensors.keys()
            if unsaid and layer.name.startswith(_PEFT) and "alpha" not in fields(full_name(layer.name, source)):
                raise UsageError(
                    f"{source}: PEFT keeps alpha in {CONFIG}, and there is none beside {opened.path}; put it there, or"
                    f" give --set '{source}:*.alpha=16' with the number that it was trained with"
                )


def _config(path: Path) -> dict[str, Any] | None:
    beside = (path if path.is_dir() else path.parent) / CONFIG
    if not beside.is_file():
        return None
    config = parse_json(beside.read_bytes(), beside, CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{beside}: expected a JSON object")
    return config


def _scaling(config: Mapping[str, Any], layer: Layer, where: Path) -> Fields:
    """Return alpha, rank and the like of one module, as PEFT has them."""
    name = layer.name.removeprefix(_PEFT)

    def of(pattern: str, default: object) -> Any:
        patterns = config.get(pattern) or {}
        if odd := [key for key in patterns if not re.fullmatch(r"[\w.]+", key)]:
            raise UsageError(
                f"{where.parent / CONFIG}: {pattern}: expected names of modules, got {odd[0]!r}; say alpha with --set"
            )
        return next((value for key, value in patterns.items() if name == key or name.endswith(f".{key}")), default)

    alpha, rank = (
        of("alpha_pattern", config.get("lora_alpha", config.get("alpha"))),
        of("rank_pattern", config.get("r")),
    )
    found: Fields = {}
    if isinstance(alpha, int | float) and not isinstance(alpha, bool):
        found["alpha"] = float(alpha)
    if isinstance(rank, int) and not isinstance(rank, bool):
        found["rank"] = rank
    flags = {"rank_stabilized": "use_rslora", "fan_in_fan_out": "fan_in_fan_out"}
    return found | {field: True for field, key in flags.items() if config.get(key) is True}
