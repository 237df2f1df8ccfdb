"""Real architectures from transformers, small and with random numbers in every weight and statistic: one command fuses
all of their convolutions and batch norms, `apply` puts the result into the live model, and the logits stay.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from live import done, filled, geometry_of, inputs, load, save, settings
from torch import Tensor, nn

import convtool


@dataclass(frozen=True)
class Architecture:
    """A small model, the recipe for it, and the size of its images."""

    name: str
    fields: dict[str, Any]
    size: tuple[int, int]
    recipe: str = "conv-bn-transformers"

    def model(self) -> nn.Module:
        import transformers  # takes seconds, which tests of something else don't have to wait for

        config = getattr(transformers, f"{self.name}Config")(**self.fields, num_labels=5)
        for name, value in self.fields.items():
            setattr(config, name, value)
        model: nn.Module = getattr(transformers, f"{self.name}ForImageClassification")(config)
        return filled(model)


RESNET = Architecture(
    "ResNet", {"embedding_size": 6, "hidden_sizes": [8, 12, 12, 16], "depths": [1, 2, 1, 1]}, (33, 46)
)
LEVIT = Architecture(
    "Levit",
    {
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [4, 4, 4],
        "image_size": 64,
        "down_ops": [["Subsample", 4, 4, 2, 2, 2], ["Subsample", 4, 4, 2, 2, 2]],
    },
    (64, 64),
)
ARCHITECTURES = [
    RESNET,
    # pads by what the input needs, before each convolution, and has an eps of 1e-3
    Architecture(
        "MobileNetV2",
        {"depth_multiplier": 0.1, "depth_divisible_by": 4, "min_depth": 8, "expand_ratio": 2, "image_size": 32},
        (35, 32),
    ),
    Architecture(
        "RegNet",
        {"embedding_size": 6, "hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 2, 1], "groups_width": 4},
        (40, 37),
    ),
    Architecture(
        "EfficientNet",
        {
            "width_coefficient": 0.2,
            "depth_coefficient": 0.1,
            "depth_divisor": 4,
            "hidden_dim": 256,
            "in_channels": [32, 16, 40],
            "kernel_sizes": [3, 5, 3],
            "out_channels": [16, 40, 80],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 1],
            "expand_ratios": [1, 6, 4],
        },
        (34, 40),
    ),
    LEVIT,  # linear layers and batch norms, in both orders
    Architecture("ConvNext", {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 2, 1]}, (64, 70), "layer-scale"),
    Architecture(
        "Dinov2",
        {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7},
        (28, 28),
        "layer-scale",
    ),
]


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(pixel_values=x).logits
    return found


def norms_and_scales(model: nn.Module) -> int:
    """How many layers there are for a recipe to fuse into the ones before them."""
    scales = sum(
        name.rpartition(".")[2] in ("layer_scale_parameter", "lambda1") for name, _ in model.named_parameters()
    )
    return scales + sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_all_of_them_are_fused_and_the_logits_stay(architecture: Architecture, tmp_path: Path) -> None:
    model = architecture.model()
    path, out = save(model, tmp_path / "model.safetensors"), tmp_path / "fused.safetensors"
    stated = settings(geometry_of(model), tmp_path / "geometry.toml")
    document = done("fuse", path, "--recipe", architecture.recipe, *stated, "-o", out)
    assert len(document["fusions"]) == norms_and_scales(model) >= 4
    assert document["left_alone"] == []
    assert all(fusion["exact"] for fusion in document["fusions"])
    # A .safetensors file doesn't keep the model's order.
    assert all("the model runs it right after" in said for fusion in document["fusions"] for said in fusion["assumed"])
    applied = convtool.apply(copy.deepcopy(model), out)
    assert norms_and_scales(applied) == 0
    x = inputs(3, 3, *architecture.size)
    expected = logits(model, x)
    # Equal to rounding even when held against the part of the logits that depends on the image.
    assert float((logits(applied, x) - expected).abs().max()) < 1e-8 * float(expected.std(0).min())


def test_a_wrong_eps_or_stride_is_found_when_it_is_applied(tmp_path: Path) -> None:
    model = RESNET.model()
    path, out = save(model, tmp_path / "model.safetensors"), tmp_path / "fused.safetensors"
    fields = geometry_of(model)
    layer = "resnet.encoder.stages.1.layers.0.layer.1"
    wrong: list[tuple[str, str, Any, str]] = [
        (f"{layer}.convolution", "stride", [1, 1], "kernel 3,3, padding 1 was fused, and the model has kernel 3,3"),
        (f"{layer}.normalization", "eps", 1e-3, "eps 0.001 was fused, and the model has eps 1e-05"),
    ]
    for name, field, value, message in wrong:
        stated = settings({**fields, name: {**fields[name], field: value}}, tmp_path / "geometry.toml")
        done("fuse", path, "--recipe", "conv-bn-transformers", *stated, "-o", out, "--force")
        live = copy.deepcopy(model)
        with pytest.raises(convtool.RefusedError, match=message):
            convtool.apply(live, out)
        x = inputs(1, 3, *RESNET.size)
        assert torch.equal(logits(model, x), logits(live, x))  # left as it was


def test_what_a_recipe_has_no_name_for_is_left_alone_and_said(tmp_path: Path) -> None:
    model = LEVIT.model()
    path = save(model, tmp_path / "model.safetensors")
    stated = settings(geometry_of(model), tmp_path / "geometry.toml")
    recipe = tmp_path / "r.toml"
    pair = 'name = "{l}.convolution", chain = ["{l}.convolution", "{l}.batch_norm!"], where = ["{l}.convolution"]'
    recipe.write_text(f"fuse = [{{ {pair} }}]")
    document = done("fuse", path, "--recipe", recipe, *stated, "-o", tmp_path / "fused.safetensors")
    (left,) = document["left_alone"]
    assert left.startswith(f"{norms_and_scales(model) - 4} batch norms: ")
    kept = load(tmp_path / "fused.safetensors")
    assert sum(name.endswith("running_mean") for name in kept) == norms_and_scales(model) - 4
