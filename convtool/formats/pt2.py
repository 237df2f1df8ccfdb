"""What torch.export.save writes (.pt2): raw weights, and a model's operations as JSON. Read, never written.

Of the archive only JSON and raw bytes are read; the pickles in it (examples of inputs, objects of its own) are left
alone. What the JSON holds follows torch/_export/serde/schema.py, whose major version is raised by every change that
would be misread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any

from convtool.errors import UsageError
from convtool.formats.dtypes import EXPORTED, ITEMSIZE, MOST_AXES, is_size
from convtool.formats.pickle_values import SPARSE, StorageRef, TensorRef, Unusable
from convtool.formats.program import Inside, Node, Program, Value, values_in
from convtool.formats.source import Part, Source
from convtool.formats.state_dicts import StateDict
from convtool.formats.stored_tensors import StoredTensors, check_tensors
from convtool.formats.strict_json import parse_json
from convtool.formats.tensor_file import TensorFile

NAME = "pt2"
MAJOR = 8  # of the schema; minor versions only add
STRIDED = 7  # a layout
# Arguments that stand there as they are; a number that isn't finite is a text.
_SMALL = {"as_int": int, "as_float": int | float | str, "as_bool": bool, "as_string": str}
_MODELS, _WEIGHTS = "models/", "data/weights/"


def recognises(members: Mapping[str, Part]) -> bool:
    """Tell whether an archive of these members is one."""
    return any(
        name.endswith(("/archive_format", "serialized_exported_program.json")) or name == "archive_format"
        for name in members
    )


def open_members(source: Source, members: Mapping[str, Part], root: str | None) -> TensorFile:
    """Open the archive of these members.

    Args:
        root: the name of the model that is meant, needed only where there are several.

    Raises:
        InputError: it is damaged, or of a version that isn't known.
        UsageError: several models, and no `root`.
    """
    top = next((name.removesuffix("archive_format") for name in members if name.endswith("archive_format")), None)
    if top is None:
        raise source.error("is a .pt2 of torch before 2.8; load it with that torch.export.load, export and save again")
    own = {name.removeprefix(top): placed for name, placed in members.items() if name.startswith(top)}
    models = [name.removeprefix(_MODELS).removesuffix(".json") for name in own if _is_model(name)]
    if not models:
        raise source.error("is a .pt2 archive without an exported program (models/NAME.json); was it compiled?")
    if root is None and len(models) > 1:
        raise UsageError(f"{source.path}: holds several models ({', '.join(models)}); choose one with --root")
    if root is not None and root not in models:
        raise UsageError(f"{source.path}: --root {root}: there is no such model; models found: {', '.join(models)}")
    model = models[0] if root is None else root
    reader = _Reader(source, own)
    document = reader.document(f"{_MODELS}{model}.json")
    config = reader.document(f"{_WEIGHTS}{model}_weights_config.json")
    try:
        reader.check_version(document)
        entries = reader.entries(config)
        program = reader.program(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise source.damaged(f"its JSON isn't as torch writes it ({type(error).__name__}: {error!s:.100})") from None
    storages = {name.removeprefix(_WEIGHTS): own[name] for name in own if name.startswith(_WEIGHTS)}
    check_tensors(source, (one for one in entries.values() if isinstance(one, TensorRef)))
    beside = {f"{_MODELS}{model}.json": "the exported program", **_others(own, model)}
    file = StoredTensors(source, storages, StateDict((), entries, entries, beside=beside), NAME)
    file.program = program
    return file


def _is_model(name: str) -> bool:
    return name.startswith(_MODELS) and name.endswith(".json")


def _others(own: Mapping[str, Part], model: str) -> dict[str, str]:
    """Return the members that aren't weights, which are left alone, and what they are."""
    ours = (f"{_MODELS}{model}.json", "archive_format", "archive_version", "byteorder", ".data/", "version")
    inside = [name for name in own if not name.startswith((_WEIGHTS, *ours))]
    return {name: f"{own[name].size} bytes, not opened" for name in inside}


class _Reader:
    def __init__(self, source: Source, members: Mapping[str, Part]) -> None:
        self.source = source
        self.members = members

    def document(self, name: str) -> dict[str, Any]:
        placed = self.members.get(name)
        if placed is None:
            raise self.source.damaged(f"its archive lacks {name}")
        document = parse_json(placed.text(name), self.source.path, name)
        if not isinstance(document, dict):
            raise self.source.damaged(f"{name} is not a table")
        return document

    def check_version(self, document: Mapping[str, Any]) -> None:
        major, minor = document["schema_version"]["major"], document["schema_version"]["minor"]
        if major != MAJOR:
            raise self.source.error(
                f"has version {major!s:.20}.{minor!s:.20} of the schema of exported programs; {MAJOR} is known; export"
                " it with torch 2.8 to 2.13"
            )

    # --- tensors

    def entries(self, config: Mapping[str, Any]) -> dict[str, TensorRef | Unusable]:
        """Return the tensors by name; of those that can't be computed with, the reason."""
        found: dict[str, TensorRef | Unusable] = {}
        for name, entry in config["config"].items():
            if entry["use_pickle"] or entry["tensor_meta"] is None:
                found[name] = Unusable("is pickled in the archive, as tensor subclasses are; save the plain tensor")
            elif entry["tensor_meta"]["layout"] != STRIDED:
                found[name] = Unusable(SPARSE)
            else:
                found[name] = self.tensor(name, entry["path_name"], entry["tensor_meta"])
        return found

    def tensor(self, name: str, home: str, meta: Mapping[str, Any]) -> TensorRef:
        dtype = EXPORTED.get(meta["dtype"])
        if dtype is None:
            raise self.source.error(f"{name}: has a dtype that is not known ({meta['dtype']!s:.20})")
        shape, stride = _fixed(meta["sizes"]), _fixed(meta["strides"])
        (offset,) = _fixed([meta["storage_offset"]])
        if not all(map(is_size, (*shape, *stride, offset))) or len(shape) != len(stride) or len(shape) > MOST_AXES:
            raise self.source.damaged(f"{name:.100} has an offset, a shape or strides that make no sense")
        placed = self.members.get(f"{_WEIGHTS}{home}")
        if placed is None or placed.size % ITEMSIZE[dtype]:
            raise self.source.damaged(f"the bytes of {name:.100} aren't in it")
        # Any name may be a key here, as no tensor of a pickle is in this file.
        storage = StorageRef(home, "uint8", "", "cpu", placed.size)
        return TensorRef(storage, dtype, offset, shape, stride)

    # --- operations

    def program(self, document: Mapping[str, Any]) -> Program:
        graph, signature = document["graph_module"]["graph"], document["graph_module"]["signature"]
        inputs: list[Value] = []
        tensors: dict[Value, str] = {}
        for spec in signature["input_specs"]:
            ((kind, about),) = ((key, one) for key, one in spec.items() if one is not None)
            if kind == "user_input":
                inputs += values_in(_argument(about["arg"]))
            elif kind in ("parameter", "buffer", "tensor_constant"):
                tensors[_value(about["arg"]["name"])] = _of(str, about[f"{kind}_name"])
        outputs = [value for spec in graph["outputs"] for value in values_in(_argument(spec))]
        shapes = {Value(name): _sizes(meta["sizes"]) for name, meta in graph["tensor_values"].items()}
        return Program(tuple(map(_node, graph["nodes"])), tuple(inputs), tensors, tuple(outputs), shapes)


def _node(node: Mapping[str, Any]) -> Node:
    arguments = {one["name"]: _argument(one["arg"]) for one in node["inputs"]}
    gives = tuple(value for one in node["outputs"] for value in values_in(_argument(one)))
    name = node["target"].removeprefix("torch.ops.")
    return Node(name, arguments, gives, tuple(_inside(node["metadata"].get("nn_module_stack", ""))))


def _inside(stack: str) -> Iterator[Inside]:
    """Yield the modules of 'RUN,PATH,CLASS;RUN,PATH,CLASS'."""
    for part in stack.split(";") if stack else ():
        run, path, cls = part.rsplit(",", 2)
        yield Inside(run, path.partition("@")[0], cls)  # the second run of a module is PATH@1


def _argument(argument: Mapping[str, Any]) -> Any:
    """Return an argument as Python has it, with a `Value` for a tensor; what is nothing of these, as a text."""
    ((kind, value),) = argument.items()
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return _value(value["name"])
    if kind == "as_optional_tensor":
        return _argument(value)
    if kind == "as_tensors":
        return [_value(one["name"]) for one in value]
    if kind == "as_optional_tensors":
        return [one for one in map(_argument, value) if one is not None]
    if kind == "as_nested_tensors":
        return [_value(one["name"]) for inner in value for one in inner]
    if kind in _SMALL:
        return _of(_SMALL[kind], value)
    if kind.removesuffix("s") in _SMALL:
        return [_of(_SMALL[kind.removesuffix("s")], one) for one in _of(list, value)]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return next((one for key, one in value.items() if key != "as_name"), None)
    return f"<{kind.removeprefix('as_')}>"


def _value(name: Any) -> Value:
    return Value(_of(str, name))


def _of(wanted: type | UnionType, value: Any) -> Any:
    """Return what has to be of a type; TypeError where it isn't."""
    if not isinstance(value, wanted):
        raise TypeError(f"{value!s:.40} is no {getattr(wanted, '__name__', wanted)}")
    return value


def _fixed(sizes: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    return tuple(size["as_int"] for size in sizes)


def _sizes(sizes: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return sizes; of one that is an expression, its value in the run that was followed, 0 where none stands there."""
    return tuple(
        _of(int, size["as_int"] if "as_int" in size else ((size["as_expr"].get("hint") or {}).get("as_int") or 0))
        for size in sizes
    )
