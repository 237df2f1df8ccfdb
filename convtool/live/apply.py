"""Recorded fusions put into a live model."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convtool.checkpoint import Checkpoint, open_checkpoint
from convtool.checkpoint.record import SourceLayer
from convtool.core.conv import Conv
from convtool.core.names import WRAPPERS, unwrap
from convtool.core.tree import Chain, Tree, has_sum, leaves
from convtool.errors import InputError, RefusedError, UsageError, about
from convtool.fusing.edits import goes_on, last_layer
from convtool.kinds.shares import shares
from convtool.live.fused import fused_layers
from convtool.live.inside import check_standardizes_alone, difference, put_numbers, without_layer
from convtool.live.layers import is_plain
from convtool.live.modules import Zeros, live_module
from convtool.live.state import COUNTERS, load_tensors, tensors_of


def apply(model: nn.Module, path: str | Path, *, check: bool = True, root: str | None = None) -> nn.Module:
    """Put a checkpoint's recorded fusions into a live model and load its tensors strictly.

    Each fused layer takes its place; nn.Identity stands where the other layers of its chain were, and a scale that a
    block holds itself becomes None. Where the fused layer took the name of one of its sources, the branches of a sum
    stay and give zeros; where it has a name of its own, by which the model's forward has to call it (an nn.Sequential
    does), all of them are deleted, with the modules that held only them. The model is changed in place; where anything
    fails it is left as it was.

    Args:
        model: as before the fusions; layers are found by name, wrappers such as DistributedDataParallel seen through.
        path: a checkpoint that `convtool fuse` wrote.
        check: hold each layer that goes against what the record says of it; else whatever has its name is replaced.
        root: of a nested torch file with several state dicts, the dotted keys of the one meant.

    Raises:
        InputError: the checkpoint has no record, or its tensors don't load into the changed model.
        UsageError: the model has no layer of a recorded name.
        RefusedError: a layer of the model isn't what was fused, is used under two names, or torch has no module of
            the fused layer's form.

    Warns:
        UserWarning: a layer was fused although its border differs, or for one input size, as the record says.

    >>> import tempfile, convtool
    >>> from convtool.cli.app import run_app
    >>> model = nn.Sequential(nn.Conv2d(2, 3, (3, 1)), nn.BatchNorm2d(3), nn.ReLU()).eval()
    >>> x = torch.randn(1, 2, 5, 4)
    >>> before = model(x)
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     torch.save(model.state_dict(), f"{folder}/net.pt")
    ...     code = run_app(["fuse", f"{folder}/net.pt", "0", "1", "-o", f"{folder}/fused.pt", "--eps", "1e-5"])
    ...     convtool.apply(model, f"{folder}/fused.pt")
    0 → 1 becomes 0
    ...
    Sequential(
      (0): Conv2d(2, 3, kernel_size=(3, 1), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    >>> torch.allclose(model(x), before, atol=1e-6)
    True
    """
    checkpoint = open_checkpoint(path, root)
    apply_checkpoint(model, checkpoint, check=check)
    for fusion in checkpoint.record.fusions if checkpoint.record is not None else ():
        if fusion.limit:
            warnings.warn(f"{fusion.name} {fusion.limit}, as the record of {path} states", stacklevel=3)
    return model


def apply_checkpoint(model: nn.Module, checkpoint: Checkpoint, *, check: bool = True) -> nn.Module:
    """Put in the recorded fusions of a checkpoint that is open already; see `apply`."""
    if checkpoint.record is None:
        raise InputError(f"{checkpoint.path}: holds no convtool record; there is nothing to apply")
    applying = Applying(model, check, keep=check)
    try:
        made = fused_layers(model, checkpoint)
        for fusion in checkpoint.record.fusions:
            # Where it isn't there, it was fused further, and a later record has it.
            applying.put(fusion.name, fusion.tree, made.get(fusion.name))
        applying.load(checkpoint)
    except BaseException:
        applying.undo()
        raise
    return model


class Applying:
    """A live model while fusions are put into it.

    Args:
        check: hold each layer that goes against what is said of it.
        keep: what a module does besides the layer in it; else it is replaced whole.
        making: a context to make new modules in.
    """

    def __init__(
        self,
        model: nn.Module,
        check: bool = True,
        keep: bool = True,
        making: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        self.model, self.check, self.keep = model, check, keep
        self.making = making or contextlib.nullcontext()
        self.made: set[str] = set()
        self.gone: set[str] = set()  # the layers that fusions share, once one of these was put in
        self.names: dict[int, list[str]] = {}  # of each module
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)
        self.rests: dict[tuple[type, str], tuple[str, ...]] = {}  # what stays of modules that do more than a layer
        self.touched: dict[int, tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = {}

    def put(self, name: str, tree: Tree[SourceLayer], fused: Conv | None) -> None:
        """Replace the layers of one fusion.

        Args:
            name: of the fused layer.
            fused: that, its numbers not needed yet; None where only its layers are to go.
        """
        sources = [source for source in leaves(tree) if source.owned() and source.name not in self.gone]
        stays = name in {source.name for source in sources}
        for source in sources:
            self._check_alone(source)
        for source, what, way_out in self.unlike(name, tree) if self.check else ():
            raise RefusedError(
                f"{source.name}: {what}; the fused layer would compute something else than the model did. {way_out}"
            )
        self.gone |= shares(tree, SourceLayer.owned).keys()
        again = goes_on(tree, name) if stays and self.check else []
        if again:
            raise RefusedError(
                f"{name} was fused with {again[0]}, which the model's own code does and would go on to do; take"
                " it out there, and then pass check=False"
            )
        silent: dict[str, nn.Module] = {}
        if fused is not None:
            self._put_fused(name, next((source for source in sources if source.name == name), None), sources[0], fused)
            if not stays:
                self._in_order(name, sources[0])
            self.made.add(name)
            silent = dict(_silenced(tree, name, fused))
        for source in sources:
            # What the fused layer stands for may be the container of its sources: those went with it.
            if source.name == name or source.name.startswith(f"{name}."):
                continue
            if source.kind.parameter and not (source.name in silent and stays):
                self._drop_scale(source)
                continue
            place = self._place(source.name)
            if source.name in silent and stays:
                self._set(place, silent[source.name])
            elif not stays:  # so that nothing goes on to call them
                self._delete(place)
            else:
                self._set(place, self._without(source, place))

    def _without(self, source: SourceLayer, place: str) -> nn.Module:
        """Return what is to stand in a layer's place."""
        if not self.keep:
            return nn.Identity()
        with about(source.name):
            return without_layer(self.model.get_submodule(place), source.kind, self.rests)

    def _put_fused(self, name: str, own: SourceLayer | None, first: SourceLayer, fused: Conv) -> None:
        """Put the fused layer in its place: into the module there, where that does more than torch's own would."""
        near = self._near(first)
        dtype = fused.weight.dtype if near is None else near.dtype  # the model may have been cast
        device = torch.device("cpu") if near is None else near.device
        place = self._place(name)
        if self.keep and own is not None and name not in self.made:
            module = self.model.get_submodule(place)
            if not is_plain(module, own.kind) and "standardized" in own.fields:
                # The weight that is put in stands for what the module's code makes of its tensors.
                check_standardizes_alone(module, own.kind)
            elif not is_plain(module, own.kind):
                self._touch(module)
                with self.making:
                    put_numbers(module, own, fused, dtype, device)
                return
        with self.making, device:
            made = live_module(fused, dtype)
        self._set(place, made.train(self.model.training))

    def _in_order(self, name: str, first: SourceLayer) -> None:
        """Have an nn.Sequential, which runs its modules in order, run a new one where the first of its layers was."""
        path, _, last = self._place(name).rpartition(".")
        around, _, before = self._place(first.name).rpartition(".")
        parent = self.model.get_submodule(path)
        if isinstance(parent, nn.Sequential) and not first.name.startswith(f"{name}."):
            if around != path:
                raise RefusedError(f"{name}: would be the last module of an nn.Sequential; fuse without --name")
            order = [key for key in parent._modules if key != last]
            order.insert(order.index(before), last)
            modules = dict(parent._modules)
            parent._modules.clear()
            parent._modules.update({key: modules[key] for key in order})

    def load(self, checkpoint: Checkpoint) -> None:
        """Load every tensor of the checkpoint; InputError, before any is, where they don't fit."""
        own = tensors_of(self.model)
        state = {self._tensor_place(name): checkpoint.tensor(name) for name in checkpoint.infos}
        missing = [name for name in own if name not in state and name.rpartition(".")[2] not in COUNTERS]
        unexpected = [name for name in state if name not in own]
        wrong = [
            f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("the checkpoint lacks", missing), ("the model has no", unexpected))
            if names
        ]
        wrong += [
            f"{name} is of shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            for name, tensor in state.items()
            if isinstance(own.get(name), Tensor) and own[name].shape != tensor.shape
        ]
        if wrong:
            raise InputError(f"{checkpoint.path}: does not load into the model: {wrong[0]}")
        load_tensors(self.model, state)

    def undo(self) -> None:
        """Put back every module that was replaced."""
        for module, plain, modules, parameters in self.touched.values():
            for own, before in ((vars(module), plain), (module._modules, modules), (module._parameters, parameters)):
                own.clear()
                own.update(before)

    # --- where layers are

    def _find(self, name: str) -> str | None:
        """Return the model's own name of a module, whatever wrappers stand around its parts; None where it has none."""
        path: list[str] = []
        module = self.model
        for part in (*filter(None, unwrap(name).split(".")), ""):
            while part not in module._modules and (wrappers := WRAPPERS & module._modules.keys()):
                path.append(min(wrappers))
                module = module.get_submodule(path[-1])
            if part and module._modules.get(part) is None:
                return None
            if part:
                path.append(part)
                module = module.get_submodule(part)
        return ".".join(path)

    def _place(self, name: str) -> str:
        """Return where a module of that name stands, or is to stand."""
        parent, _, last = unwrap(name).rpartition(".")
        found, around = self._find(name), self._find(parent)
        if found is None and around is None:
            raise UsageError(f"the model has no module {parent!r}, in which {name!r} is to stand")
        return found or _joined(around or "", last)

    def _tensor_place(self, name: str) -> str:
        path, _, parameter = name.rpartition(".")
        found = self._find(path)
        return _joined(path if found is None else found, parameter)

    def _holder(self, source: SourceLayer) -> tuple[str, nn.Module, str]:
        """Return the model's name of the module that a layer is, the module, and the parameter where it is a scale."""
        path, parameter = source.name, ""
        if source.kind.parameter and self._find(path) is None:  # named by its tensor
            path, _, parameter = path.rpartition(".")
        place = self._find(path)
        if place is None:
            raise UsageError(f"the model has no layer {path!r}, which the checkpoint's record names")
        module = self.model.get_submodule(place)
        names = (name for name in source.kind.tensors if name in module._parameters)
        return place, module, parameter or (next(names, "") if source.kind.parameter else "")

    def _check_alone(self, source: SourceLayer) -> None:
        """Raise unless a source is in the model, and under one name."""
        if source.name in self.made:
            return
        shared = self.names.get(id(self._holder(source)[1]), ())
        if len(shared) > 1:
            raise RefusedError(
                f"{' and '.join(shared)} are one module of the model; replacing it in one place would leave the other"
            )

    def unlike(self, name: str, tree: Tree[SourceLayer]) -> Iterator[tuple[SourceLayer, str, str]]:
        """Yield the layers of a fusion that the model has otherwise; each with the difference, and the way out."""
        sources = [source for source in leaves(tree) if source.owned() and source.name not in self.made | self.gone]
        # What the module of the last layer does behind it may stay.
        keeps_rest = name in {source.name for source in sources} or not has_sum(tree)
        for source in sources:
            module = self._holder(source)[1]
            what, way_out = difference(module, source, ends=keeps_rest and source is last_layer(tree))
            if what:
                yield source, what, way_out

    def _near(self, source: SourceLayer) -> Tensor | None:
        """Return a tensor of the device and the dtype that a layer in place of `source` is to have."""
        tensors = (
            tensor
            for module in (self._holder(source)[1], self.model)
            for tensor in itertools.chain(module.parameters(), module.buffers())
        )
        return next((one for one in tensors if one.is_floating_point() or one.is_complex()), None)

    # --- changing the model

    def _touch(self, module: nn.Module) -> None:
        own = dict(vars(module)), dict(module._modules), dict(module._parameters)
        self.touched.setdefault(id(module), (module, *own))

    def _set(self, name: str, module: nn.Module) -> None:
        path, _, last = name.rpartition(".")
        parent = self.model.get_submodule(path)
        self._touch(parent)
        if last in parent._modules:
            parent._modules[last] = module  # keeps its place among the children
            return
        if vars(parent).get(last, parent) is None:  # a block's place for the layer that its branches become
            delattr(parent, last)
        parent.add_module(last, module)

    def _delete(self, name: str) -> None:
        """Delete a module, and then the modules around it that are left without anything.

        What the model's code may go through stays, empty, as a list: an empty nn.Sequential would pass its input on.
        """
        path, _, last = name.rpartition(".")
        parent = self.model.get_submodule(path)
        self._touch(parent)
        del parent._modules[last]
        if path and not parent._modules and not any(True for _ in parent.parameters()):
            self._set(path, nn.ModuleList()) if isinstance(parent, nn.Sequential) else self._delete(path)

    def _drop_scale(self, source: SourceLayer) -> None:
        name, module, parameter = self._holder(source)
        if any(True for _ in module.children()) or len(module._parameters) > 1:
            self._touch(module)
            setattr(module, parameter, None)
        else:
            self._set(name, self._without(source, name))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _silenced(
    tree: Tree[SourceLayer], name: str, fused: Conv | None, counts: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of a fusion that give zeros from now on, so that its sums are what one of their branches gives.

    Args:
        name: of the fused layer, one of the tree's. Behind it, where `fused` is None, values have its output's shape.
        counts: whether the tree's value does; that of a branch to be silenced doesn't.
    """
    if isinstance(tree, SourceLayer):
        if not counts and tree.kind.parameter and not tree.written:
            raise RefusedError(f"{tree.name} is all of a branch, which can only be taken out of the model's code")
        if not counts:
            yield tree.name, Zeros(fused)
        return
    holds = next((part for part in tree.parts if any(source.name == name for source in leaves(part))), None)
    if isinstance(tree, Chain):
        first = None if counts else next((part for part in tree.parts if _has_module(part)), tree.parts[0])
        for part in tree.parts:
            yield from _silenced(part, name, fused if part in (holds, first) else None, part is not first)
    else:
        heard = (holds or tree.parts[0]) if counts else None
        for part in tree.parts:
            yield from _silenced(part, name, fused, part is heard)


def _has_module(tree: Tree[SourceLayer]) -> bool:
    return any(not source.written and not source.kind.parameter for source in leaves(tree))
