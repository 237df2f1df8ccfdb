"""Networks of other people's libraries, planned and fused: what stays, what is wrong, what is dearer, and why.

`make zoo` runs what is installed of timm, torchvision, transformers, segmentation-models-pytorch, ultralytics,
pytorchcv and monai; `python tests/zoo.py WORD` the architectures with WORD in their names. Weights and statistics are
random; the error is of float64 outputs. The best peer is what torch.fx, timm and ultralytics leave in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import convtool
from convtool.core.tree import leaves
from convtool.graph.left_over import NEVER

SMALL = (3, 64, 64)
LARGE = (3, 224, 224)


def timm(name: str) -> Any:
    return importlib.import_module("timm").create_model(name, pretrained=False)


def torchvision(name: str) -> Any:
    where, _, what = f"torchvision.models.{name}".rpartition(".")
    keywords: dict[str, Any] = {"weights_backbone": None} if "segmentation" in name else {}
    keywords |= {"init_weights": True} if name == "googlenet" else {}
    return getattr(importlib.import_module(where), what)(weights=None, **keywords)


def transformers(name: str) -> Any:
    library: Any = importlib.import_module("transformers")
    small = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
    configs: dict[str, Callable[[], Any]] = {
        "resnet": lambda: library.ResNetConfig(**small, layer_type="bottleneck"),
        "regnet": lambda: library.RegNetConfig(**small, groups_width=8, layer_type="y"),
        "levit": lambda: library.LevitConfig(hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1] * 3),
        "segformer": lambda: library.SegformerConfig(),
        "mobilevit": lambda: library.MobileViTConfig(image_size=64),
        "detr": lambda: library.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=library.ResNetConfig(**small, out_features=["stage2"]),
            encoder_layers=1,
            decoder_layers=1,
            d_model=32,
            num_queries=5,
        ),
    }
    classes = {"segformer": "SegformerForSemanticSegmentation", "detr": "DetrForObjectDetection"}
    config = configs[name]()
    if name in classes:
        return getattr(library, classes[name])(config)
    return library.AutoModel.from_config(config)


def segmentation_models_pytorch(name: str) -> Any:
    made, encoder = name.removesuffix(")").split("(")
    library: Any = importlib.import_module("segmentation_models_pytorch")
    return getattr(library, made)(encoder, encoder_weights=None)


def ultralytics(name: str) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module("ultralytics.nn.tasks").DetectionModel(name, verbose=False)


def pytorchcv(name: str) -> Any:
    return importlib.import_module("pytorchcv.model_provider").get_model(name, pretrained=False)


def monai(name: str) -> Any:
    unet: Any = importlib.import_module("monai.networks.nets").UNet
    return unet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="batch")


FORTY = """
timm resnet18; timm densenet121; timm regnetx_002; timm efficientnet_b0; timm mobilenetv2_050
timm mobilenetv3_small_050; timm mobileone_s0; timm repvgg_a0; timm fastvit_t8; timm repvit_m0_9
timm repghostnet_050; timm levit_128s L; timm tiny_vit_5m_224 L; timm efficientvit_m0 L; timm efficientformer_l1 L
timm swiftformer_xs; timm skresnet18; timm nfnet_l0; timm convnext_atto; timm convmixer_768_32
torchvision resnet50; torchvision mobilenet_v2; torchvision mobilenet_v3_small; torchvision shufflenet_v2_x0_5
torchvision mnasnet0_5; torchvision googlenet; torchvision segmentation.deeplabv3_mobilenet_v3_large
torchvision video.r3d_18 3,8,32,32; transformers resnet; transformers regnet; transformers levit L; transformers detr
transformers segformer; transformers mobilevit; segmentation_models_pytorch Unet(resnet18)
segmentation_models_pytorch Unet(timm-efficientnet-b0); ultralytics yolov8n.yaml; ultralytics yolov9t.yaml
pytorchcv preresnet10 L; monai UNet 1,16,16,16
"""


@dataclass(frozen=True)
class Architecture:
    library: str
    name: str
    size: tuple[int, ...]

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = globals()[self.library](self.name)
        return randomised(made).eval()


def architectures() -> Iterator[Architecture]:
    for line in FORTY.replace("\n", ";").split(";"):
        if words := line.split():
            size = {"": SMALL, "L": LARGE}.get(words[2] if words[2:] else "")
            yield Architecture(words[0], words[1], size or tuple(map(int, words[2].split(","))))


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """The model with random statistics, and random numbers where its parameters are constant."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        noise = torch.rand(tensor.shape, generator=generator)
        last = name.rpartition(".")[2]
        if last == "running_mean":
            tensor.copy_(noise - 0.5)
        elif last == "running_var":
            tensor.copy_(noise + 0.5)
        elif isinstance(tensor, nn.Parameter) and tensor.numel() > 1 and tensor.min() == tensor.max():
            tensor.copy_(noise + 0.5 if tensor.flatten()[0] == 1 else (noise - 0.5) * 0.2)
    return model


@dataclass
class Row:
    """What came of one architecture."""

    name: str
    size: tuple[int, ...]
    before: int = 0  # batch norms
    after: int | None = None
    peer: int | None = None
    error: float | None = None
    work_before: int = 0
    work_after: int = 0
    seconds: float = 0.0
    export: float = 0.0
    changed: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    tracer: str = ""
    failed: str = ""

    def wrong(self) -> list[str]:
        """What of the promises isn't kept."""
        found = [self.failed] if self.failed else []
        found += ["wrong"] if self.error is not None and not self.error < 1e-9 else []
        found += ["dearer"] if self.work_after > self.work_before else []
        behind = self.after is not None and self.peer is not None and self.after > self.peer
        found += ["behind its best peer"] if behind else []
        found += [f"changed: {', '.join(self.changed[:3])}"] if self.changed else []
        found += [f"silent: {len(self.silent)} ({', '.join(self.silent[:3])})"] if self.silent else []
        return found


def norms(model: nn.Module) -> list[str]:
    """The batch norms of a model, by name."""
    return [name for name, one in model.named_modules() if getattr(one, "running_mean", None) is not None]


def linears(model: nn.Module) -> list[str]:
    """What has to be accounted for besides: convolutions and linear layers."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return [name for name, one in model.named_modules() if isinstance(one, kinds)]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [v for v in pytree.tree_leaves(model(x)) if isinstance(v, Tensor) and v.is_floating_point()]
    if not made:  # an output of a class that pytree doesn't know
        made = [v for v in vars(model(x)).values() if isinstance(v, Tensor)]
    return made


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest, relative to the largest output."""
    assert [x.shape for x in expected] == [x.shape for x in got]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, got, strict=True) if a.numel())


def peers(model: nn.Module, library: str) -> Iterator[int]:
    """How many batch norms each peer leaves."""
    with contextlib.suppress(Exception):
        fuse: Any = importlib.import_module("torch.fx.experimental.optimization").fuse
        yield len(norms(fuse(copy.deepcopy(model))))
    if library == "timm":
        with contextlib.suppress(Exception):
            yield len(norms(importlib.import_module("timm.utils.model").reparameterize_model(model)))
    with contextlib.suppress(Exception):
        copied: Any = copy.deepcopy(model)
        if library == "ultralytics":
            copied.fuse(verbose=False)
        elif library == "timm":
            copied.fuse()
        yield len(norms(copied))


def image(model: nn.Module) -> dict[str, Any]:
    """All that a model holds, comparable: numbers by bits, everything else by what it is."""
    seen: dict[str, Any] = {}

    def look(value: Any, path: str, depth: int) -> None:
        if isinstance(value, Tensor):
            numbers = None if value.is_meta or type(value) not in (Tensor, nn.Parameter) else value.detach().cpu()
            bits = (
                None if numbers is None else hash(numbers.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            )
            seen[path] = (
                type(value).__name__,
                id(value),
                str(value.dtype),
                tuple(value.shape),
                bits,
                value.requires_grad,
            )
        elif isinstance(value, dict) and depth < 6:
            seen[path] = (type(value).__name__, list(map(str, value)))
            for key, one in value.items():
                look(one, f"{path}.{key}", depth + 1)
        elif isinstance(value, list | tuple | set) and depth < 6:
            seen[path] = (type(value).__name__, len(value))
            for number, one in enumerate(value):
                look(one, f"{path}[{number}]", depth + 1)
        elif isinstance(value, int | float | str | bool | None):
            seen[path] = value
        else:
            seen[path] = (type(value).__name__, id(value))

    for name, module in model.named_modules(remove_duplicate=False):
        look(dict(vars(module)), name, 0)
    seen["generator"] = hash(torch.get_rng_state().numpy().tobytes())
    return seen


def try_out(one: Architecture, **how: Any) -> Row:
    """Plan and fuse one architecture."""
    row = Row(f"{one.library} {one.name}", one.size)
    model = one.build()
    example = torch.zeros(1, *one.size)
    with torch.no_grad():
        model(example)  # what sets itself up has done so in what the peers and the export see
    exported = copy.deepcopy(model)
    start = time.process_time()
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.export(exported, (example,), strict=False)
    row.export = time.process_time() - start
    row.before = len(norms(model))
    row.peer = min(peers(model, one.library), default=None)
    before = image(model)
    start = time.process_time()
    plan = convtool.plan(model, one.size, **how)
    row.seconds = time.process_time() - start
    after = image(model)
    row.changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    row.work_before, row.work_after = plan.total.multiply_adds, plan.total_after.multiply_adds
    said = {leaf.name for merge in plan.fusions for leaf in leaves(merge.tree)}
    for alone in plan.left_alone:
        row.reasons.setdefault(alone.reason, []).append(", ".join(alone.layers))
        said |= set(alone.layers)
    row.silent = [name for name in (*norms(model), *linears(model)) if name not in said]
    torch.manual_seed(2)
    x = torch.randn(2, *one.size, dtype=torch.float64)
    exact = copy.deepcopy(model).double()
    expected = outputs(exact, x)
    fused = convtool.fuse_model(exact, planned=plan)
    idle = {name for one in plan.left_alone if one.reason == NEVER for name in one.layers}  # peers take those out whole
    row.error, row.after = difference(expected, outputs(fused, x)), len(set(norms(fused)) - idle)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only architectures with one of them in their names")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every Nth, from the Ith on")
    parser.add_argument("--why", action="store_true", help="also print what was left and why")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    with contextlib.suppress(ImportError):
        importlib.import_module("tvshim")  # operators that torchvision's build for another torch lacks
    part, parts = map(int, arguments.part.split("/"))
    chosen = [
        a for a in architectures() if not arguments.words or any(w in f"{a.library} {a.name}" for w in arguments.words)
    ]
    print(f"{'':45} norms after peer    error     multiply-adds  seconds export")
    rows = []
    for one in chosen[part::parts]:
        try:
            row = try_out(one)
        except ModuleNotFoundError as error:
            print(f"{one.library} {one.name}: not tried: {error}")
            continue
        except Exception as error:
            row = Row(f"{one.library} {one.name}", one.size, failed=f"{type(error).__name__}: {str(error)[:300]}")
            if arguments.why:
                traceback.print_exc()
        rows.append(row)
        wrong = "" if row.error is None else f"{row.error:.1e}"
        work = f"{row.work_before / 1e6:.4g}M -> {row.work_after / 1e6:.4g}M"
        print(
            f"{row.name:45} {row.before:5} {row.after!s:>5} {row.peer!s:>4} {wrong:>8} {work:>20}"
            f" {row.seconds:5.1f} {row.export:5.1f}  {'; '.join(row.wrong())}",
            flush=True,
        )
        if arguments.why:
            for reason, names in row.reasons.items():
                print(f"    {len(names)} left: {names[0]}: {reason}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.exit(any(row.wrong() for row in rows))


if __name__ == "__main__":
    main()
