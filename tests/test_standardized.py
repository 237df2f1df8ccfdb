"""Weight standardisation: convolutions whose weight is (w - mean) / sqrt(var + eps) of each output channel's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live import done, error, filled, inputs, relative_difference, save
from torch import Tensor, nn

import convtool
from convtool.checkpoint import open_checkpoint
from convtool.core.forward import forward
from convtool.core.tree import leaves
from convtool.errors import ConvtoolError, RefusedError
from convtool.graph.computed import with_own_weight
from convtool.graph.exported import plan_exported
from convtool.live.recorder import record
from convtool.live.trace import nowhere

EPS = 1e-3


def by_definition(weight: Tensor, gain: Tensor | None, eps: float, scale: float) -> Tensor:
    """Return the weight, one output channel after the other, in Python's own numbers."""
    made = torch.empty(weight.shape, dtype=torch.float64)
    for channel, row in enumerate(weight.double().flatten(1).tolist()):
        mean = math.fsum(row) / len(row)
        variance = math.fsum((w - mean) ** 2 for w in row) / len(row)
        factor = scale * (1 if gain is None else float(gain.flatten()[channel]))
        numbers = [(w - mean) / math.sqrt(variance + eps) * factor for w in row]
        made[channel] = torch.tensor(numbers, dtype=torch.float64).reshape(weight.shape[1:])
    return made


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gained", [False, True])
def test_a_stated_layer_computes_what_the_definition_says(axes: int, groups: int, gained: bool, tmp_path: Path) -> None:
    torch.manual_seed(axes)
    kernel = (3, 1, 2)[:axes]
    tensors = {"c.weight": torch.randn(6, 2, *kernel) + 0.5, "c.bias": torch.randn(6)}
    if gained:
        tensors["c.gain"] = torch.randn(6, *(1,) * (axes + 1))
    torch.save(tensors, tmp_path / "net.pt")
    stated: dict[str, Any] = {"standardized": EPS, **({"gain_scale": 0.25} if gained else {})}
    geometry = {"stride": 2, "padding": 1, "dilation": 1, "groups": groups}
    layer = open_checkpoint(tmp_path / "net.pt").conv("c", **geometry, **stated)
    x = inputs(2, 2 * groups, *(7, 5, 6)[:axes]).double()
    weight = by_definition(tensors["c.weight"], tensors.get("c.gain"), EPS, 0.25 if gained else 1.0)
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    expected = convolve(x, weight, tensors["c.bias"].double(), 2, 1, 1, groups)
    assert relative_difference(forward(layer, x), expected) < 1e-13


class Standardized(nn.Conv2d):
    """A convolution that standardises its weight by a batch norm's formula, as timm has it."""

    def made(self, **norm: Any) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=EPS, **norm).reshape_as(self.weight)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.made())


class Scaled(Standardized):
    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = float(self.weight[0].numel()) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.made(weight=(self.gain * self.scale).view(-1)))


class Gained(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.made(weight=self.gain.view(-1)))


def net() -> nn.Sequential:
    return (
        filled(
            nn.Sequential(
                *(Standardized(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
                *(Scaled(8, 6, (3, 1), groups=2), nn.BatchNorm2d(6), nn.ReLU()),
                *(Gained(6, 4, 1, bias=False), nn.BatchNorm2d(4)),
            )
        )
        .eval()
        .requires_grad_(False)
    )


def test_a_live_model_loses_its_batch_norms_and_gets_plain_convolutions() -> None:
    model, x = net().double(), inputs(2, 3, 11, 9).double()
    expected = model(x)
    planned = convtool.plan(model, (3, 11, 9))
    assert [[leaf.name for leaf in leaves(one.tree)] for one in planned.fusions] == [["0", "1"], ["3", "4"], ["6", "7"]]
    assert not planned.left_alone
    fused = convtool.fuse_model(model, (3, 11, 9))
    assert [type(module).__name__ for module in fused.children()] == ["Conv2d", "Identity", "ReLU"] * 2 + [
        "Conv2d",
        "Identity",
    ]
    assert relative_difference(fused(x).detach(), expected) < 1e-12


def test_an_exported_program_says_it_as_the_live_model_does(tmp_path: Path) -> None:
    model, x = net(), inputs(2, 3, 11, 9)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "net.pt2")
    planned = convtool.plan(model, (3, 11, 9))
    assert plan_exported(open_checkpoint(tmp_path / "net.pt2")).recipe() == planned.recipe()


def by_root(m: Standardized, variance: Tensor, mean: Tensor) -> Tensor:
    return (m.weight - mean) / torch.sqrt(variance + EPS)


def of_rows(m: Standardized) -> Tensor:
    rows = m.weight.flatten(1)
    variance, mean = torch.var_mean(rows, dim=-1, keepdim=True, correction=0)
    return ((rows - mean) / (EPS + variance).sqrt()).view_as(m.weight)


AXES: dict[str, Any] = {"dim": [1, 2, 3], "keepdim": True, "unbiased": False}
BY_VARIANCE: dict[str, Callable[[Standardized], Tensor]] = {
    "all other axes": lambda m: by_root(m, *torch.var_mean(m.weight, **AXES)),
    "in another order": lambda m: by_root(m, *torch.var_mean(m.weight, dim=[-1, 1, -2], keepdim=True, correction=0)),
    "rows": of_rows,
    "given their axes later": lambda m: by_root(
        m, *(one.view(-1, 1, 1, 1) for one in torch.var_mean(m.weight, dim=[1, 2, 3], unbiased=False))
    ),
}


class ByVariance(Standardized):
    how = ""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, BY_VARIANCE[self.how](self))


@pytest.mark.parametrize("how", BY_VARIANCE)
def test_a_weight_less_its_mean_over_the_root_of_its_variance_is_standardised(how: str, tmp_path: Path) -> None:
    conv = ByVariance(4, 6, 3, padding=1, groups=2)
    conv.how = how
    model: Any = filled(nn.Sequential(conv, nn.BatchNorm2d(6))).eval().requires_grad_(False).double()
    x, norm = inputs(2, 4, 7, 8).double(), copy.deepcopy(model[1])
    weight = by_definition(conv.weight, None, EPS, 1.0)
    expected = norm(F.conv2d(x, weight, conv.bias, padding=1, groups=2))
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "net.pt2")
    planned = convtool.plan(model, (4, 7, 8))
    assert planned.fields["0"]["standardized"] == EPS
    assert plan_exported(open_checkpoint(tmp_path / "net.pt2")).recipe() == planned.recipe()
    assert not planned.left_alone
    fused = convtool.fuse_model(model, planned=planned)
    assert type(fused.get_submodule("0")) is nn.Conv2d
    assert relative_difference(fused(x).detach(), expected) < 1e-13


CODE = """
import sys
sys.path.insert(0, {folder!r})
from test_standardized import net
"""


def test_files_are_fused_by_the_models_code_proved_and_applied(tmp_path: Path) -> None:
    model, x, out = net(), inputs(2, 3, 11, 9), tmp_path / "fused.safetensors"
    expected, path, code = model(x), save(model, tmp_path / "net.pt"), tmp_path / "code.py"
    code.write_text(CODE.format(folder=str(Path(__file__).parent)))
    about = ("--model", f"{code}:net", "--model-input", "3,11,9")
    fused = done("fuse", path, "--auto", *about, "-o", out)
    assert len(fused["fusions"]) == 3
    assert done("verify", path, out, *about)["equivalent"]
    assert relative_difference(convtool.apply(copy.deepcopy(model), out)(x).detach(), expected) < 1e-5
    # A loader, without the live model, wouldn't see what else the code of such a layer does.
    exit_code, message = error(
        "fuse", path, "--auto", *about, "-o", tmp_path / "o.pt", "--loader", tmp_path / "loader.py"
    )
    assert (exit_code, "which only convtool.apply takes out of a model" in message) == (2, True)
    assert not (tmp_path / "loader.py").exists()


def test_a_file_alone_is_told_and_a_gain_that_nobody_tells_of_is_refused(tmp_path: Path) -> None:
    model, x, out = net(), inputs(2, 3, 11, 9), tmp_path / "fused.safetensors"
    expected, path = model(x), save(model, tmp_path / "net.pt")
    known = ("--eps", "1e-5", "--set", f"3.standardized={EPS}", "--set", f"3.gain_scale={model[3].scale}")
    done("fuse", path, "3", "4", *known, "-o", out)
    assert done("verify", path, out)["equivalent"]
    assert relative_difference(convtool.apply(copy.deepcopy(model), out)(x).detach(), expected) < 1e-5
    refused = error("fuse", path, "3", "4", "--eps", "1e-5", "-o", out, "--force")
    assert "nothing says that its weight is standardised" in refused[1]
    # Of a layer without a gain nothing shows; where its weight was taken as it is, the model has another.
    done("fuse", path, "0", "1", "--eps", "1e-5", "-o", out, "--force")
    with pytest.raises(RefusedError, match="weight standardized"):
        convtool.apply(model, out)


def unbiased(m: Standardized, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.weight, dim=[1, 2, 3], keepdim=True, unbiased=True)
    return m.run(x, (m.weight - mean) / torch.sqrt(variance + EPS))


def with_(m: Standardized, x: Tensor, **how: Any) -> Tensor:
    return m.run(x, by_root(m, *torch.var_mean(m.weight, **{**AXES, **how})))


def unbiased_by_correction(m: Standardized, x: Tensor) -> Tensor:
    return m.run(x, by_root(m, *torch.var_mean(m.weight, dim=[1, 2, 3], keepdim=True, correction=1)))


def unbiased_where_the_mean_is_not(m: Standardized, x: Tensor) -> Tensor:
    variance, _ = torch.var_mean(m.weight, dim=[1, 2, 3], keepdim=True)
    return m.run(x, by_root(m, variance, torch.var_mean(m.weight, **AXES)[1]))


def other_axes(m: Standardized, x: Tensor) -> Tensor:
    return with_(m, x, dim=[2, 3])


def of_input_channels(m: Standardized, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.weight, dim=[0, 2, 3], unbiased=False)  # as many of them as output channels
    return m.run(x, by_root(m, variance.view(-1, 1, 1, 1), mean.view(-1, 1, 1, 1)))


def mean_and_variance_the_other_way_round(m: Standardized, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.weight, **AXES)
    return m.run(x, by_root(m, mean.abs(), variance))


def mean_and_variance_just_swapped(m: Standardized, x: Tensor) -> Tensor:
    mean, variance = torch.var_mean(m.weight, **AXES)
    return m.run(x, (m.weight - mean) / torch.sqrt(variance + 1))


def eps_beside_the_deviation(m: Standardized, x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(m.weight, **AXES)
    return m.run(x, (m.weight - mean) / (deviation + EPS))


def deviation_as_variance(m: Standardized, x: Tensor) -> Tensor:
    return m.run(x, by_root(m, *torch.std_mean(m.weight, **AXES)))


def no_root(m: Standardized, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.weight, **AXES)
    return m.run(x, (m.weight - mean) / (variance + EPS))


def half_the_mean(m: Standardized, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.weight, **AXES)
    return m.run(x, torch.sub(m.weight, mean, alpha=0.5) / torch.sqrt(variance + EPS))


def eps_below_zero(m: Standardized, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.weight, **AXES)
    return m.run(x, (m.weight - mean) / torch.sqrt(variance + -1e-9))


def without_eps(m: Standardized, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.weight, **AXES)
    return m.run(x, (m.weight - mean) / torch.sqrt(variance))


def of_another_layers(m: Standardized, x: Tensor) -> Tensor:
    return m.run(x, by_root(m, *torch.var_mean(m.weight.flip(0), **AXES)))


def along_another_axis(m: Standardized, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.weight, dim=[1, 2, 3], unbiased=False)  # as many of them as input channels
    return m.run(x, by_root(m, variance.view(-1, 1, 1), mean.view(-1, 1, 1, 1)))


def changed_on_the_way(m: Standardized, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.weight, **AXES)
    return m.run(x, by_root(m, variance.mul_(2), mean))


def other_constant(m: Standardized, x: Tensor) -> Tensor:
    return m.run(x, m.made(weight=torch.full((m.out_channels,), 0.5, dtype=x.dtype)))


def with_an_offset(m: Standardized, x: Tensor) -> Tensor:
    return m.run(x, m.made(bias=m.bias))


def changed_in_place(m: Standardized, x: Tensor) -> Tensor:
    weight = m.made()
    weight.mul_(2)
    return m.run(x, weight)


def changed_through_a_view(m: Standardized, x: Tensor) -> Tensor:
    weight = m.made()
    weight[:1].view(-1).mul_(2)
    return m.run(x, weight)


def turned(m: Standardized, x: Tensor) -> Tensor:
    return m.run(x, m.made().transpose(2, 3))


def over_half_channels(m: Standardized, x: Tensor) -> Tensor:
    rows = m.weight.reshape(1, 2 * m.out_channels, -1)
    return m.run(x, F.batch_norm(rows, None, None, training=True, eps=EPS).reshape_as(m.weight))


def of_every_input(m: Standardized, x: Tensor) -> Tensor:
    return m.run(x, m.made() * x.mean())


def padded_by_itself(m: Standardized, x: Tensor) -> Tensor:
    return m.run(F.pad(x, (0, 1, 0, 1)), m.made())


def activated_by_itself(m: Standardized, x: Tensor) -> Tensor:
    return m.run(x, m.made()).relu()


def another_bias(m: Standardized, x: Tensor) -> Tensor:
    return F.conv2d(x, m.made(), torch.ones(m.out_channels, dtype=x.dtype))


def plain_weight_and_another_bias(m: Standardized, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight, torch.ones(m.out_channels, dtype=x.dtype))


@pytest.mark.parametrize(
    "run",
    [
        *(
            unbiased,
            other_constant,
            with_an_offset,
            changed_in_place,
            changed_through_a_view,
            turned,
            over_half_channels,
        ),
        *(unbiased_by_correction, unbiased_where_the_mean_is_not, other_axes, of_input_channels, without_eps),
        *(mean_and_variance_the_other_way_round, mean_and_variance_just_swapped, eps_beside_the_deviation),
        *(deviation_as_variance, no_root, half_the_mean, eps_below_zero, of_another_layers, along_another_axis),
        changed_on_the_way,
        *(of_every_input, padded_by_itself, activated_by_itself, another_bias, plain_weight_and_another_bias),
    ],
)
def test_what_is_nearly_standardised_stays_as_it_is_and_is_listed(
    run: Callable[[Standardized, Tensor], Tensor],
) -> None:
    class Nearly(Standardized):
        def forward(self, x: Tensor) -> Tensor:
            return run(self, x)

    biased = run is with_an_offset
    model = filled(nn.Sequential(Nearly(4, 4, 3, bias=biased), nn.BatchNorm2d(4))).eval().double()
    x = inputs(2, 4, 7, 8).double()
    expected, planned = model(x), convtool.plan(model, (4, 7, 8))
    assert not planned.fusions
    (reason,) = {one.reason for one in planned.left_alone if "0" in one.layers}
    assert reason.endswith(": pad") == (run is padded_by_itself), reason
    assert torch.equal(convtool.fuse_model(model, (4, 7, 8))(x), expected)


class Turned(Standardized):
    how: Callable[[Tensor], Tensor]

    def made(self, **norm: Any) -> Tensor:
        rows = type(self).how(self.weight).reshape(1, self.out_channels, -1)
        return F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=EPS).reshape_as(self.weight)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (lambda w: w.reshape(4, -1).t().reshape(w.shape), False),
        (lambda w: w.permute(0, 2, 3, 1).reshape(w.shape), False),
        (lambda w: w.transpose(0, 1), False),
        (lambda w: w.reshape(4, 12, 3), True),
        (lambda w: w.unsqueeze(0), True),
    ],
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_axes_that_were_turned_make_another_weight(
    how: Callable[[Tensor], Tensor], told: bool, memory: torch.memory_format
) -> None:
    class Made(Turned):
        pass

    Made.how = staticmethod(how)
    model = filled(Made(4, 4, 3)).to(memory_format=memory)  # type: ignore[call-overload]
    x = torch.zeros(1, 4, 7, 8, dtype=torch.float64)
    with nowhere(model) as (mode, kept):
        run = record(model, (x,), (), mode, kept).run.operations
    assert with_own_weight(run, run[-1]).fields == ({"standardized": EPS} if told else {})


def test_a_gain_times_a_tensor_is_no_gain() -> None:
    class Squared(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.run(x, self.made(weight=(self.gain * self.gain).view(-1)))

    model = filled(nn.Sequential(Squared(4, 4, 3), nn.BatchNorm2d(4))).eval().double()
    x = inputs(2, 4, 7, 8).double()
    expected = model(x)
    assert not convtool.plan(model, (4, 7, 8)).fusions
    assert torch.equal(convtool.fuse_model(model, (4, 7, 8))(x), expected)


@pytest.mark.parametrize("run", [mean_and_variance_just_swapped, of_input_channels, changed_on_the_way])
def test_what_is_nearly_standardised_in_a_program_stays(
    run: Callable[[Standardized, Tensor], Tensor], tmp_path: Path
) -> None:
    class Nearly(Standardized):
        def forward(self, x: Tensor) -> Tensor:
            return run(self, x)

    model = filled(nn.Sequential(Nearly(4, 4, 3, bias=False), nn.BatchNorm2d(4))).eval()
    torch.export.save(torch.export.export(model, (inputs(2, 4, 7, 8).double(),)), tmp_path / "net.pt2")
    assert not plan_exported(open_checkpoint(tmp_path / "net.pt2")).fusions


@pytest.mark.parametrize("stated", [{"standardized": 0.0}, {"standardized": EPS, "transposed": True}])
def test_what_no_standardisation_is_is_refused(stated: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"c.weight": torch.randn(4, 4, 3)}, tmp_path / "net.pt")
    with pytest.raises(ConvtoolError, match="standardized"):
        open_checkpoint(tmp_path / "net.pt").conv("c", stride=1, padding=0, dilation=1, groups=1, **stated)
