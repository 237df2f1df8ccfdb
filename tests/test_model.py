"""--model: models loaded without weights, geometry read off their modules, and held against the checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from live import done, error, filled, load, save
from networks import NETWORKS, Chains
from shell import cli
from torch import Tensor, nn

import convtool
from convtool.checkpoint import open_checkpoint
from convtool.core.conv import lower_conv
from convtool.core.geometry import Geometry
from convtool.errors import InputError, RefusedError, UsageError
from convtool.live.agreement import FOLDED, agree
from convtool.live.load import load_model

SAMPLES = Path(__file__).resolve().parent.parent / "sample_models"
NETWORKS_PY = SAMPLES / "networks.py"

# --- geometry

LAYERS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("a line", nn.Conv1d(2, 3, 5, stride=2, padding=1), (2, 11)),
    ("a plane", nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), (4, 9, 8)),
    ("a volume", nn.Conv3d(2, 3, (2, 3, 1), padding=(0, 1, 2)), (2, 5, 6, 4)),
    ("same", nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(2, 1)), (2, 9, 8)),
    ("valid", nn.Conv2d(2, 3, (3, 5), padding="valid"), (2, 9, 8)),
    ("circular", nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode="circular"), (2, 9, 8)),
    ("reflect", nn.Conv1d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 9)),
    ("transposed", nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 0), groups=2), (4, 5, 4)),
]


@pytest.mark.parametrize(("module", "size"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
def test_a_module_with_the_geometry_that_was_read_off_it_computes_the_same(
    module: nn.Module, size: tuple[int, ...]
) -> None:
    filled(module)
    (fields,) = convtool.geometry_of(nn.Sequential(module)).values()
    weight, bias = module.get_parameter("weight").detach(), module.get_parameter("bias").detach()
    lowered = lower_conv(weight, bias, Geometry.of(tuple(weight.shape[2:]), **fields))
    x = torch.randn(2, *size, dtype=torch.float64)
    assert torch.allclose(convtool.forward(lowered, x), module(x), rtol=1e-12, atol=1e-12)


def test_batch_norms_have_an_eps_and_those_without_statistics_none() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(2, eps=1e-2), nn.BatchNorm2d(2), nn.BatchNorm3d(2, track_running_stats=False), nn.Linear(2, 2)
    )
    assert convtool.geometry_of(model) == {"0": {"eps": 1e-2}, "1": {"eps": 1e-5}}


class Standardised(nn.Conv2d):
    """A subclass whose weight isn't its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """With the mean taken out of the weight."""
        y: Tensor = self._conv_forward(x, self.weight - self.weight.mean(), self.bias)
        return y


def test_a_layer_that_computes_something_else_has_no_geometry() -> None:
    patched = nn.Conv2d(2, 2, 3)
    patched.forward = torch.relu  # type: ignore[method-assign]
    model = nn.ModuleDict({"own": Standardised(2, 2, 3), "patched": patched, "plain": nn.Conv2d(2, 2, 3)})
    assert set(convtool.geometry_of(model)) == {"plain"}


def test_a_lazy_module_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="weight has no shape yet, being that of a lazy module"):
        convtool.geometry_of(nn.LazyConv2d(3, 3))


# --- loading


def written(folder: Path, code: str, name: str = "net.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(code))
    return path


NET = """
    import torch
    from torch import nn

    print("this must not reach stdout")

    class Net(nn.Module):
        def __init__(self, width, depth=1):
            super().__init__()
            self.conv = nn.Conv2d(3, width, (3, 5), padding=(1, 2), bias=False)
            self.bn = nn.BatchNorm2d(width, eps=1e-3)
            self.rest = nn.ModuleList(nn.Conv2d(width, width, 3) for _ in range(depth))

        def forward(self, x):
            x = self.bn(self.conv(x)).relu()
            for one in self.rest:
                x = one(x)
            return x

    def build(width=4):
        return Net(width)

    class Namespace:
        net = Net
        made = Net(5)

    def looks_at_numbers():
        net = Net(int(torch.ones(4).sum().item()))
        return net

    def nothing(): return None
    def broken(): raise KeyError("no such thing")
"""


def test_a_model_is_built_without_memory_for_its_weights(tmp_path: Path) -> None:
    path = written(tmp_path, NET)
    model = load_model(f"{path}:Net", '{"width": 6, "depth": 2}')
    assert not model.training
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.get_parameter("rest.1.weight").shape == (6, 6, 3, 3)
    assert load_model(f"{path}:Net", "[7]").get_parameter("conv.weight").shape == (7, 3, 3, 5)
    assert load_model(f"{path}:Namespace.net", "[2, 3]").get_submodule("rest.2")
    assert load_model(f"{path}:Namespace.made").get_parameter("conv.weight").shape[0] == 5
    assert load_model(f"{path}:build", in_memory=True).get_parameter("conv.weight").device.type == "cpu"
    # Code that looks at numbers while it builds can't do so on the meta device.
    assert load_model(f"{path}:looks_at_numbers").get_parameter("conv.weight").shape[0] == 4


@pytest.mark.parametrize(
    ("spec", "arguments", "kind", "message"),
    [
        ("net.py", None, UsageError, "expected net.py:NAME, NAME being what builds the model; it has Net"),
        ("net", None, UsageError, "expected pkg.mod:callable, path/to/file.py:callable, or a Hugging Face folder"),
        ("missing.py:Net", None, InputError, "missing.py: no such file"),
        ("no.such.module:Net", None, UsageError, "no module 'no.such.module'"),
        ("net.py:Nett", None, UsageError, "has no 'Nett'; did you mean Net"),
        ("net.py:Net", None, UsageError, "calling it failed: TypeError: .*missing 1 required positional argument"),
        ("net.py:broken", None, UsageError, r"calling it failed: KeyError: 'no such thing' \(net.py, line 32\)"),
        ("net.py:nothing", None, UsageError, "gave a NoneType, expected an nn.Module"),
        ("net.py:build", "{width: 3}", UsageError, "--model-args: is not JSON"),
        ("net.py:build", "3", UsageError, "expected a JSON object or list, got '3'"),
        ("bad.py:Net", None, UsageError, r"running bad.py failed: ZeroDivisionError: .*\(bad.py, line 2\)"),
        (".", None, InputError, "has no config.json"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_in_one_line(
    spec: str,
    arguments: str | None,
    kind: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written(tmp_path, NET)
    written(tmp_path, "\n1 / 0\n", "bad.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message) as raised:
        load_model(spec, arguments)
    assert "\n" not in str(raised.value)


def test_a_folder_is_built_by_transformers_and_its_own_code_is_not_run(tmp_path: Path) -> None:
    import transformers

    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    config.architectures = ["ResNetForImageClassification"]
    config.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    fields = convtool.geometry_of(model)["resnet.embedder.embedder.convolution"]
    assert (fields["stride"], fields["padding"]) == ([2, 2], [[3, 3], [3, 3]])
    with pytest.raises(UsageError, match="a Hugging Face folder takes none"):
        load_model(str(tmp_path), "{}")
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(RefusedError, match="asks for code of its own"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(document | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(UsageError, match="has no NoSuchModel"):
        load_model(str(tmp_path))


# --- model and checkpoint


def test_names_and_shapes_that_disagree_are_listed_and_their_geometry_is_not_taken(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    state = model.state_dict()
    del state["1.running_mean"], state["1.running_var"], state["1.weight"], state["1.bias"]
    del state["1.num_batches_tracked"]
    state["2.weight"] = torch.ones(4, 3, 5, 5)
    state["3.weight"] = torch.ones(4, 4, 1, 1)
    torch.save(state, tmp_path / "net.pt")
    found = agree(model, open_checkpoint(tmp_path / "net.pt"))
    assert set(found.geometry.tables) == {"0"}
    assert found.differences == (
        "only in the checkpoint: 3",
        "only in the model: 1",
        "2.weight: 4x3x5x5 in the checkpoint, 4x3x3x3 in the model",
    )
    assert set(found.unlike) == {"1", "2"}


def test_a_file_that_another_program_folded_is_of_the_network_and_one_line_says_so(tmp_path: Path) -> None:
    model = filled(
        nn.Sequential(*(one for n in (2, 3, 4) for one in (nn.Conv2d(n, n + 1, 3, bias=False), nn.BatchNorm2d(n + 1))))
    )
    folded = {
        name: tensor for name, tensor in model.state_dict().items() if name in {"0.weight", "2.weight", "4.weight"}
    }
    torch.save(folded | {f"{2 * n}.bias": torch.ones(n + 3) for n in range(3)}, tmp_path / "net.pt")
    found = agree(model, open_checkpoint(tmp_path / "net.pt"))
    found.check("net.py:Net")
    assert found.differences == ("only in the model: 1, 3, 5", "a bias only in the checkpoint: 0, 2, 4")
    assert {why for name, why in found.unlike.items() if name in {"0", "2", "4"}} == {FOLDED}


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
@pytest.mark.parametrize("whose", ["checkpoint", "model"])
def test_a_prefix_of_all_names_does_not_count(prefix: str, whose: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3, eps=1e-3))
    inner: nn.Module = model
    for part in reversed(prefix.split(".")[:-1]) if whose == "model" else ():
        outer = nn.Module()
        outer.add_module(part, inner)
        inner = outer
    start = prefix if whose == "checkpoint" else ""
    torch.save({start + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "net.pt")
    found = agree(inner, open_checkpoint(tmp_path / "net.pt"))
    assert found.differences == ()
    assert found.geometry.fields(f"{start}1") == {"eps": 1e-3}
    assert found.geometry.fields(f"{start}0")["stride"] == [2, 2]


# Names that would mean another layer too, were they taken as people's words: without a wrapper's prefix, as patterns.
@pytest.mark.parametrize(("name", "other"), [("a", "module.a"), ("x*", "xy"), ("[uv]", "u")])
def test_what_a_model_says_of_a_layer_it_says_of_no_other(name: str, other: str, tmp_path: Path) -> None:
    model = nn.Module()
    holder = model
    if "." in other:
        model.add_module("module", holder := nn.Module())
    holder.add_module(other.removeprefix("module."), nn.Conv2d(2, 3, 3))
    model.add_module(name, nn.Conv2d(2, 3, 3, stride=(2, 1)))
    found = agree(model, open_checkpoint(save(model, tmp_path / "net.pt")))
    assert found.differences == ()
    assert {key: found.geometry.fields(key)["stride"] for key in (name, other)} == {name: [2, 1], other: [1, 1]}


def test_fused_layers_have_the_geometry_that_was_recorded_and_not_the_models(tmp_path: Path) -> None:
    """The fused layer has its first source's name, and may have its shape as well."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1, stride=2))
    before = save(filled(net), tmp_path / "before.safetensors")
    fused = tmp_path / "fused.safetensors"
    done("fuse", before, "0", "1", "-o", fused, "--set", "1.stride=2", "--set", "1.padding=0", "--set", "0.groups=1")
    found = agree(net, open_checkpoint(fused))
    assert dict(found.geometry.tables) == {}
    assert found.differences == ()
    assert set(found.unlike) == {"0", "1"}


# --- the commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample checkpoint, its network's code, and the network fused by its plan."""
    made = tmp_path_factory.mktemp("model")
    shutil.copy(NETWORKS_PY, made / "nets.py")
    for name in ("chains", "conv_bn", "repvgg"):
        shutil.copy(SAMPLES / f"{name}.safetensors", made)
    return made


def test_no_command_needs_geometry_where_there_is_a_model(folder: Path) -> None:
    model = ("--model", f"{folder}/nets.py:ConvBatchNorm")
    checkpoint = folder / "conv_bn.safetensors"
    inspected = done("inspect", checkpoint, *model)
    assert {layer["name"]: layer["geometry"] for layer in inspected["layers"] if layer["geometry"]} == (
        convtool.geometry_of(NETWORKS["conv_bn"]())
    )
    matrix = done("toeplitz", checkpoint, "conv3", *model, "--input-size", "5,4", "-o", folder / "conv3.npz")
    assert matrix["input_size"] == [16, 5, 4]
    assert not matrix["assumed"]
    converted = done("convert", checkpoint, folder / "dense.pt", "--as-toeplitz", "conv4=24,3,4", *model)
    assert converted["ok"]
    fused = done("fuse", checkpoint, "conv2", "bn2", *model, "-o", folder / "one.safetensors")
    assert fused["fusions"][0]["fields"]["stride"] == [2, 2]
    assert fused["fusions"][0]["assumed"] == []
    verified = done("verify", checkpoint, folder / "one.safetensors", *model)
    assert verified["assumed"] == []
    # what is said on the command line wins
    overruled = done("inspect", checkpoint, *model, "--set", "bn2.eps=0.5", "bn2")
    assert overruled["layers"][0]["geometry"] == {"eps": 0.5}


def test_inspect_shows_what_each_layer_reads_and_gives(folder: Path) -> None:
    model = ("--model", f"{folder}/nets.py:ConvBatchNorm")
    geometry = folder / "geometry.toml"
    document = done(
        *("inspect", folder / "conv_bn.safetensors", *model),
        *("--model-input", "1,9,8", "--write-geometry", geometry),
    )
    runs = {layer["name"]: layer["runs"] for layer in document["layers"]}
    assert runs["conv2"] == [{"input_size": [12, 9, 8], "output_size": [16, 5, 4], "multiply_adds": 16 * 12 * 9 * 20}]
    assert runs["head"] == [{"input_size": [24], "output_size": [10], "multiply_adds": 240}]
    again = done("inspect", folder / "conv_bn.safetensors", "--geometry", geometry)
    for layer, other in zip(document["layers"], again["layers"], strict=True):
        fields = layer["geometry"] or {}
        assert (other["geometry"] or {}) == {key: fields[key] for key in fields if key != "output_padding"}
    code, message = error("inspect", folder / "conv_bn.safetensors", "--model-input", "1,9,8")
    assert (code, "goes with --model" in message) == (2, True)
    code, message = error("inspect", folder / "conv_bn.safetensors", "--write-geometry", folder / "none.toml")
    assert (code, "nothing is known" in message, (folder / "none.toml").exists()) == (2, True, False)


def test_a_plan_says_in_one_line_what_was_fused_already(folder: Path) -> None:
    model = f"--model {folder}/nets.py:ConvBatchNorm --model-input 1,8,8"
    fused = folder / "fused-already.safetensors"
    assert cli(f"fuse {folder}/conv_bn.safetensors --auto {model} -o {fused}").code == 0
    assert [line for line in cli(f"plan {fused} {model}").out.splitlines() if "fused" in line] == [
        "left alone: conv1, bn1 and 3 more: convtool fused it already",
        "0 fusions; the model as its code builds it, unfused: 9150 parameters, 84688 multiply-adds for one input",
    ]
    assert "; the whole model: " in cli(f"plan {folder}/conv_bn.safetensors {model}").out


@pytest.mark.parametrize("as_json", [False, True])
def test_where_auto_finds_nothing_it_says_why(as_json: bool, folder: Path) -> None:
    words = f"--model {folder}/nets.py:Chains --model-input 1,8,8 --batch-norms-only -o {folder}/never.safetensors"
    found = cli(f"fuse {folder}/chains.safetensors --auto {words}{' --json' * as_json}")
    said = found.document["error"]["message"] if as_json else found.err
    assert found.code == 4
    assert "found nothing to fuse; left alone: reduce, spread and 3 more: only batch norms are to be fused" in said


@pytest.mark.parametrize(
    ("name", "kind"), [("chains", "Chains"), ("conv_bn", "ConvBatchNorm"), ("repvgg", "RepVGGStyle")]
)
def test_a_plan_is_carried_out_by_fuse_at_once_or_as_a_recipe_and_the_network_stays(
    name: str, kind: str, folder: Path
) -> None:
    checkpoint, recipe = folder / f"{name}.safetensors", folder / f"{name}.toml"
    model = ("--model", f"{folder}/nets.py:{kind}")
    plan = done("plan", checkpoint, *model, "--model-input", "1,8,8", "-o", recipe)
    assert plan["out"] == str(recipe)
    one, other = folder / f"{name}-recipe.safetensors", folder / f"{name}-auto.safetensors"
    by_recipe = done("fuse", checkpoint, "--recipe", recipe, "-o", one)
    assert [fusion["name"] for fusion in by_recipe["fusions"]] == [fusion["name"] for fusion in plan["fusions"]]
    assert all(not fusion["assumed"] for fusion in by_recipe["fusions"])
    assert by_recipe["total"]["parameters"] == {
        side: sum(fusion["parameters"][side] for fusion in by_recipe["fusions"]) for side in ("before", "after")
    }
    assert [fusion["parameters"] for fusion in by_recipe["fusions"]] == [
        {side: fusion[side]["parameters"] for side in ("before", "after")} for fusion in plan["fusions"]
    ]
    done("fuse", checkpoint, "--auto", *model, "--model-input", "1,8,8", "-o", other)
    assert one.read_bytes() == other.read_bytes()
    report = done("verify", checkpoint, one, *model, "--model-input", "1,9,10" if name != "chains" else "1,8,8")
    whole = report["whole_model"]
    assert report["equivalent"]
    assert whole["equal"]
    assert 0 < whole["difference"] < 1e-5 * whole["largest_output"]
    assert 0 < whole["ratio"] < whole["most"]


BLURRED = ("--set", "blur.padding=1", "--set", "narrow.padding=0", "--set", "narrow.groups=1")


def test_a_network_that_was_fused_wrongly_is_not_called_equal(folder: Path, tmp_path: Path) -> None:
    """Each fused layer is right; what they stand for isn't next to each other in the network."""
    checkpoint, wrong = folder / "chains.safetensors", tmp_path / "wrong.safetensors"
    done("fuse", checkpoint, "narrow", "blur", "-o", wrong, *BLURRED, "--allow-border")
    model = ("--model", f"{folder}/nets.py:Chains", "--model-input", "1,8,8")
    code, document = error_or_document("verify", checkpoint, wrong, *model)
    assert code == 1
    assert not document["whole_model"]["equal"]
    assert document["whole_model"]["ratio"] > 1e4


def error_or_document(*words: object) -> tuple[int, dict[str, Any]]:
    from live import run

    return run(*words)


def test_what_goes_with_a_model_is_refused_without_one(folder: Path) -> None:
    checkpoint, out = folder / "chains.safetensors", folder / "never.safetensors"
    model = ("--model", f"{folder}/nets.py:Chains")
    for words, part in (
        (("fuse", checkpoint, "--auto", "-o", out), "expected --model"),
        (("fuse", checkpoint, "a", "b", "--auto", *model, "-o", out), "--auto"),
        (("fuse", checkpoint, "--auto", *model, "-o", out), "expected --model-input"),
        (("fuse", checkpoint, "a", "b", "--measure", "-o", out), "goes with --auto"),
        (("fuse", checkpoint, "a", "b", "--batch-norms-only", "-o", out), "--batch-norms-only: goes with --auto"),
        (("plan", checkpoint, "--model-input", "1,8,8"), "expected --model"),
        (("plan", checkpoint, *model), "expected --model-input"),
        (("plan", checkpoint, *model, "--model-input", "2,8,8"), "the model doesn't run on an input of shape"),
        (("inspect", checkpoint, "--model-args", "{}"), "goes with --model"),
        (("verify", checkpoint, checkpoint, "--model-input", "1,8,8"), "goes with --model"),
    ):
        code, message = error(*words)
        assert (code, part in message) == (2, True), message
    assert not out.exists()


def test_a_model_of_another_checkpoint_is_an_error(folder: Path, tmp_path: Path) -> None:
    net = save(nn.Sequential(nn.Conv2d(2, 3, 3)), tmp_path / "net.safetensors")
    code, message = error("inspect", net, "--model", f"{folder}/nets.py:Chains")
    assert (code, "have no layer in common" in message) == (2, True)


def test_a_bias_of_zeros_in_the_checkpoint_counts_as_none(tmp_path: Path) -> None:
    """With its bias the first layer's zeros would show at the border of a padded second one."""
    code = """
        from torch import nn
        def net(): return nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1))
    """
    model = ("--model", f"{written(tmp_path, code)}:net", "--model-input", "2,6,5")
    net = filled(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1)))
    assert done("plan", save(net, tmp_path / "biased.pt"), *model)["fusions"] == []
    net.get_parameter("0.bias").data.zero_()
    plan = done("plan", save(net, tmp_path / "zeros.pt"), *model)
    assert [fusion["layers"] for fusion in plan["fusions"]] == [["0", "1"]]


def test_a_fusion_that_is_exact_for_one_size_goes_through_the_recipe(tmp_path: Path) -> None:
    code = """
        from torch import nn
        def net():
            return nn.Sequential(nn.Conv2d(2, 3, (2, 3), stride=(2, 3), bias=False), nn.Conv2d(3, 4, 3, padding=1))
    """
    spec = f"{written(tmp_path, code)}:net"
    net = filled(nn.Sequential(nn.Conv2d(2, 3, (2, 3), stride=(2, 3), bias=False), nn.Conv2d(3, 4, 3, padding=1)))
    checkpoint, recipe, out = save(net, tmp_path / "net.pt"), tmp_path / "plan.toml", tmp_path / "out.pt"
    options = ("--model", spec, "--model-input", "2,8,9")
    assert done("plan", checkpoint, *options, "-o", recipe)["out"] is None
    assert not recipe.exists()
    plan = done("plan", checkpoint, *options, "--fixed-size", "--everything", "-o", recipe)
    assert plan["fusions"][0]["exact"] == "at this input size"
    fused = done("fuse", checkpoint, "--recipe", recipe, "-o", out)
    assert fused["fusions"][0]["input_size"] == [8, 9]
    assert done("verify", checkpoint, out, "--model", spec, "--model-input", "2,8,9")["whole_model"]["equal"]
    state = load(out)
    assert set(state) == {"0.weight", "0.bias"}


def test_a_command_without_a_model_runs_no_code_and_the_help_says_which_does(tmp_path: Path) -> None:
    """Neither a checkpoint's neighbours nor its name get anything run."""
    written(tmp_path, "raise SystemExit('run')", "net.py")
    shutil.copy(SAMPLES / "chains.safetensors", tmp_path / "net.safetensors")
    script = (
        "import sys; from convtool.cli.app import run_app; code = run_app(['inspect', 'net.safetensors', '-q']);"
        "sys.exit(code or 'net' in sys.modules or 'convtool.live' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize("command", ["inspect", "toeplitz", "plan", "fuse", "verify", "convert"])
def test_the_help_says_that_the_users_own_code_is_run_and_only_by_this(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from convtool.cli.app import run_app

    assert run_app([command, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "This runs your code." in said


def test_what_the_models_code_prints_leaves_stdout_alone(tmp_path: Path) -> None:
    path = written(tmp_path, NET)
    torch.manual_seed(0)
    net = save(load_model(f"{path}:build", in_memory=True), tmp_path / "net.pt")
    plan = done("plan", net, "--model", f"{path}:build", "--model-input", "3,8,9")  # one JSON document, or it fails
    assert [fusion["layers"] for fusion in plan["fusions"]] == [["conv", "bn"]]


def test_a_sample_network_runs_as_before_in_python() -> None:
    checkpoint = open_checkpoint(SAMPLES / "chains.safetensors")
    model = Chains()
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.infos})
    x = torch.randn(3, 1, 8, 8)
    before = model(x).detach()
    found = convtool.plan(model, (1, 8, 8))
    after = convtool.fuse_model(model, planned=found)(x).detach()
    assert float((before - after).abs().max()) < 1e-5 * float(before.abs().max())
    assert isinstance(found, convtool.Plan)


def test_a_model_of_another_network_is_refused_and_one_with_another_head_is_not(tmp_path: Path) -> None:
    def network(depth: int, width: int, classes: int) -> nn.Sequential:
        blocks = [nn.Sequential(nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)) for _ in range(depth)]
        return nn.Sequential(*blocks, nn.Linear(width, classes))

    checkpoint = open_checkpoint(save(network(3, 4, 5), tmp_path / "net.pt"))
    for other in (network(12, 4, 5), network(3, 6, 5)):
        with pytest.raises(UsageError, match=r"net.py:Net is of another network than .*net.pt: of its \d+ layers \d+"):
            agree(other, checkpoint).check("net.py:Net")
    for like in (network(3, 4, 7), network(3, 4, 5), network(2, 4, 5)):
        agree(like, checkpoint).check("net.py:Net")


TWO = """
    import torch
    from torch import nn
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.image = nn.Embedding(7, 4), nn.Conv2d(3, 4, (3, 1))
            self.bn = nn.BatchNorm2d(4)
        def forward(self, image, words=None, *, by_name=None):
            y = self.bn(self.image(image))
            return y if words is None else y * self.words(words).sum(1)[:, :, None, None]
    def given():
        return {"words": torch.tensor([[1, 5]]), "image": torch.ones(1, 3, 6, 5)}
    def scaled():
        return Scaled()
    class Scaled(Two):
        def forward(self, image, scale):
            return super().forward(image) * scale[:, :, None, None]
"""


def test_a_model_of_several_inputs_or_of_token_ids(tmp_path: Path) -> None:
    path = written(tmp_path, TWO)
    net, out = save(filled(load_model(f"{path}:Two", in_memory=True)), tmp_path / "net.pt"), tmp_path / "out.pt"
    for what, given in (("Two", [f"{path}:given"]), ("scaled", ["3,6,5", "4"])):
        how = ["--model", f"{path}:{what}", *(word for one in given for word in ("--model-input", one))]
        (fusion,) = done("plan", net, *how)["fusions"]
        assert fusion["layers"] == ["image", "bn"]
        done("fuse", net, "--auto", *how, "-o", out, "--force")
        assert done("verify", net, out, *how)["whole_model"]["equal"]
        assert done("inspect", net, *how)["layers"][1]["runs"]
    for wrong in ("3,x", "0,3", f"{path}:Nothing"):
        assert error("plan", net, "--model", f"{path}:Two", "--model-input", wrong)[0] == 2


def test_an_exported_program_is_planned_and_fused_without_any_code(tmp_path: Path) -> None:
    net = filled(NETWORKS["repvgg"]()).float()
    exported = torch.export.export(net, (torch.zeros(1, 1, 8, 8),))
    path, one, two = tmp_path / "net.pt2", tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    torch.export.save(exported, path)
    checkpoint = save(net, tmp_path / "net.safetensors")
    how = ("--model", f"{NETWORKS_PY}:RepVGGStyle", "--model-input", "1,8,8")
    found, expected = done("plan", path), done("plan", checkpoint, *how)
    assert {**found, "source": None} == {**expected, "source": None}
    assert sorted(len(one["layers"]) for one in done("plan", path, "--batch-norms-only")["fusions"]) == [2] * 5 + [3]
    done("fuse", path, "--auto", "-o", one)
    done("fuse", checkpoint, "--auto", *how, "-o", two)
    assert load(one).keys() == load(two).keys()
    assert all(torch.equal(tensor, load(two)[name]) for name, tensor in load(one).items())
    assert error("plan", checkpoint)[1].endswith("and --model-input, such as 3,224,224")
    assert error("plan", path, "--model-input", "1,8,8")[1] == "--model-input: goes with --model"


NORM_WITH_ACTIVATION = """
    import torch.nn.functional as F
    from torch import nn
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels, *, before=1.0):
            super().__init__(channels, eps=1e-3)
            self.act, self.before = nn.ReLU(), before
        def forward(self, x):
            x = x if self.before == 1 else x * self.before
            affine = self.weight, self.bias
            return self.act(F.batch_norm(x, self.running_mean, self.running_var, *affine, self.training, 0.1, self.eps))
    def told():
        return nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4))
    def halved():
        return nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, before=0.5))
"""


def test_a_batch_norm_with_an_activation_inside_tells_its_eps(tmp_path: Path) -> None:
    path, out = written(tmp_path, NORM_WITH_ACTIVATION), tmp_path / "out.safetensors"
    model = filled(load_model(f"{path}:told", in_memory=True)).float().eval().requires_grad_(False)
    net, x = save(model, tmp_path / "net.safetensors"), torch.randn(2, 3, 6, 5)
    expected = model(x)
    done("fuse", net, "0", "1", "--model", f"{path}:told", "-o", out)
    assert done("verify", net, out)["equivalent"]
    assert torch.allclose(convtool.apply(model, out)(x), expected, rtol=1e-5, atol=1e-6)
    code, message = error("fuse", net, "0", "1", "--model", f"{path}:halved", "-o", out, "--force")
    assert (code, "eps of 1" in message) == (2, True), message
