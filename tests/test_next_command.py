"""A refusal ends with the whole next command, which brings a newcomer on: three jobs, each in two tries."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shell import Run, cli
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from convtool.cli import output

Write = Callable[..., None]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write what the jobs begin with: a network as torch folds it, another with a LoRA, and two padded layers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(2)
    pairs = [(nn.Conv2d(3, 6, (3, 2), bias=False), nn.BatchNorm2d(6)), (nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))]
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    for number, (conv, norm) in enumerate(pairs, 1):
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.3, 2)  # type: ignore[arg-type]
        before |= {f"conv{number}.{name}": tensor for name, tensor in conv.state_dict().items()}
        before |= {f"bn{number}.{name}": tensor for name, tensor in norm.state_dict().items()}
        made = fuse_conv_bn_eval(conv.eval(), norm.eval())
        after |= {f"conv{number}.{name}": tensor for name, tensor in made.state_dict().items()}
    torch.save(before, "net.pt")
    torch.save(after, "folded.pt")
    down, up = torch.randn(2, 6, 3, 3), torch.randn(5, 2, 1, 1)
    lora = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    torch.save({f"lora_unet_conv2.{name}": tensor for name, tensor in lora.items()}, "lora.pt")
    change = (up.flatten(1) @ down.flatten(1)).reshape(5, 6, 3, 3)
    torch.save(before | {"conv2.weight": before["conv2.weight"] + 0.8 * change}, "merged.pt")
    one, two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
    torch.save(nn.ModuleDict({"a": one, "b": two}).state_dict(), "pair.pt")


def following(found: Run, **values: str) -> str:
    """The command that a run ends with or shows on a line of its own, with values for its capitals."""
    command = re.search(r".*: convtool (.*)$", found.err + found.out, re.MULTILINE)
    assert command is not None, found
    line = command[1]
    for word, value in values.items():
        line = line.replace(word, value)
    return line


def test_a_file_that_torch_folded_is_verified_in_two_tries() -> None:
    first = cli("verify net.pt folded.pt")
    assert first.code == 2
    assert following(first) == "verify net.pt folded.pt --recipe auto --eps VALUE --computed-in float32"
    assert "lacks bn1, bn2" in first.message
    second = cli(following(first, VALUE="1e-5"))
    assert second.out.splitlines()[-1].endswith("; held to what computing in float32 allows")
    assert (second.code, "equivalent" in second.out.splitlines()[-1]) == (0, True)
    stated = cli("verify net.pt folded.pt --eps 1e-5")
    assert following(stated) == "verify net.pt folded.pt --eps 1e-5 --recipe auto --computed-in float32"


def test_lower_precision_is_told_before_what_differs() -> None:
    found = cli("verify net.pt folded.pt --recipe auto --eps 1e-5")
    assert found.code == 1
    lines = [line for line in found.out.splitlines() if not line.startswith(("assumed: ", "recipe: "))]
    assert re.search("an error of up to .* is beyond what storing can do; with --computed-in float32 it", lines[0])
    assert lines[1].startswith("if AFTER was computed in float32: convtool verify net.pt folded.pt --recipe auto")
    assert lines[-1] == "NOT equivalent, unless AFTER was computed in float32 (--computed-in)"
    assert cli(following(found)).code == 0
    # Where something else differs as well, lower precision doesn't make it another verdict.
    folded = torch.load("folded.pt")
    torch.save(folded | {"conv1.weight": folded["conv1.weight"] * 1.01}, "folded.pt")
    worse = cli("verify net.pt folded.pt --recipe auto --eps 1e-5").out.splitlines()
    assert worse[-1] == "NOT equivalent"
    assert any("if AFTER was computed in float32" in line for line in worse[:4])


def test_what_lower_precision_explains_is_cut_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def lines(options: str) -> list[str]:
        from convtool.cli.app import run_app

        monkeypatch.setattr(sys, "stdout", stream := Terminal())
        monkeypatch.setenv("COLUMNS", "300")
        assert run_app(f"verify net.pt folded.pt --recipe auto --eps 1e-5 {options}".split()) == 1
        return stream.getvalue().splitlines()

    sizes = " ".join(f"--input-size {size},{size}" for size in range(5, 9))
    assert sum(" more; a pipe gets all" in line for line in lines(sizes)) == 2
    assert len(lines(sizes)) < 25 < len(lines(f"{sizes} --details"))


def test_a_lora_that_convtool_merged_is_verified_in_two_tries() -> None:
    wrong = cli("fuse net.pt lora.pt -o styled.pt")
    assert following(wrong) == "fuse net.pt --with lora=lora.pt -o styled.pt"
    assert cli(following(wrong)).code == 0
    first = cli("verify net.pt styled.pt")
    assert (first.code, following(first)) == (2, "verify net.pt styled.pt --with lora=FILE")
    assert cli(following(first, FILE="lora.pt")).code == 0
    assert "another checkpoint has a name: --with NAME=lora.pt" in cli("verify net.pt styled.pt lora.pt").message


def test_a_lora_that_another_program_merged_is_verified_in_two_tries() -> None:
    first = cli("verify net.pt merged.pt")
    assert first.code == 1
    assert first.out.startswith("if adapters were merged: ")
    assert cli(following(first, NAME="style", FILE="lora.pt", X="0.8")).code == 0
    unsaid = cli("verify net.pt merged.pt --with style=lora.pt")
    assert "if the strength wasn't 1: " in unsaid.out
    assert cli(following(unsaid, X="0.8")).code == 0


def test_two_padded_layers_are_fused_or_refused_with_the_way_out_in_two_tries() -> None:
    first = cli("fuse pair.pt a b -o out.pt")
    assert first.code == 2
    assert "where padding makes the border differ, --allow-border accepts that" in first.message
    line = following(first).replace("b.padding=VALUE", "b.padding=1").replace("VALUE", "1")
    second = cli(line)
    assert second.code == 4
    assert following(second) == f"{line} --allow-border"
    assert cli(following(second)).code == 0
    # In verify there is no such option.
    assert "--allow-border" not in cli("verify pair.pt out.pt --before a,b --after a").message


def test_more_options_stand_before_what_ends_them() -> None:
    reporter = output.Reporter("fuse", typed=("net.pt", "-o", "it's.pt", "--", "-a", "b c"))
    assert reporter.again("--force") == "convtool fuse net.pt -o 'it'\"'\"'s.pt' --force -- -a 'b c'"
    assert output.Reporter("verify").again("--only") == "convtool verify --only"


def test_a_command_to_paste_is_never_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    command = "convtool fuse some/net.pt first second -o out.pt --allow-border"
    output.say(f"convtool: cannot fuse these two layers exactly; or accept that: {command}")
    assert stream.getvalue().splitlines()[-1].strip() == command
    assert max(map(len, stream.getvalue().splitlines()[:-1])) <= 30


def test_a_refusal_of_padded_layers_has_the_command_for_their_matrix() -> None:
    line = "fuse pair.pt a b -o out.pt --set '*.padding=1' --assume groups,dilation,stride --eps 0.5"
    refused = cli(line)
    assert refused.code == 4
    matrix = re.search(r"which is exact: convtool (toeplitz .*); or accept that: ", refused.message)
    assert matrix is not None
    stated = "--set '*.padding=1' --eps 0.5 --assume groups,dilation,stride"
    told = f"toeplitz pair.pt a b {stated} --input-size SIZE -o OUT.npz"
    assert matrix[1] == told
    assert cli(told.replace("SIZE", "7,8")).code == 0
    sized = cli(f"{line} --input-size 3,9,9")
    assert "--input-size 3,9,9 -o OUT.npz; or accept" in sized.message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_file_whose_tensors_were_rounded_is_verified_in_two_tries(dtype: str) -> None:
    assert cli(f"convert net.pt half.pt --dtype {dtype}").code == 0
    first = cli("verify net.pt half.pt")
    assert (first.code, first.out.startswith("if AFTER's tensors were rounded once: ")) == (1, True)
    assert cli(following(first)).code == 0
    assert "rounded once:" not in cli("verify half.pt net.pt --rounded-to float32").out


def test_a_chain_that_skips_layers_of_the_file_is_remarked() -> None:
    found = cli("fuse net.pt conv1 bn2 --eps 1e-5 --set bn2.eps=1 -o skips.pt")
    assert found.code == 2  # of other channels
    state = torch.load("net.pt")
    order = {name: state[name] for name in state if "1" in name} | {"again.weight": torch.ones(6, 6, 1, 1)}
    torch.save(order | {name.replace("bn1", "bn3"): state[name].clone() for name in state if "bn1" in name}, "three.pt")
    assert "between" not in cli("fuse three.pt conv1 bn1 --eps 1e-5 -o near.pt").err
    skipping = cli("fuse three.pt conv1 bn3 --eps 1e-5 -o far.pt")
    assert skipping.code == 0
    assert "bn1, again come between conv1 and bn3 in the file or the model's code" in skipping.err
