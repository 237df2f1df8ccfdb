"""Live modules for tests: random numbers in them, saving them, running the program on what was saved."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convtool.cli.app import run_app

Model = TypeVar("Model", bound=nn.Module)
CLOSE = 1e-12  # what float64 leaves of a difference, relative to the largest output


def filled(model: Model, seed: int = 0) -> Model:
    """The model in float64 and eval mode, every parameter and statistic a random number, none the initial one."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("num_batches_tracked"):
            tensor.fill_(3)
        if not tensor.is_floating_point():
            continue
        numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            numbers = numbers.square() + 0.3
        elif tensor.dim() == 1 and name.endswith("weight"):
            numbers = 1 + 0.3 * numbers  # so that a deep network's outputs go on to depend on its inputs
        elif tensor.dim() > 1:
            numbers /= tensor[0].numel() ** 0.5
        tensor.data.copy_(numbers)
    return model


def save(model: nn.Module, path: Path) -> Path:
    """The model's state dict as a file, its format by the suffix."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(model.state_dict(), path)
    return path


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    return state


def run(*words: object) -> tuple[int, dict[str, Any]]:
    """The program's exit code and its JSON document; `fuse` leaves it to the test to verify what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    words = (*words, "--no-verify") if words[0] == "fuse" else words
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_app([*map(str, words), "--json"])
    document: dict[str, Any] = json.loads(out.getvalue())
    return code, document


def done(*words: object) -> dict[str, Any]:
    """The JSON document of a run that has to succeed."""
    code, document = run(*words)
    assert code == 0, document
    return document


def error(*words: object) -> tuple[int, str]:
    """Exit code and message of a run that has to fail."""
    code, document = run(*words)
    assert code > 1, document
    message: str = document["error"]["message"]
    assert "\n" not in message
    return code, message


def settings(fields: dict[str, dict[str, object]], path: Path) -> list[str]:
    """--geometry with a file of these fields, by layer or pattern."""
    lines = (
        f"{json.dumps(layer)} = {{ {', '.join(f'{name} = {json.dumps(value)}' for name, value in table.items())} }}"
        for layer, table in fields.items()
    )
    path.write_text("\n".join(lines))
    return ["--geometry", str(path)]


def geometry_of(model: nn.Module) -> dict[str, dict[str, object]]:
    """Every field of every convolution and batch norm of a model, as a geometry file states it."""
    fields: dict[str, dict[str, object]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            fields[name] = {
                "stride": list(module.stride),
                "padding": _padding(module.padding),
                "dilation": list(module.dilation),
                "groups": module.groups,
                "padding_mode": module.padding_mode,
                "transposed": module.transposed,
                "output_padding": list(module.output_padding),
            }
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            fields[name] = {"eps": module.eps}
    return fields


def _padding(padding: str | tuple[int, ...]) -> object:
    if isinstance(padding, str):
        return 0 if padding == "valid" else padding
    return list(padding)


def relative_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest number."""
    assert one.shape == other.shape
    assert one.isfinite().all()
    return float((one - other).abs().max() / one.abs().max())


def inputs(*shape: int, seed: int = 9) -> Tensor:
    """Random normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def assert_same_outputs(one: nn.Module, other: nn.Module, shapes: Sequence[tuple[int, ...]]) -> None:
    """Both models in eval mode give the same for random inputs of these shapes, but for the rounding of float64."""
    for number, shape in enumerate(shapes):
        x = inputs(*shape, seed=number)
        assert relative_difference(one.eval()(x), other.double().eval()(x)) < CLOSE
