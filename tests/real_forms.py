"""Networks of other people's libraries, saved in every form of torch's and read back: names, bits, geometry, a fusion.

`python tests/real_forms.py` saves and reads what is installed of transformers, torchvision, ultralytics and monai;
`python tests/real_forms.py WORD` the networks with WORD in their names. Weights are random, sizes small.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
import zoo
from checkpoints import same_bits
from saved_nets import geometry_of
from shell import cli
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import convtool
from convtool import open_checkpoint
from convtool.core.tree import leaves

IMAGE = (1, 3, 64, 64)
OF_TORCH = ("torch.nn.modules.conv", "torch.nn.modules.batchnorm")


def transformers(name: str, **config: Any) -> nn.Module:
    library: Any = importlib.import_module("transformers")
    made: nn.Module = library.AutoModel.from_config(getattr(library, f"{name}Config")(**config))
    return made


def whisper() -> nn.Module:
    library: Any = importlib.import_module("transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 16}
    words = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = library.WhisperConfig(
        **sizes, **heads, **words, use_cache=False, suppress_tokens=[], begin_suppress_tokens=[]
    )
    made: nn.Module = library.WhisperForConditionalGeneration(config)
    return made


def video() -> nn.Module:
    resnet: Any = importlib.import_module("torchvision.models.video.resnet")
    parts = [resnet.Conv3DSimple] * 4, [1] * 4, resnet.BasicStem
    made: nn.Module = resnet.VideoResNet(resnet.BasicBlock, *parts, num_classes=5)
    return made


def mobilenet() -> nn.Module:
    made: nn.Module = importlib.import_module("torchvision.models").mobilenet_v2(width_mult=0.25, num_classes=7)
    return made


def speech(name: str, **positions: int) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convs = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return transformers(name, **sizes, **convs, **positions, apply_spec_augment=False)


SMALL = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
LEVIT = {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1] * 3}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}


@dataclass(frozen=True)
class Network:
    """One network: how it is made, what it is shown, and a convolution with its batch norm, where it has any."""

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = (IMAGE,)
    chain: str = ""
    half: bool = False

    @functools.cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        made = zoo.randomised(self.make()).eval()
        made = made.half() if self.half else made
        with torch.no_grad():
            made(*self.inputs(next(made.parameters()).dtype))  # what sets itself up has done so before it is saved
        return made

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Random numbers; whole ones behind the first input."""
        torch.manual_seed(2)
        first, *others = self.shapes
        return (torch.randn(first, dtype=dtype), *(torch.randint(3, 9, shape) for shape in others))


NETWORKS = (
    Network("ResNet (transformers)", functools.partial(transformers, "ResNet", **SMALL, layer_type="bottleneck"),
            chain="embedder.embedder.convolution embedder.embedder.normalization"),
    Network("RegNet (transformers)", functools.partial(transformers, "RegNet", **SMALL, groups_width=8, layer_type="y"),
            chain="encoder.stages.0.layers.0.layer.1.convolution encoder.stages.0.layers.0.layer.1.normalization"),
    Network("MobileNetV2 (torchvision)", mobilenet, chain="features.2.conv.1.0 features.2.conv.1.1"),
    Network("ConvNeXt (transformers)", functools.partial(transformers, "ConvNext", **CONVNEXT)),
    Network("R3D (torchvision), 3-D", video, ((1, 3, 4, 24, 24),), "stem.0 stem.1"),
    Network("UNet (monai), transposed", functools.partial(zoo.monai, "UNet"), ((1, 1, 16, 16, 16),),
            "model.2.0.conv model.2.0.adn.N"),
    Network("YOLOv8n (ultralytics), half", functools.partial(zoo.ultralytics, "yolov8n.yaml"),
            chain="model.0.conv model.0.bn", half=True),
    Network("ShuffleNetV2 (torchvision), half", functools.partial(zoo.torchvision, "shufflenet_v2_x0_5"),
            chain="conv1.0 conv1.1", half=True),
    Network("Whisper (transformers), tied", whisper, ((1, 8, 32), (1, 32), (1, 5))),
    Network("LeViT (transformers), non-persistent", functools.partial(transformers, "Levit", **LEVIT),
            chain="patch_embeddings.embedding_layer_1.convolution patch_embeddings.embedding_layer_1.batch_norm"),
    Network("Wav2Vec2 (transformers), weight norm", functools.partial(speech, "Wav2Vec2"), ((1, 400),)),
    Network("Conformer (transformers), 1-D",
            functools.partial(speech, "Wav2Vec2Conformer", conv_depthwise_kernel_size=5), ((1, 400),),
            "encoder.layers.0.conv_module.depthwise_conv encoder.layers.0.conv_module.batch_norm"),
)  # fmt: skip


CALLED: list[str] = []
WATCHED = ("pickle.find_class", "os.system", "subprocess.Popen", "exec", "ctypes.dlopen", "socket.connect")


def call(what: str) -> None:
    """Be called, which reading never does."""
    CALLED.append(what)


class Poison:
    """An object that would be made by a call."""

    def __reduce__(self) -> Any:
        return call, ("a function named in the pickle",)


@contextlib.contextmanager
def nothing_called() -> Iterator[None]:
    """Note what is called or imported of a file meanwhile."""

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> None:
        CALLED.append(f"{type(self).__name__} was called")

    with contextlib.ExitStack() as stack:
        for name in ("__init__", "__setstate__", "__call__"):
            stack.enter_context(mock.patch.object(nn.Module, name, poisoned))
        LISTENING.append(True)
        stack.callback(LISTENING.clear)
        yield


LISTENING: list[bool] = []


def listen(event: str, args: Any) -> None:
    if LISTENING and event in WATCHED:
        CALLED.append(f"{event} {args!s:.80}")


def save_module(network: Network, path: Path) -> None:
    model = copy.deepcopy(network.model)
    model.poison = Poison()  # type: ignore[assignment]
    torch.save(model, path)


def save_exported(network: Network, path: Path) -> None:
    inputs = network.inputs(next(network.model.parameters()).dtype)
    torch.export.save(torch.export.export(network.model, inputs, strict=False), path)


def save_traced(network: Network, path: Path) -> None:
    inputs = network.inputs(next(network.model.parameters()).dtype)
    torch.jit.trace(network.model, inputs, strict=False, check_trace=False).save(str(path))


def save_folder(network: Network, path: Path) -> None:
    dcp.save(network.model.state_dict(), checkpoint_id=path)  # type: ignore[attr-defined]


def _one_of_two(rank: int, state: dict[str, Tensor], path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path.parent / 'meeting'}", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    sharded = {name: distribute_tensor(t, mesh, [Shard(t.ndim - 1)]) if t.ndim > 1 else t for name, t in state.items()}
    dcp.save(sharded, checkpoint_id=path)  # type: ignore[attr-defined]
    torch.distributed.destroy_process_group()


def save_sharded(network: Network, path: Path) -> None:
    """Save as two processes do, each tensor cut along its last axis."""
    state = {name: tensor.detach() for name, tensor in network.model.state_dict().items()}
    spawn: Any = importlib.import_module("torch.multiprocessing").spawn
    spawn(_one_of_two, (state, path), nprocs=2)


FORMS: dict[str, tuple[str, Callable[[Network, Path], None]]] = {
    "module": ("net.pt", save_module),
    "scripted": ("script.pt", lambda network, path: torch.jit.script(network.model).save(str(path))),
    "traced": ("trace.pt", save_traced),
    "exported": ("net.pt2", save_exported),
    "folder": ("folder", save_folder),
    "sharded": ("sharded", save_sharded),
}


@dataclass
class Row:
    """What came of one network in one form."""

    note: str = ""
    wrong: list[str] = field(default_factory=list)


def expected_state(network: Network, form: str, path: Path) -> dict[str, Tensor]:
    """What torch's own state dict has; TorchScript keeps buffers that aren't saved, and knows its own."""
    model = torch.jit.load(path) if form in ("scripted", "traced") else network.model
    state: dict[str, Tensor] = model.state_dict()
    return state


def compare(network: Network, form: str, path: Path) -> Row:
    row, wanted = Row(), expected_state(network, form, path)
    open_checkpoint(path).stated  # noqa: B018  what convtool itself imports is imported
    CALLED.clear()
    with nothing_called():
        opened = open_checkpoint(path)
        read = {name: opened.tensor(name) for name in opened.infos}
        stated, _ = opened.stated, opened.program
    row.wrong += sorted(set(CALLED))
    row.wrong += [f"{name} is not torch's" for name in wanted.keys() ^ read.keys()]
    row.wrong += [
        f"{name} has other bits" for name in wanted.keys() & read.keys() if not same_bits(wanted[name], read[name])
    ]
    if form in ("module", "exported"):
        row.wrong += [
            f"{a} and {b} aren't tied" for a, b in tied(wanted) if opened.piece(a).memory != opened.piece(b).memory
        ]
    modules = dict(network.model.named_modules(remove_duplicate=False))
    known = {name: fields for name, one in modules.items() if (fields := fields_of(one))}
    said = {name: fields for name, fields in stated.items() if name in known and fields}
    row.wrong += [f"{name} is {said[name]}, not {known[name]}" for name in said if said[name] != known[name]]
    own = {name for name in known if type(modules[name]).__module__ in OF_TORCH}
    row.wrong += [
        f"{name} is {stated[name]}, a {type(modules.get(name)).__name__}"
        for name in stated.keys() - said
        if stated[name]
    ]
    missing = (own if form == "module" else known.keys()) - said.keys()
    if opened.program is not None:  # of a layer that isn't run, nothing is known
        run = {opened.program.tensors.get(value, "") for node in opened.program.nodes for value in node.reads()}
        missing = {name for name in missing if any(one.startswith(f"{name}.") for one in run)}
    if form in ("module", "exported"):
        row.wrong += [f"nothing is said of {name}" for name in sorted(missing)]
    row.note = f"{len(wanted)} tensors ({len(list(tied(wanted)))} tied), geometry {len(said)}/{len(known)}"
    return row


def tied(state: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield each tensor of a state dict that is an earlier one, with that."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        if tensor.numel() and first.setdefault(tensor.data_ptr(), name) != name:
            yield first[tensor.data_ptr()], name


def fields_of(module: nn.Module) -> dict[str, Any] | None:
    """What a convolution or batch norm says of itself, a subclass with its parent's forward too."""
    if not isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
        return None
    parent: Any = next(cls for cls in type(module).__mro__ if cls.__module__ in OF_TORCH)
    plain = parent.__new__(parent)
    plain.__dict__ = module.__dict__
    return geometry_of(plain)


def fuse(network: Network, form: str, path: Path) -> Row:
    """Fuse the chain by what the file states, verify, and run torch in float64 with what was written."""
    row, out = Row(), path.with_name("fused.safetensors")
    done = cli(f"fuse {path} {network.chain} -o {out} --tensors-only --force --json")
    if done.code:
        return Row("not fused", [done.err])
    (fusion,) = done.document["fusions"]
    row.wrong += [f"assumed: {fusion['assumed']}"] if fusion["assumed"] else []
    verified = cli(f"verify {path} {out}")
    row.wrong += [verified.out + verified.err] if verified.code else []
    first, second = network.chain.split()
    exact, opened, seen = copy.deepcopy(network.model).double(), open_checkpoint(out), list[Tensor]()
    exact.get_submodule(first).register_forward_hook(lambda module, given, made: seen.append(given[0].clone()))
    exact.get_submodule(second).register_forward_hook(lambda module, given, made: seen.append(made.clone()))
    with torch.no_grad():
        exact(*network.inputs(torch.float64))
        fused: Any = exact.get_submodule(first)
        fused.weight = nn.Parameter(opened.tensor(f"{first}.weight").double())
        fused.bias = nn.Parameter(opened.tensor(f"{first}.bias").double())
        error = zoo.difference([seen[1]], [fused(seen[0])])
    row.wrong += [] if error < (1e-2 if network.half else 1e-6) else [f"the fused layer is {error:.1e} off"]
    row.note = f"fused and verified, {error:.0e}"
    return row


def plans(network: Network, form: str, path: Path) -> Row:
    """What the file's own data flow has fused, against a recorded run of the model."""
    done = cli(f"plan {path} --json")
    if done.code:
        return Row("not planned", [done.err])
    there = sorted(" ".join(one["layers"]) for one in done.document["fusions"])
    planned = convtool.plan(network.model, network.shapes[0][1:]).fusions
    here = sorted(" ".join(leaf.name for leaf in leaves(one.tree)) for one in planned)
    return Row(f"plan: {len(there)} fusions", [f"{set(there) ^ set(here)} in one plan alone"] if there != here else [])


def rows(network: Network, folder: Path) -> Iterator[tuple[str, Row]]:
    for form, (name, save) in FORMS.items():
        if form == "sharded" and "LeViT" not in network.name:
            continue
        path = folder / name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save(network, path)
        except Exception as error:
            yield form, Row(f"torch can't: {type(error).__name__}: {' '.join(str(error).split())[:60]}")
            continue
        checks = [compare]
        checks += [fuse] if network.chain and form in ("module", "exported") else []
        checks += [plans] if form == "exported" and len(network.shapes) == 1 else []
        for check in checks:
            try:
                yield form, check(network, form, path)
            except Exception as error:
                yield form, Row("", ["".join(traceback.format_exception(error)[-3:])])


def main() -> None:
    parser = argparse.ArgumentParser(prog="real_forms", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only networks with one of them in their names")
    arguments = parser.parse_args()
    with contextlib.suppress(ImportError):
        importlib.import_module("tvshim")  # operators that torchvision's build for another torch lacks
    sys.addaudithook(listen)
    bad = 0
    print(f"{'':38} {'form':9} {'what was read':45} what is wrong")
    for network in NETWORKS:
        if arguments.words and not any(word in network.name for word in arguments.words):
            continue
        try:
            network.model  # noqa: B018
        except ModuleNotFoundError as error:
            print(f"{network.name}: not tried: {error}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for form, row in rows(network, Path(folder)):
                bad += bool(row.wrong)
                print(f"{network.name:38} {form:9} {row.note:45} {'; '.join(row.wrong)[:900]}", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
