"""Plans of whole models: every linear stretch is found and nothing else, and the fused network computes the same."""

from __future__ import annotations

import copy
import itertools
import random
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import random_models
import torch
import torch.nn.functional as F
from layers import kind
from live import CLOSE, assert_same_outputs, filled
from networks import NETWORKS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import convtool
from convtool.checkpoint import open_checkpoint
from convtool.core.tree import BASE, Chain, LayerRef, Sum, Tree, leaves
from convtool.errors import UsageError
from convtool.fusing.recipe import Known, parse_recipe, resolve
from convtool.graph.again import taken_off
from convtool.graph.cut import Price, partition
from convtool.graph.exported import plan_exported
from convtool.graph.flow import Flow, Step, find_stretches
from convtool.graph.judge import Exact
from convtool.graph.left_over import ALONE, NEVER
from convtool.graph.operations import read_flow
from convtool.graph.planned import Plan, tree_in_short
from convtool.graph.recorded_run import INPUT, Operation, Run
from convtool.kinds.kind import Layer, TensorInfo
from convtool.kinds.stated import FieldSources
from convtool.kinds.written import layer_of_operation, read_layer
from convtool.live.state import StateCheckpoint

# --- cutting a sequence


def every_partition(count: int) -> list[list[tuple[int, int]]]:
    found = []
    for cuts in itertools.product((False, True), repeat=count - 1):
        edges = [0, *(place for place, cut in enumerate(cuts, 1) if cut), count]
        found.append(list(itertools.pairwise(edges)))
    return found


@pytest.mark.parametrize("count", range(1, 8))
def test_the_cheapest_partition_is_that_of_all_partitions_tried_one_by_one(count: int) -> None:
    generator = random.Random(count)
    for _ in range(30):
        costs: dict[tuple[int, int], Price | None] = {}
        for start, stop in itertools.combinations(range(count + 1), 2):
            possible = stop - start == 1 or generator.random() < 0.7
            costs[start, stop] = (generator.randint(0, 5), generator.randint(0, 3)) if possible else None
        total, pieces = partition(count, lambda start, stop, costs=costs: costs[start, stop])  # type: ignore[misc]
        prices = [
            tuple(map(sum, zip(*each, strict=True)))
            for ways in every_partition(count)
            if None not in (each := [costs[piece] for piece in ways])
        ]
        assert total == min(prices)
        assert pieces in every_partition(count)
        assert tuple(map(sum, zip(*(costs[piece] or () for piece in pieces), strict=True))) == total


# --- stretches of a flow


def flow(*steps: Step, outputs: tuple[int, ...] = (), apart: dict[str, str] | None = None) -> Flow:
    return Flow((Step((), SHAPE), *steps), frozenset(outputs), apart or {})


SHAPE = (1, 3, 8, 6)
SOME = {"weight": TensorInfo("weight", "float32", (3, 3), 36)}


def layer(name: str, read: int, axes: int = 2, shape: tuple[int, ...] = SHAPE, what: str = "conv") -> Step:
    return Step((read,), shape, Layer(name, kind(what), SOME), axes)


def copy_of(read: int) -> Step:
    return Step((read,), SHAPE, read_layer("identity()"), 2)


def flat(read: int) -> Step:
    return Step((read,), (1, 144), read_layer("flatten(8,6)"), 2)


def add(*reads: int) -> Step:
    return Step(reads, SHAPE, adds=True)


def other(*reads: int) -> Step:
    return Step(reads, SHAPE)


a, b, c, d = (LayerRef(name) for name in "abcd")
SKIP = Sum((Chain((a,)), LayerRef("identity()")))
FLOWS: list[tuple[str, Flow, list[Tree[LayerRef]], list[str]]] = [
    ("one after the other", flow(layer("a", 0), layer("b", 1), outputs=(2,)), [Chain((a, b))], []),
    ("something between", flow(layer("a", 0), other(1), layer("b", 2)), [a, b], []),
    ("a copy between", flow(layer("a", 0), copy_of(1), layer("b", 2)), [Chain((a, b))], []),
    (
        "read twice",
        flow(layer("a", 0), layer("b", 1), other(1, 2)),
        [a, b],
        ["the value between them is read 2 times"],
    ),
    (
        "an output in between",
        flow(layer("a", 0), layer("b", 1), outputs=(1, 2)),
        [a, b],
        ["the value between them is read 2 times or is an output of the model"],
    ),
    (
        "a copy that is read twice",
        flow(layer("a", 0), copy_of(1), layer("b", 2), other(2)),
        [a, b],
        ["the value between them is read 2 times"],
    ),
    ("runs twice", flow(layer("a", 0), layer("b", 1), layer("b", 2)), [a], ["b: it runs 2 times"] * 2),
    ("apart", flow(layer("a", 0), layer("b", 1), apart={"a": "tied"}), [b], ["a: tied"]),
    ("other axes", flow(layer("a", 0), layer("b", 1, axes=0)), [a, b], []),
    ("a sum", flow(layer("a", 0), layer("b", 0), add(1, 2)), [Sum((Chain((a,)), Chain((b,))))], []),
    (
        "a sum of three, and on",
        flow(layer("a", 0), layer("b", 0), add(1, 2), layer("c", 0), add(3, 4), layer("d", 5)),
        [Chain((Sum((Chain((a,)), Chain((b,)), Chain((c,)))), d))],
        [],
    ),
    (
        "a sum of a copy's",
        flow(copy_of(0), layer("a", 1), layer("b", 0), add(2, 3)),
        [Sum((Chain((a,)), Chain((b,))))],
        [],
    ),
    ("a skip", flow(layer("a", 0), add(0, 1)), [Chain((a,))], []),
    ("a skip, and on", flow(layer("a", 0), add(0, 1), layer("b", 2)), [taken_off(Chain((SKIP, b)), 1)], []),
    ("two sources", flow(other(0), layer("a", 0), layer("b", 1), add(2, 3)), [Chain((a,)), Chain((b,))], []),
    ("twice the same", flow(layer("a", 0), add(1, 1)), [a], []),
    (
        "a flatten",
        flow(layer("a", 0), flat(1), layer("b", 2, 0, (1, 5), "linear")),
        [Chain((a, LayerRef("flatten(8,6)"), b))],
        [],
    ),
    ("nothing after a flatten", flow(layer("a", 0), flat(1), outputs=(2,)), [a], []),
    (
        "a batch norm after a flatten",
        flow(layer("a", 0), flat(1), layer("b", 2, 0, (1, 144), "batch_norm")),
        [a, b],
        [],
    ),
]


@pytest.mark.parametrize(("run", "trees", "reasons"), [row[1:] for row in FLOWS], ids=[row[0] for row in FLOWS])
def test_stretches_are_layers_with_nothing_in_between(
    run: Flow, trees: list[Tree[LayerRef]], reasons: list[str]
) -> None:
    stretches, left_alone = find_stretches(run)
    assert stretches == trees
    assert [one.reason for one in left_alone] == reasons


# --- operations

MAP = (2, 3, 4, 5)
OPERATIONS: list[tuple[str, dict[str, Any], tuple[int, ...], str | None]] = [
    ("flatten.using_ints", {"start_dim": 1}, (2, 60), "flatten(4,5)"),
    ("view.default", {"size": [2, 60]}, (2, 60), "flatten(4,5)"),
    ("view.default", {"size": [2, 3, 20]}, (2, 3, 20), None),  # only the map, and not the channels
    ("view.default", {"size": [6, 20]}, (6, 20), None),  # the batch too
    ("view.default", {"size": MAP}, MAP, "identity()"),
    ("clone.default", {}, MAP, "identity()"),
    ("dropout.default", {"p": 0.5, "train": False}, MAP, "identity()"),
    ("dropout.default", {"p": 0.5, "train": True}, MAP, None),
    ("add.Tensor", {"other": 0}, MAP, "identity()"),
    ("add.Tensor", {"other": 0.5}, MAP, None),
    ("add.Tensor", {"other": 0, "alpha": 2}, MAP, None),
    ("add.Tensor", {"other": None}, MAP, None),
    ("mul.Tensor", {"other": None}, MAP, None),  # by a tensor that nobody knows
    ("relu.default", {}, MAP, None),
]


@pytest.mark.parametrize(("name", "arguments", "gives", "text"), OPERATIONS)
def test_an_operation_is_the_layer_that_its_kind_says(
    name: str, arguments: dict[str, Any], gives: tuple[int, ...], text: str | None
) -> None:
    found = layer_of_operation(f"aten.{name}", {"self": None, **arguments}, MAP, gives)
    assert found == (None if text is None else read_layer(text))


def operations(*run: Operation) -> Run:
    return Run((Operation(INPUT, (), SHAPE), *run), frozenset({len(run)}))


def inside(name: str, read: int, *tensors: str, count: int = 1) -> Operation:
    return Operation("aten.convolution.default", (read,), SHAPE, tensors, {}, (name, count))


def trees(run: Run, *names: str) -> tuple[list[Tree[LayerRef]], dict[str, str]]:
    tensors = {name: {"weight": TensorInfo(f"{name}.weight", "float32", (3, 3, 1, 1), 36)} for name in names}
    flow = read_flow(run, {name: Layer(name, kind("conv"), tensors[name]) for name in names}, {})
    return find_stretches(flow)[0], dict(flow.apart)


def test_the_operations_of_a_layers_run_are_one_step() -> None:
    constant = Operation("aten.t.default", (), (3, 3), ("b.weight",), {}, ("b", 1))
    run = operations(inside("a", 0, "a.weight"), constant, inside("b", 1), replace(inside("b", 3), name="aten.view"))
    assert trees(run, "a", "b") == ([Chain((a, b))], {})


@pytest.mark.parametrize(
    ("run", "found", "apart"),
    [
        ([inside("a", 0, "a.weight"), inside("b", 1, "b.weight"), inside("b", 2, "a.weight")], [], {"a", "b"}),
        ([inside("a", 0, "a.weight"), inside("b", 1, "b.weight"), inside("b", 1, "b.weight")], [a], {"b"}),
        ([inside("a", 0, "a.weight"), inside("b", 1, "b.weight"), inside("b", 0, "b.weight")], [a], {"b"}),
        ([inside("a", 0, "a.weight"), Operation("aten.abs.default", (), (3, 3, 1, 1), ("a.weight",))], [], {"a"}),
    ],
    ids=["another's tensors", "two values out", "two values in", "its tensors read outside"],
)
def test_what_a_layers_run_does_besides_makes_it_none(
    run: list[Operation], found: list[Tree[LayerRef]], apart: set[str]
) -> None:
    made = trees(Run(operations(*run).operations, frozenset(range(2, len(run) + 1))), "a", "b")
    assert (made[0], set(made[1])) == (found, apart)


# --- architectures


@dataclass(frozen=True)
class Case:
    """A model, planned once; and what a walk over its modules says of it."""

    model: nn.Module
    size: tuple[int, ...]
    plan: Plan

    @property
    def chains(self) -> list[str]:
        return [tree_in_short(one.tree) for one in self.plan.fusions]


def transformers_model(name: str) -> nn.Module:
    import transformers

    kind, fields, _ = ARCHITECTURES[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    head = "ForSemanticSegmentation" if kind == "Segformer" else "Model"
    model: nn.Module = getattr(transformers, f"{kind}{head}")(config)
    return model


STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16]}
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SEGFORMER = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1] * 4}
WAVE = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
# Name -> (kind, what makes it small, size of the input).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "resnet": ("ResNet", STAGES | {"depths": [1, 2]}, (3, 40, 33)),
    "regnet": ("RegNet", STAGES | {"depths": [1, 1], "groups_width": 4}, (3, 33, 40)),
    "mobilenet v1": ("MobileNetV1", {"depth_multiplier": 0.05, "min_depth": 4}, (3, 33, 40)),
    "mobilenet v2": (
        "MobileNetV2",
        {"depth_multiplier": 0.05, "min_depth": 4, "depth_divisible_by": 4, "expand_ratio": 2},
        (3, 40, 33),
    ),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, (3, 64, 32)),
    "vit": ("ViT", TRANSFORMER | {"image_size": (16, 24), "patch_size": 8}, (3, 16, 24)),
    "segformer": ("Segformer", SEGFORMER | {"decoder_hidden_size": 16}, (3, 64, 32)),
    "wav2vec2": ("Wav2Vec2", TRANSFORMER | WAVE | {"num_conv_pos_embedding_groups": 2}, (400,)),
}
FROM_TRANSFORMERS = list(ARCHITECTURES)
SAMPLES = list(NETWORKS)


@cache
def case(name: str) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NETWORKS[name]() if name in NETWORKS else transformers_model(name)
        size = (1, 8, 8) if name in NETWORKS else ARCHITECTURES[name][2]
        model = filled(model)
        return Case(model, size, convtool.plan(model, size, everything=name in NETWORKS))


def neighbours(model: nn.Module) -> set[tuple[str, str]]:
    """Convolutions and the batch norms that are registered right behind them, in these models' habit: each pair."""
    found = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for (one, first), (other, second) in itertools.pairwise(module.named_children()):
            if isinstance(first, nn.modules.conv._ConvNd) and isinstance(second, nn.modules.batchnorm._BatchNorm):
                found.add((prefix + one, prefix + other))
    return found


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [value for value in pytree.tree_leaves(model(x)) if isinstance(value, Tensor)]


def assert_same(model: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Outputs equal to what float64 leaves, and different inputs different outputs (or equal zeros would do)."""
    expected, got = outputs(model, x), outputs(fused, x)
    assert len(expected) == len(got)
    for before, after in zip(expected, got, strict=True):
        assert before.shape == after.shape
        assert float(before.abs().max()) > 1e-6
        assert float((before - after).abs().max()) <= CLOSE * float(before.abs().max())
    assert float((expected[0][0] - expected[0][1]).abs().max()) > 1e-6


def random_input(size: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FROM_TRANSFORMERS)
def test_every_convolution_with_its_batch_norm_is_found_and_nothing_that_is_none(name: str) -> None:
    found = case(name)
    pairs = {
        (names[0], names[1])
        for one in found.plan.fusions
        if len(names := [leaf.name for leaf in leaves(one.tree)]) == 2
    }
    walked = neighbours(found.model)
    if name == "convnext":  # no batch norm; a scale behind the last linear layer of each block
        blocks = [path for path, _ in found.model.named_parameters() if path.endswith("layer_scale_parameter")]
        assert pairs == {
            (f"{path}.pwconv2", path) for path in (block.removesuffix(".layer_scale_parameter") for block in blocks)
        }
        assert len(pairs) == 4
    else:
        assert pairs == walked
        assert len(found.plan.fusions) == len(walked)
    norms = [m for m in found.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(walked) == len(norms), "the walk misses some"
    assert bool(walked) == (name in ("resnet", "regnet", "mobilenet v1", "mobilenet v2", "segformer"))
    assert all(one.exact is Exact.EVERY_SIZE for one in found.plan.fusions)


SAMPLE_STRETCHES = {
    "chains": ["reduce → spread → gather", "widen → narrow"],
    "conv_bn": ["conv1 → bn1", "conv2 → bn2", "conv3 → bn3", "conv4 → bn4"],
    "repvgg": [
        "stage0: (rbr_dense.conv → rbr_dense.bn) + (rbr_1x1.conv → rbr_1x1.bn)",
        "stage1: (rbr_dense.conv → rbr_dense.bn) + (rbr_1x1.conv → rbr_1x1.bn) + rbr_identity",
        "stage2: (rbr_dense.conv → rbr_dense.bn) + (rbr_1x1.conv → rbr_1x1.bn)",
    ],
    "separable1d": [f"block{i}: depthwise → pointwise" for i in range(3)],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_stretches_of_the_sample_models(name: str) -> None:
    assert case(name).chains == SAMPLE_STRETCHES[name]


@pytest.mark.parametrize("name", [*FROM_TRANSFORMERS, *SAMPLES])
def test_the_fused_network_computes_the_same(name: str) -> None:
    found = case(name)
    fused = convtool.fuse_model(copy.deepcopy(found.model), planned=found.plan)
    assert_same(found.model, fused, random_input(found.size))
    gone = {leaf.name for one in found.plan.fusions for leaf in leaves(one.tree)} - {
        one.name for one in found.plan.fusions
    }
    for path in gone:
        module = fused.get_submodule(path) if "(" not in path else nn.Identity()
        assert not list(module.parameters()) or path.split(".")[-1].isdigit(), path


EXPORTED = [*(name for name in FROM_TRANSFORMERS if "net v" not in name and name != "segformer"), *SAMPLES]


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_has_the_plan_of_the_live_model(name: str, tmp_path: Path) -> None:
    found = case(name)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(found.model, (random_input(found.size)[:1],)), tmp_path / "net.pt2")
    plan = plan_exported(open_checkpoint(tmp_path / "net.pt2"), everything=name in SAMPLES)
    assert plan.recipe() == found.plan.recipe()
    assert plan.left_alone == found.plan.left_alone
    assert (plan.total, plan.total_after) == (found.plan.total, found.plan.total_after)
    assert plan.uncounted == found.plan.uncounted


@pytest.mark.parametrize("name", SAMPLES)
def test_a_plan_as_a_recipe_makes_the_same_fusions(name: str) -> None:
    found = case(name)
    recipe = parse_recipe(tomllib.loads(found.plan.recipe()), "plan.toml")
    state = StateCheckpoint.of(found.model)
    facts = state.layers
    resolved = resolve(recipe, Known({BASE: facts}))
    ours = {one.name: one.tree for one in found.plan.fusions}
    assert {one.name: set(leaves(one.tree)) for one in resolved} == {k: set(leaves(v)) for k, v in ours.items()}
    geometry = convtool.geometry_of(found.model)
    sources = FieldSources((recipe.geometry,))
    for one in resolved:
        for leaf in leaves(one.tree):
            stated = geometry.get(leaf.name, {})
            as_recipe = sources.fields(leaf.name)
            assert as_recipe.keys() >= stated.keys() - {"output_padding"}
            if "eps" in stated:
                assert as_recipe["eps"] == stated["eps"]


# --- networks made to be got wrong


class Net(nn.Module):
    """A network whose forward is a function of it, so that each case is a line or two."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        """Whatever it was made to do."""
        return self.run(self, x)


def conv(i: int = 4, o: int = 4, k: Any = (3, 1), **fields: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **fields)


def planned(
    net: nn.Module, size: tuple[int, ...] = (4, 9, 7), **options: Any
) -> tuple[list[str], dict[str, str], Plan]:
    """The fusions, what was left alone, and the plan; the fused network, where there is any, computes the same."""
    net = filled(net)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modules = dict(net.named_modules())
    found = convtool.plan(net, size, **options)
    assert dict(net.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    fused = convtool.fuse_model(copy.deepcopy(net), planned=found)
    assert_same(net, fused, random_input(size))
    alone = {" ".join(one.layers): one.reason for one in found.left_alone}
    return [tree_in_short(one.tree) for one in found.fusions], alone, found


def test_registration_order_is_not_believed() -> None:
    """A pre-activation network registers conv1, bn1, conv2, bn2 and runs bn1, conv1, bn2, conv2."""
    net = Net(
        lambda m, x: m.conv2(F.relu(m.bn2(m.conv1(F.relu(m.bn1(x)))))),
        conv1=conv(bias=False),
        bn1=nn.BatchNorm2d(4),
        conv2=conv(),
        bn2=nn.BatchNorm2d(4),
    )
    assert planned(net)[0] == ["conv1 → bn2"]


def test_a_batch_norm_before_a_convolution_is_exact_where_that_does_not_pad() -> None:
    net = Net(
        lambda m, x: m.b(m.bn2(F.relu(m.a(m.bn1(x))))),
        bn1=nn.BatchNorm2d(4, eps=1e-2),
        a=conv(k=(3, 5)),
        bn2=nn.BatchNorm2d(4),
        b=conv(padding=(1, 0)),
    )
    chains, alone, _ = planned(net)
    assert chains == ["bn1 → a"]
    assert alone == {"bn2 b": "the first row and the last row of the output would differ"}


def test_a_module_that_runs_twice_is_left_alone() -> None:
    net = Net(lambda m, x: m.bn(m.a(F.relu(m.a(x)))), a=conv(), bn=nn.BatchNorm2d(4))
    chains, alone, _ = planned(net)
    assert chains == []
    assert alone == {"a bn": "a: it runs 2 times"}


@pytest.mark.parametrize("tail", ["an output", "another reader", "a norm of it"])
def test_a_value_that_is_read_elsewhere_stays(tail: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = m.bn(y)
        if tail == "an output":
            return z, y
        return z + F.relu(y) if tail == "another reader" else z * y.abs().max()

    chains, alone, _ = planned(Net(forward, a=conv(), bn=nn.BatchNorm2d(4)))
    assert chains == []
    assert list(alone) == ["a bn"]
    assert alone["a bn"].startswith("the value between them is read 2 times")


def test_tied_weights_are_left_alone_and_so_is_a_layer_of_two_names() -> None:
    first, second = conv(bias=False), conv(bias=False)
    second.weight = first.weight
    net = Net(
        lambda m, x: m.bn2(m.b(F.relu(m.bn1(m.a(x))))), a=first, bn1=nn.BatchNorm2d(4), b=second, bn2=nn.BatchNorm2d(4)
    )
    chains, alone, _ = planned(net)
    assert chains == []
    assert alone["a bn1"] == "a: a.weight is one tensor with b.weight (tied weights)"
    shared = conv()
    net = Net(lambda m, x: m.bn(m.a(x)), a=shared, again=shared, bn=nn.BatchNorm2d(4))
    chains, alone, _ = planned(net)
    assert chains == []
    assert "tied weights" in alone["a bn"]


def test_a_weight_that_is_read_outside_of_its_layer_stays() -> None:
    net = Net(lambda m, x: m.bn(m.a(x)) * m.a.weight.norm(), a=conv(), bn=nn.BatchNorm2d(4))
    chains, alone, _ = planned(net)
    assert chains == []
    assert alone == {"a bn": "a: a.weight is read outside of the layer's own run as well"}


class PadsItself(nn.Conv2d):
    """A convolution that pads in its own forward, as padding that follows the input's size is written."""

    def forward(self, x: Tensor) -> Tensor:
        """The padded input's convolution."""
        return super().forward(F.pad(x, (1, 1, 0, 2)))


def test_a_layer_with_code_of_its_own_is_found_by_its_operation_and_keeps_the_rest_of_its_code() -> None:
    net = filled(Net(lambda m, x: m.bn(m.a(x)), a=PadsItself(4, 4, 3), bn=nn.BatchNorm2d(4)))
    assert planned(net)[0] == ["a → bn"]
    assert "a" not in convtool.geometry_of(net)
    fused = convtool.fuse_model(copy.deepcopy(net), (4, 9, 7))
    assert isinstance(fused.a, PadsItself)
    assert_same_outputs(net, fused, [(2, 4, 9, 7), (1, 4, 6, 11)])


def test_weight_norms_and_hooks_are_not_lost() -> None:
    normed = nn.utils.parametrizations.weight_norm(conv())
    hooked = conv()
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    net = Net(
        lambda m, x: m.bn2(m.b(F.relu(m.bn1(m.a(x))))), a=normed, bn1=nn.BatchNorm2d(4), b=hooked, bn2=nn.BatchNorm2d(4)
    )
    chains, alone, _ = planned(net)
    assert chains == []
    assert alone["a bn1"].startswith("a: its weight is computed from others")


@pytest.mark.parametrize(
    "turned",
    [Tensor.t, lambda w: w.T, lambda w: w.mT, lambda w: w.transpose(0, 1).contiguous(), lambda w: w.flip(0)],
    ids=["t", "T", "mT", "contiguous", "flip"],
)
def test_a_square_weight_that_is_read_in_another_order_is_another_weight(turned: Callable[[Tensor], Tensor]) -> None:
    layers = {"a": nn.Linear(5, 5), "bn": nn.BatchNorm1d(5)}
    net = filled(Net(lambda m, x: m.bn(F.linear(x, turned(m.a.weight), m.a.bias)), **layers))
    fused = convtool.fuse_model(copy.deepcopy(net), (5,))
    assert isinstance(fused.bn, nn.BatchNorm1d)
    assert_same_outputs(net, fused, [(3, 5)])


def test_what_is_changed_in_place_is_another_value() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y.relu_()
        z = m.bn1(y)
        w: Tensor = m.b(z)
        w += 1
        return m.bn2(w)  # type: ignore[no-any-return]

    net = Net(forward, a=conv(), bn1=nn.BatchNorm2d(4), b=conv(), bn2=nn.BatchNorm2d(4))
    assert planned(net)[0] == ["bn1 → b"]


def halves(y: Tensor) -> Tensor:
    return y * 0.5


def shuffles(y: Tensor) -> Tensor:
    return torch.flatten(y.reshape(len(y), 2, 2, *y.shape[2:]).transpose(1, 2), 1, 2)


@pytest.mark.parametrize("between", [halves, shuffles, lambda y: halves(shuffles(y)), lambda y: shuffles(halves(y))])
@pytest.mark.parametrize("tail", [nn.Identity, lambda: nn.BatchNorm2d(4)])
def test_what_the_code_does_before_the_layer_is_undone_before_it(
    between: Callable[[Tensor], Tensor], tail: Callable[[], nn.Module]
) -> None:
    """One layer stands in the convolution's place: behind the code, where a batch norm was before it."""
    run = lambda m, x: m.tail(m.b(between(m.bn(x))))  # noqa: E731
    chains, _, found = planned(Net(run, bn=nn.BatchNorm2d(4), b=conv(o=4), tail=tail()))
    assert [one.name for one in found.fusions] == ["b"]
    assert "bn → " in chains[0]
    behind = planned(Net(lambda m, x: m.bn(between(m.b(x))), b=conv(), bn=nn.BatchNorm2d(4)))[0]
    assert behind[0].startswith("b → ")


@pytest.mark.parametrize(
    ("run", "chains"),
    [
        (lambda m, x: m.a(x) * 0.5 + m.b(x), []),
        (lambda m, x: m.bn(m.a(x)) * 3 + m.b(x), ["a → bn"]),
        (lambda m, x: m.bn(m.a(x) * 3 + m.b(x) * 3), []),
        (lambda m, x: m.bn((m.a(x) + m.b(x)) * 49), ["(a + b) → scale(49.0) → bn → scale(0.02040816326530612)"]),
        (lambda m, x: m.a(x) + m.b(m.bn(x) * 49), ["scale(0.02040816326530612) → bn → scale(49.0) → b"]),
    ],
)
def test_what_the_code_does_in_a_branch_keeps_it_apart(run: Callable[[Any, Tensor], Tensor], chains: list[str]) -> None:
    assert planned(Net(run, a=conv(), b=conv(), bn=nn.BatchNorm2d(4)))[0] == chains


SEVERAL: list[Callable[[Tensor], Any]] = [
    lambda x: torch.cat([x, x.tanh()]).chunk(2),
    lambda x: torch.cat([x, x.tanh()]).split(len(x)),
    lambda x: torch.stack([x, x.tanh()]).unbind(0),
    lambda x: x.chunk(2, 2),
    lambda x: torch.var_mean(x, 3, keepdim=True),
]


@pytest.mark.parametrize("make", SEVERAL)
def test_the_values_of_one_operation_are_several(make: Callable[[Tensor], Any]) -> None:
    layers: dict[str, nn.Module] = {"a": conv(k=1), "b": conv(k=1), "bn": nn.BatchNorm2d(4)}

    def added(m: Any, x: Tensor) -> Tensor:
        one, two = make(x)
        return m.a(one) + m.b(two)  # type: ignore[no-any-return]

    def skipped(m: Any, x: Tensor) -> Tensor:
        one, two = make(x)
        return m.bn(m.a(one) + two)  # type: ignore[no-any-return]

    for run in (added, skipped):
        assert planned(Net(run, **layers), (4, 8, 6))[0] == []


class Training(nn.BatchNorm2d):
    """A batch norm that can't be put into eval mode."""

    def train(self, mode: bool = True) -> Training:
        return super().train(True)


def with_another_eps(m: Any, x: Tensor) -> Tensor:
    m.bn.eps = 0.5
    y = m.bn(m.a(x))
    m.bn.eps = 1e-5
    return y  # type: ignore[no-any-return]


def test_a_batch_norm_is_what_it_is_while_it_runs() -> None:
    chains, alone, _ = planned(Net(with_another_eps, a=conv(), bn=nn.BatchNorm2d(4)))
    assert chains == []
    assert any("another eps" in reason for reason in alone.values())
    net = filled(Net(lambda m, x: m.bn(m.a(x)), a=conv(), bn=Training(4)))
    found = convtool.plan(net, (4, 9, 7))
    assert not found.fusions
    assert any("training mode" in one.reason for one in found.left_alone)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.b(m.a(x)) / m.a.out_channels**0.5,
        lambda m, x: m.bn(m.b(m.a(x))) * sum(isinstance(one, nn.BatchNorm2d) for one in m.modules()),
        lambda m, x: m.bn(m.b(m.a(x))) * sum(one.numel() for one in m.parameters()),
        lambda m, x: m.bn(m.b(m.a(x))) + getattr(m.bn, "eps", 0),
    ],
)
def test_a_forward_that_computes_with_what_its_modules_are_keeps_them(run: Callable[[Any, Tensor], Tensor]) -> None:
    net = Net(run, a=conv(4, 7, k=1), b=conv(7, 4, k=1), bn=nn.BatchNorm2d(4))
    planned(net)
    planned(net, everything=True)


class Grows(nn.Module):
    """A branch whose code adds to what its layer gives, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(k=1)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's value, and x."""
        y: Tensor = self.inner(x)
        y += x
        return y


def test_code_may_add_in_place_to_what_an_emptied_branch_gives() -> None:
    assert planned(Net(lambda m, x: m.a(x) + m.b(x), a=conv(k=1), b=Grows()))[0] == ["a + b.inner"]


def scales_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    y.mul_(0.5)
    return m.b(y) + x[:, :, 2:]  # type: ignore[no-any-return]


def adds_to_what_was_read(m: Any, x: Tensor) -> Tensor:
    y = F.relu(x)
    z = m.bn(y)
    y.add_(1)
    return m.b(z) + y[:, :, 2:]  # type: ignore[no-any-return]


@pytest.mark.parametrize("run", [scales_in_place, adds_to_what_was_read])
def test_a_layer_whose_output_is_memory_of_its_own_stays_where_something_is_changed_in_place(
    run: Callable[[Any, Tensor], Tensor],
) -> None:
    """Without the batch norm, what it reads is the very tensor that the convolution reads."""
    assert planned(Net(run, bn=nn.BatchNorm2d(4), b=conv()))[0] == []
    before = lambda m, x: m.bn(m.b(x).mul_(0.5))  # noqa: E731
    assert planned(Net(before, b=conv(), bn=nn.BatchNorm2d(4)))[0] == ["b → scale(0.5) → bn → scale(2.0)"]


@pytest.mark.parametrize("size", [2, 3])
def test_a_batch_norm_before_a_transposed_layer_stays_though_each_output_reads_one_tap(size: int) -> None:
    """Its bias is multiplied by another tap at each output; taps that are alike would hide that."""
    up = nn.ConvTranspose2d(4, 3, size, stride=size)
    chains, alone, _ = planned(Net(lambda m, x: m.up(m.bn(x)), bn=nn.BatchNorm2d(4), up=up))
    assert chains == []
    assert "unevenly" in alone["bn up"]
    even = Net(lambda m, x: m.b(m.wide(m.bn(x))), bn=nn.BatchNorm2d(4), wide=nn.Upsample(scale_factor=2), b=conv(k=1))
    assert planned(even)[0] == ["bn → b"]


def test_branches_that_are_added_in_place_become_one_layer() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.a(x)
        y.add_(m.b(x))  # and y is the name that is read
        return F.relu(y, inplace=True)

    assert planned(Net(forward, a=conv(), b=conv(bias=False)))[0] == ["a + b"]


def reads_what_was_added(m: Any, x: Tensor) -> Tensor:
    y, w = m.a(x), m.b(x)
    y.add_(w)
    return y * F.relu(w)  # type: ignore[no-any-return]


def reads_what_was_there_before(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = F.relu(y)
    y.add_(m.b(x))
    return y + z  # type: ignore[no-any-return]


def reads_a_view_of_before(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    view = y.flatten(1)
    y.add_(m.b(x))
    return view * 2  # type: ignore[no-any-return]


@pytest.mark.parametrize("run", [reads_what_was_added, reads_what_was_there_before, reads_a_view_of_before])
def test_what_is_added_in_place_and_read_besides_stays(run: Callable[[Any, Tensor], Tensor]) -> None:
    assert planned(Net(run, a=conv(), b=conv(bias=False)))[0] == []


def test_dropouts_identities_and_copies_are_nothing() -> None:
    net = Net(
        lambda m, x: m.bn(m.i(m.drop(m.a(x)).contiguous().clone())),
        a=conv(),
        drop=nn.Dropout2d(0.5),
        i=nn.Identity(),
        bn=nn.BatchNorm2d(4),
    )
    assert planned(net)[0] == ["a → bn"]


def test_branches_that_add_become_one_layer_and_a_skip_stays() -> None:
    net = Net(
        lambda m, x: m.c(F.relu(m.a(x) + m.norm(x) + m.b(x))) + x,
        norm=nn.BatchNorm2d(4),
        a=conv(k=3, padding=1),
        b=conv(k=1, groups=2),
        c=conv(k=3, padding=1),
    )
    chains, _, found = planned(net)
    assert chains == ["a + norm + b"]
    assert found.fusions[0].name == "a"
    fused = convtool.fuse_model(copy.deepcopy(net), planned=found)
    assert isinstance(fused.get_submodule("a"), nn.Conv2d)
    assert not list(fused.get_submodule("norm").parameters())


def test_a_sum_inside_of_a_chain() -> None:
    net = Net(
        lambda m, x: m.bn(m.tail(m.b(y := m.a(x)) + m.c(y))),
        a=conv(4, 6, 1),
        b=conv(6, 5, (3, 1)),
        c=nn.Sequential(conv(6, 5, (3, 1), bias=False), nn.BatchNorm2d(5)),
        tail=conv(5, 3, (1, 3)),
        bn=nn.BatchNorm2d(3),
    )
    chains, alone, _ = planned(net)
    assert chains == ["(b + (c.0 → c.1)) → tail → bn"]
    assert alone["a b"] == alone["a c.0"] == "the value between them is read 2 times"


@pytest.mark.parametrize(
    ("stacked", "summed", "keepdim"),
    [*itertools.product((0, 1, -1, 4, -4), range(-5, 5), (False,)), (1, 1, True), (-1, 4, True)],
)
def test_a_stack_is_a_sum_where_it_is_added_up_along_its_own_axis(stacked: int, summed: int, keepdim: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m.a(x), m.b(x)], stacked).sum(summed, keepdim=keepdim)

    net = Net(forward, a=conv(k=3, padding=1), b=conv(k=1))
    assert planned(net)[0] == (["a + b"] if stacked % 5 == summed % 5 and not keepdim else [])


def test_branches_of_different_strides_stay_apart_with_the_reason() -> None:
    net = Net(lambda m, x: m.a(x) + m.b(x), a=conv(k=1, stride=(2, 1)), b=conv(k=(2, 1), stride=(2, 1)))
    net_of_two_strides = Net(lambda m, x: m.a(x)[..., :5, :] + m.b(x), a=conv(k=1), b=conv(k=1, stride=(2, 1)))
    assert planned(net_of_two_strides, (4, 10, 7))[0] == []
    chains, alone, _ = planned(net, (4, 10, 7))
    assert chains == []
    assert "outputs differ in size" in alone["a b"]


def test_a_convolution_a_flatten_and_a_linear_layer_become_one() -> None:
    net = Net(
        lambda m, x: m.second(m.first(torch.flatten(m.a(x), 1))),
        a=conv(4, 5, (3, 2)),
        first=nn.Linear(5 * 7 * 6, 6),
        second=nn.Linear(6, 3),
    )
    chains, _, found = planned(net)
    assert chains == ["a → flatten(7,6) → first → second"]
    assert found.fusions[0].fused.geometry.kernel_size == (9, 7)
    cheap, alone, _ = planned(net, everything=False)
    assert cheap == ["a → flatten(7,6) → first → second"]
    assert alone == {}


def test_a_forward_that_counts_on_the_channels_keeps_its_layers() -> None:
    net = Net(lambda m, x: m.out(m.a(x).view(-1, 5 * 7 * 6)), a=conv(4, 5, (3, 2)), out=nn.Linear(5 * 7 * 6, 6))
    chains, alone, _ = planned(net)
    assert chains == []
    assert alone["a out"].startswith("the model's code doesn't run without the layers: ")


def test_a_forward_that_looks_at_the_kinds_of_its_modules_keeps_them() -> None:
    """A batch norm that is gone takes the activation behind it along: the shapes say nothing of that."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for module in m.children():
            x = F.relu(module(x)) if isinstance(module, nn.BatchNorm2d) else module(x)
        return x

    chains, alone, _ = planned(Net(forward, a=conv(), bn=nn.BatchNorm2d(4), b=conv()))
    assert chains == []
    assert alone == {"a bn": "the model's code does something else without the layers", "b": ALONE}


@pytest.mark.parametrize("how", ["an attribute", "a list", "a hook", "a sum in an attribute"])
def test_a_value_that_the_model_puts_aside_stays(how: str) -> None:
    aside: list[Tensor] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.seq(x)
        if how == "an attribute":
            m.kept = y
        elif how == "a list":
            aside.append(y)
        elif how == "a sum in an attribute":
            y = y + m.other(x)
            m.kept = y
        return m.bn(y)  # type: ignore[no-any-return]

    net = filled(Net(forward, seq=nn.Sequential(conv()), other=conv(), bn=nn.BatchNorm2d(4)))
    if how == "a hook":
        net.get_submodule("seq").register_forward_hook(lambda module, inputs, output: aside.append(output))
    found = convtool.plan(net, (4, 9, 7))
    assert found.fusions == ()
    assert not aside
    kept = {"seq.0: the model's code keeps its value", "the model's code keeps its value"}
    assert kept & {one.reason for one in found.left_alone}
    assert {name for one in found.left_alone for name in one.layers} == {"seq.0", "other", "bn"}


def test_a_transposed_layer_that_is_told_its_output_size_takes_in_what_only_scales() -> None:
    """That size needs an output padding which the layer's attributes don't have; the code goes on to ask for it."""
    net = Net(
        lambda m, x: m.b(m.bn(m.a(x, output_size=(18, 13)))),
        a=nn.ConvTranspose2d(4, 4, (3, 1), 2, (1, 0)),
        bn=nn.BatchNorm2d(4),
        b=nn.ConvTranspose2d(4, 4, 3, padding=1),
    )
    chains, alone, _ = planned(net)
    assert chains == ["a → bn"]
    assert alone == {"a bn b": "a: the model's code gives it an output size of its own"}


class Scaled(nn.Module):
    """A block with a scale of its own, behind a linear layer; it can do without, or not."""

    def __init__(self, needs_it: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.gamma: Any = nn.Parameter(torch.ones(5))
        self.needs_it = needs_it

    def forward(self, x: Tensor) -> Tensor:
        """The linear layer times the scale."""
        y: Tensor = self.linear(x)
        return y * self.gamma if self.needs_it or self.gamma is not None else y


class LayerScale(nn.Module):
    """A scale that is a module."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(5))
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """The scaled input."""
        return x * self.lambda1 + self.shift


def test_dangling_scales_go_into_the_layer_before() -> None:
    net = Net(lambda m, x: m.c(m.b(F.gelu(m.a(x)))), a=Scaled(False), b=nn.Linear(5, 5), c=LayerScale())
    assert planned(net, (3, 5))[0] == ["a.linear → a", "b → c"]
    net = Net(lambda m, x: m.c(m.b(F.gelu(m.a(x)))), a=Scaled(True), b=nn.Linear(5, 5), c=LayerScale(1.0))
    chains, alone, _ = planned(net, (3, 5))
    assert chains == []
    assert alone["a.linear a"].startswith("the model's code doesn't run without the layers: ")


class FrozenBatchNorm(nn.Module):
    """As detection networks have it: four buffers, and the formula in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input."""
        weight, bias, mean, var = (self.get_buffer(n).reshape(1, -1, 1, 1) for n in
                                   ("weight", "bias", "running_mean", "running_var"))  # fmt: skip
        scale = weight * (var + 3e-4).rsqrt()
        return x * scale + (bias - mean * scale)


@pytest.mark.parametrize("everything", [False, True])
def test_batch_norms_only_leaves_convolutions_apart(everything: bool) -> None:
    """The last convolution of a block and the first of the next, whose output in between is a backbone's feature."""
    net = Net(lambda m, x: m.n(m.c(m.bn(m.a(x)))), a=conv(), bn=nn.BatchNorm2d(4), c=conv(), n=nn.BatchNorm2d(4))
    assert planned(net, everything=everything)[0] == ["a → bn → c → n"]
    chains, alone, _ = planned(net, everything=everything, batch_norms_only=True)
    assert chains == ["a → bn", "c → n"]
    assert set(alone.values()) == {"only batch norms are to be fused (--batch-norms-only)"}
    fused = convtool.fuse_model(filled(net), (4, 9, 7), batch_norms_only=True)
    assert [name for name, one in fused.named_modules() if isinstance(one, nn.Identity)] == ["bn", "n"]


def test_a_frozen_batch_norm_is_one_with_the_eps_that_its_code_has() -> None:
    net = Net(lambda m, x: m.bn(m.a(x)), a=conv(bias=False), bn=FrozenBatchNorm(4))
    assert planned(net)[0] == ["a → bn"]
    assert convtool.geometry_of(net)["bn"] == {"eps": 3e-4}


@pytest.mark.parametrize(
    ("size", "verdict"), [((4, 8, 9), Exact.THIS_SIZE), ((4, 9, 9), None), ((4, 8, 10), None)], ids=str
)
def test_what_is_exact_for_one_size_is_taken_when_that_is_enough(size: tuple[int, ...], verdict: Exact | None) -> None:
    """Patches without bias that fill 8 x 9 exactly, then a padded layer."""
    net = Net(lambda m, x: m.b(m.a(x)), a=conv(k=(2, 3), stride=(2, 3), bias=False), b=conv(k=3, padding=1))
    assert planned(net, size)[0] == []
    chains, alone, found = planned(net, size, fixed_size=True, everything=True)
    assert chains == (["a → b"] if verdict else [])
    if verdict:
        assert found.fusions[0].exact is verdict
        assert f"input_size = {list(size)}" in found.recipe()
    else:
        assert "would differ" in alone["a b"]


def test_the_cheapest_partition_keeps_a_bottleneck_apart() -> None:
    """Wide to narrow to wide: the pair takes fewer multiply-adds than the product; the batch norms go in still."""
    net = Net(
        lambda m, x: m.bn(m.c(m.b(m.a(x)))),
        a=conv(4, 16, 1),
        b=conv(16, 2, 1),
        c=conv(2, 16, 1),
        bn=nn.BatchNorm2d(16),
    )
    assert planned(net, everything=True)[0] == ["a → b → c → bn"]
    chains, alone, found = planned(net, everything=False)
    assert chains == ["a → b", "c → bn"]
    assert "it would cost more" in next(iter(alone.values()))
    assert found.total.multiply_adds > found.total_after.multiply_adds
    assert planned(net, measure=True)[2].fusions[0].seconds is not None


def test_what_the_totals_leave_out_is_counted() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Conv2d(4, 2, 1))
    assert convtool.plan(layers, (3, 5, 6)).uncounted == 2 * 4 + 4
    assert convtool.plan(layers[:2], (3, 5, 6)).uncounted == 0


def test_costs_are_of_the_run_that_was_followed() -> None:
    net = Net(lambda m, x: m.bn(m.a(x)), a=conv(4, 6, (3, 2), bias=False, groups=2), bn=nn.BatchNorm2d(6))
    (one,) = planned(net, (4, 9, 7))[2].fusions
    weight, positions = 6 * 2 * 6, 7 * 6
    assert one.before.parameters == weight + 2 * 6
    assert one.after.parameters == weight + 6
    assert one.before.multiply_adds == (weight + 6) * positions
    assert one.after.multiply_adds == weight * positions


# --- what stands between layers, and beside them, in the model's code


class Norm(nn.BatchNorm2d):
    """A batch norm with its activation inside."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(), act

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input's activation."""
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


def test_what_a_batch_norm_has_inside_besides_stays() -> None:
    net = Net(
        lambda m, x: m.two(m.b(m.one(m.a(x)))), a=conv(), one=Norm(4, nn.PReLU()), b=conv(), two=Norm(4, nn.ReLU())
    )
    assert planned(net)[0] == ["a → one", "b → two"]
    fused = convtool.fuse_model(filled(net), (4, 9, 7))
    assert [name for name, _ in fused.one.named_parameters()] == ["act.weight"]  # type: ignore[union-attr]


class Functional(nn.BatchNorm2d):
    """One whose activation isn't a module."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input's activation."""
        return F.relu(super().forward(x))


def test_what_cannot_be_kept_of_a_module_keeps_its_layer() -> None:
    chains, alone, _ = planned(Net(lambda m, x: m.bn(m.a(x)), a=conv(), bn=Functional(4)))
    assert chains == []
    assert "whose code does more than the layer" in alone["a bn"]


class UpStandardized(nn.ConvTranspose2d):
    """A transposed layer that standardises its weight, which no layer here does."""

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """What the weight of a batch norm's formula gives."""
        rows = self.weight.reshape(1, self.in_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, eps=1e-3).reshape_as(self.weight)
        return F.conv_transpose2d(x, weight, self.bias, self.stride)


class Named(nn.Conv2d):
    """A convolution whose attributes mean something to its own code alone."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args)
        vars(self).update(named)

    def forward(self, x: Tensor) -> Tensor:
        """A convolution with a stride that is written in the short form."""
        return F.conv2d(x, self.weight, self.bias, stride=(2,))


class OwnEps(nn.BatchNorm2d):
    """A batch norm whose eps isn't its attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        vars(self)["eps"] = None

    def forward(self, x: Tensor) -> Tensor:
        """As a batch norm, with an eps of its own."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, 1e-2)


class PadsSame(nn.Conv2d):
    """A convolution that pads as TensorFlow does, and says so where torch has numbers."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        vars(self)["padding"] = "SAME"

    def forward(self, x: Tensor) -> Tensor:
        """The padded input's convolution."""
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, groups=self.groups)


class Told(nn.Conv2d):
    """A convolution that can't be run by itself."""

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        """A convolution where it is told so."""
        assert flag
        return F.conv2d(x, self.weight, self.bias)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_module_that_pads_in_words_keeps_its_code(groups: int) -> None:
    net = Net(lambda m, x: m.bn(m.a(x)), a=PadsSame(4, 4, 3, groups=groups), bn=nn.BatchNorm2d(4))
    assert planned(net)[0] == ["a → bn"]


def test_what_apply_could_not_put_into_the_model_is_no_part_of_the_plan() -> None:
    layers = {"a": Told(4, 4, 1), "bn1": nn.BatchNorm2d(4), "b": conv(), "bn2": nn.BatchNorm2d(4)}
    chains, alone, _ = planned(Net(lambda m, x: m.bn2(m.b(F.relu(m.bn1(m.a(x, True))))), **layers))
    assert chains == ["b → bn2"]
    assert alone["a bn1"].startswith("a: the model has a Told there, whose code isn't that of nn.Conv2d alone")


def with_buffer(name: str) -> nn.Module:
    layer = conv(k=1)
    layer.register_buffer(name, torch.ones(4))
    return layer


ODD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "transposed and standardised": (lambda: UpStandardized(4, 4, 2), "standardized: is known of real"),
    "a stride of one number": (lambda: Named(4, 4, 1), "which computes by code of its own"),
    "attributes of its own": (lambda: Named(4, 4, 1, padding="SAME", kernel_size=1), "which computes by code of its"),
    "a gain that nothing reads": (lambda: with_buffer("gain"), "has a gain, and nothing says"),
    "a bias map that nothing reads": (lambda: with_buffer("bias_map"), "holds a bias and a bias_map"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("measure", [False, True])
def test_a_layer_of_which_nothing_can_be_told_is_left_alone_and_the_others_planned(name: str, measure: bool) -> None:
    make, reason = ODD[name]
    layers = {"a": conv(), "bn1": nn.BatchNorm2d(4), "odd": make(), "b": conv(), "bn2": nn.BatchNorm2d(4)}
    net = Net(lambda m, x: m.bn2(m.b(F.relu(m.odd(F.relu(m.bn1(m.a(x))))))), **layers)
    chains, alone, _ = planned(net, measure=measure)
    assert measure or chains == ["a → bn1", "b → bn2"]  # what takes less time is another question
    assert reason in alone["odd"]


def test_attributes_that_do_not_say_what_a_layer_is_leave_that_to_its_run() -> None:
    net = Net(lambda m, x: m.bn2(m.b(m.bn1(m.a(x)))), a=conv(), bn1=OwnEps(4), b=conv(), bn2=nn.BatchNorm2d(4))
    assert planned(net)[2].fields["bn1"] == {"eps": 1e-2}


def test_a_layer_that_reads_an_input_without_a_batch_is_left_alone() -> None:
    net = Net(lambda m, x: m.b(m.bn(m.a(x)).squeeze(0)), a=conv(), bn=nn.BatchNorm2d(4), b=conv())
    chains, alone, _ = planned(net)
    assert (chains, alone) == (["a → bn"], {"b": "it reads an input of 3 axes, which is one without a batch"})


class Weighs(nn.Module):
    """A module of nobody's class that reads its tensors by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ParameterDict({"weight": nn.Parameter(torch.ones(4, 4, 3, 1))})
        self.weight, self.bias = nn.Parameter(torch.ones(4, 4, 1, 3)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """A convolution that pads by the size of its input."""
        y = F.conv2d(x, self.inner["weight"])
        return F.conv2d(F.pad(F.relu(y), (x.shape[-1] % 4, 0)), self.weight, self.bias, groups=1)


def viewed(m: Any, y: Tensor) -> Tensor:
    result: Tensor = m.flat(y.flatten(0, 1)).reshape_as(y)
    return result


PASSING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "flatten": lambda m, x: m.flat(m.linear(x.flatten(2).transpose(1, 2)).flatten(0, 1)),
    "transpose": lambda m, x: m.flat(m.linear(x.flatten(2).transpose(1, 2)).transpose(1, 2)),
    "view and back": lambda m, x: viewed(m, m.linear(x.movedim(1, -1).flatten(1, 2))),
    "pool": lambda m, x: m.bn(F.avg_pool2d(m.a(x), 2)),
    "mean": lambda m, x: m.flat(m.a(x).mean((2, 3))),
    "upsample": lambda m, x: m.bn(F.interpolate(m.a(x), scale_factor=2, mode="bilinear")),
    "reflection": lambda m, x: m.bn(F.pad(m.a(x), (1, 2, 1, 0), mode="reflect")),
    "half": lambda m, x: m.bn(m.a(x) * 0.5),
    "quarter and third": lambda m, x: m.bn(m.a(x) / 4 * 3),
    "norm, pool, linear": lambda m, x: m.linear(F.adaptive_avg_pool2d(m.bn(F.relu(m.a(x))), 1).flatten(1)),
}  # fmt: skip
NOT_PASSING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "zeros": lambda m, x: m.bn(F.pad(m.a(x), (1, 0))),
    "padded pool": lambda m, x: m.bn(F.avg_pool2d(m.a(x), 2, padding=1)),
    "maximum": lambda m, x: m.bn(F.max_pool2d(m.a(x), 2)),
    "other channels": lambda m, x: m.flat(m.linear(x.movedim(1, -1).flatten(1, 2)).view(x.shape[0], 4, -1)),
    "pool, padded layer": lambda m, x: m.padded(F.avg_pool2d(m.bn(F.relu(x)), 2)),
}  # fmt: skip


def between(run: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    layers = {"a": conv(), "bn": nn.BatchNorm2d(4), "flat": nn.BatchNorm1d(4), "linear": nn.Linear(4, 4)}
    return Net(run, **layers, padded=conv(k=3, padding=1))


@pytest.mark.parametrize("name", PASSING)
def test_factors_and_offsets_of_channels_pass_what_only_averages_or_moves(name: str) -> None:
    chains, _, found = planned(between(PASSING[name]))
    assert len(chains) == 1
    assert found.total_after.multiply_adds < found.total.multiply_adds
    assert all(one.exact is Exact.EVERY_SIZE for one in found.fusions)


@pytest.mark.parametrize("name", NOT_PASSING)
def test_factors_and_offsets_do_not_pass_what_makes_positions_of_nothing(name: str) -> None:
    assert planned(between(NOT_PASSING[name]))[0] == []


def test_a_sum_with_its_own_input_in_the_models_code() -> None:
    net = Net(
        lambda m, x: m.bn(m.n(m.a(x)) + m.b(x) + x) + m.c(x) + x + m.d(x),
        **{name: conv(k=3, padding=1, groups=4) for name in "abcd"},
        n=nn.BatchNorm2d(4),
        bn=nn.BatchNorm2d(4),
    )
    chains, _, found = planned(net)
    assert chains == ["(((a → n) + b + identity()) → bn) + (identity() → scale(-1.0))", "c + d"]
    assert found.total_after.multiply_adds < found.total.multiply_adds / 2


def test_every_layer_is_fused_or_listed_with_one_reason() -> None:
    net = Net(
        lambda m, x: m.after(F.relu(m.bn(m.a(x)))) + m.of_input(x) + m.of_sum(F.relu(x) + x),
        a=conv(k=1),
        bn=nn.BatchNorm2d(4),
        after=nn.BatchNorm2d(4),
        of_input=nn.BatchNorm2d(4),
        of_sum=nn.BatchNorm2d(4),
        idle=conv(),
    )
    chains, alone, found = planned(net)
    assert chains == ["a → bn"]
    assert alone == {
        "after": "what it reads is made by relu",
        "of_input": "what it reads is the model's input",
        "of_sum": "what it reads is a sum that no layer makes alone",
        "idle": NEVER,
    }
    names = [name for one in found.left_alone for name in one.layers]
    assert len(names) == len(set(names))


class Versioned(nn.Sequential):
    """A model that has its own mind about its state dict, and about loading one."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors under other names."""
        return {f"other.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if local_metadata.get("version") is None:
            raise ValueError("no version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_what_a_model_makes_of_its_state_dict_does_not_matter() -> None:
    net = filled(Versioned(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4)))
    fused = convtool.fuse_model(copy.deepcopy(net), (4, 9, 7))
    assert_same_outputs(net, fused, [(2, 4, 9, 7)])
    assert [type(one) for one in fused.children()] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d, nn.Identity]


def test_parts_of_what_the_models_code_cannot_do_without_are_tried() -> None:
    """The end of ArcFace's networks; code that counts on the channels between two of the layers."""
    net = Net(
        lambda m, x: m.last(m.fc(m.bn(m.a(x)).view(x.shape[0], 5 * 8 * 6))),
        a=conv(4, 5, 2),
        bn=nn.BatchNorm2d(5),
        fc=nn.Linear(5 * 8 * 6, 6),
        last=nn.BatchNorm1d(6),
    )
    assert planned(net)[0] == ["a → bn", "fc → last"]


# --- how far a run is followed


def branching(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.a(x))
    result: Tensor = F.relu(y) if y.sum() > 0 else m.bn(m.a(y))
    return result


def test_what_lies_before_a_decision_by_values_is_planned_unless_it_may_run_again() -> None:
    blocks = {name: nn.Sequential(conv(k=1), nn.BatchNorm2d(4)) for name in "ab"}
    net = filled(Decides(**blocks))
    found = convtool.plan(net, (4, 9, 7))
    assert [tree_in_short(one.tree) for one in found.fusions] == ["a: [0] → [1]"]
    assert found.remarks == (
        (
            "the data flow was followed up to the model's own code, which goes by the values of its input; what lies"
            " behind is left alone"
        ),
    )
    assert {one.reason for one in found.left_alone} == {"b.0: the code behind the end of the flow may run it again"}
    assert_same_outputs(net, convtool.fuse_model(copy.deepcopy(net), planned=found), [(2, 4, 9, 7)])
    again = filled(Net(branching, a=conv(k=1), bn=nn.BatchNorm2d(4)))
    assert not convtool.plan(again, (4, 9, 7)).fusions


class Decides(nn.Module):
    """A network whose code looks at a value."""

    def __init__(self, a: nn.Sequential, b: nn.Sequential) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        """One way or the other."""
        y = F.relu(self.b(F.relu(self.a(x))))
        result: Tensor = F.relu(y) if y.sum() > 0 else self.b[0](y)
        return result


class Result:
    """What nobody knows how to look into."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_the_values_in_an_unknown_kind_of_output_stay() -> None:
    def forward(m: Any, x: Tensor) -> Result:
        y = m.a(x)
        m.kept = m.b(F.relu(m.bn1(y)))
        result = Result(m.bn3(m.c(F.relu(m.bn2(m.kept)))))
        result.inner = [m.d(F.relu(result.value))]  # type: ignore[attr-defined]
        result.last = m.bn4(result.inner[0])  # type: ignore[attr-defined]
        return result

    net = filled(
        Net(
            forward,
            **{name: conv(k=1) for name in "abcd"},
            **{f"bn{i}": nn.BatchNorm2d(4) for i in range(1, 5)},
        )
    )
    found = convtool.plan(net, (4, 9, 7))
    # b + bn2: b's value is kept by the model; d + bn4: d's is in the result
    assert [tree_in_short(one.tree) for one in found.fusions] == ["a → bn1", "c → bn3"]


def test_what_is_changed_in_place_is_seen_by_another_name() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        flat = y.view(1, -1)
        z = m.bn1(y)
        w = m.b(F.relu(z))
        w.relu_()
        v = m.c(F.relu(m.bn2(w)))
        return m.bn3(v) + flat.sum()  # type: ignore[no-any-return]

    net = filled(Net(forward, **{n: conv(k=1) for n in "abc"}, **{f"bn{i}": nn.BatchNorm2d(4) for i in (1, 2, 3)}))
    assert planned(net)[0] == ["c → bn3"]


# --- requests that are wrong


def test_an_input_size_without_channels_is_an_error_that_says_so() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=conv(1, 4), b=conv())
    with pytest.raises(UsageError, match="a reads an input of 3 axes, which is one without a batch"):
        convtool.plan(net, (9, 7))
    with pytest.raises(UsageError, match=r"the model doesn't run on an input of shape \(1, 3, 9, 7\)"):
        convtool.plan(net, (3, 9, 7))
    with pytest.raises(UsageError, match="either an input size or inputs"):
        convtool.plan(net)


def test_a_model_in_training_stays_so_and_other_inputs_can_be_given() -> None:
    net = Net(lambda m, x: m.bn(m.a(x)), a=conv(), bn=nn.BatchNorm2d(4)).train()
    net.bn.eval()  # type: ignore[union-attr]
    found = convtool.plan(net, inputs=(torch.zeros(2, 4, 9, 7),))
    assert len(found.fusions) == 1
    assert net.training
    assert not net.bn.training  # type: ignore[union-attr]


def test_a_model_on_the_meta_device_has_the_same_plan() -> None:
    found = case("conv_bn")
    with torch.device("meta"):
        model = NETWORKS["conv_bn"]()
    again = convtool.plan(model, found.size)
    assert again.recipe() == found.plan.recipe()
    assert again.total == found.plan.total


def test_models_made_at_random_compute_the_same_once_they_are_fused() -> None:
    found = {seed: what for seed in range(80) if (what := random_models.wrong(seed))}
    assert found == {}
