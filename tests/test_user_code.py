"""A user's own code, whatever it raises, exits or prints: the exit codes are convtool's and stdout is the document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from convtool.cli.app import run_app

ENDINGS = {
    "exits with 0": "sys.exit(0)",
    "exits with 1": "sys.exit(1)",
    "exits with a text": "sys.exit('no\\x1b[31m')",
    "raises no Exception": "raise Odd('gone\\x1b[31m')",
    "raises an error": "raise ValueError('gone')",
}
PLACES = ("when it is imported", "when it is built", "when it runs")
CODE = """
import os, subprocess, sys
from torch import nn

class Odd(BaseException):
    pass

def end(place):
    print("printed by the model")
    os.write(1, b"written by the model\\n")
    subprocess.run([sys.executable, "-c", "print('from a child of the model')"])
    if place == PLACE:
        ENDING

end("when it is imported")

class Net(nn.Sequential):
    def __init__(self):
        end("when it is built")
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        end("when it runs")
        return super().forward(x)
"""
COMMANDS = {
    "inspect": ("inspect", "net.pt", "--model", "net.py:Net", "--model-input", "3,8,8"),
    "plan": ("plan", "net.pt", "--model", "net.py:Net", "--model-input", "3,8,8"),
    "fuse": ("fuse", "net.pt", "--auto", "--model", "net.py:Net", "--model-input", "3,8,8", "-o", "out.pt"),
}


class Terminal:
    """Runs command lines in a folder, and reads what reached the file descriptors of stdout and stderr."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.capture.readouterr()
        code = run_app([*words, "--json"])
        return (code, *self.capture.readouterr())


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(capfd)


def network(folder: Path, place: str, ending: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    torch.save(model.state_dict(), folder / "net.pt")
    (folder / "net.py").write_text(CODE.replace("PLACE", repr(place)).replace("ENDING", ending))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ending", ENDINGS)
def test_code_that_ends_the_run_is_a_usage_error(place: str, ending: str, tmp_path: Path, terminal: Terminal) -> None:
    network(tmp_path, place, ENDINGS[ending])
    code, out, err = terminal(*COMMANDS["plan" if place == "when it is built" else "fuse"])
    document = json.loads(out)  # one document, and nothing of what the code printed
    assert (code, document["ok"], document["error"]["exit_code"]) == (2, False, 2), err
    assert not (tmp_path / "out.pt").exists()
    assert "\x1b" not in out + err  # what the code says may try to steer the terminal
    assert "printed by the model" in err
    assert "written by the model" in err
    assert "from a child of the model" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_code_prints_goes_to_stderr(command: str, tmp_path: Path, terminal: Terminal) -> None:
    network(tmp_path, "never", "pass")
    code, out, err = terminal(*COMMANDS[command])
    assert code == 0, err
    assert json.loads(out)["ok"]
    assert "printed by the model" in err


MODEL = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        HOLD

    def forward(self, x):
        return super().forward(x) + self.held

one = Net()
"""
HOLDS = {
    "numbers of no state dict": "self.register_buffer('held', torch.rand(4, 1, 1), persistent=False)",
    "a tensor that it computed": "self.held = self[0].bias[:, None, None] * 0",
}


@pytest.mark.parametrize("holds", HOLDS)
def test_both_networks_of_a_verification_are_like_each_other_but_for_the_fusions(
    holds: str, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"net_that_holds_{'_'.join(holds.split())}"
    (tmp_path / f"{name}.py").write_text(MODEL.replace("HOLD", HOLDS[holds]))
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(), tmp_path / "net.pt")
    fusing = ("fuse", "net.pt", "0", "1", "--assume-defaults", "-o", "out.pt")
    assert terminal(*fusing)[0] == 0
    verifying = ("verify", "net.pt", "out.pt", "--assume-defaults", "--model-input", "3,8,8", "--model")
    copied = "computed" not in holds
    assert terminal(*verifying, f"{name}.py:Net")[0] == 0
    code, _, said = terminal(*verifying, f"{name}:one")
    assert code == (0 if copied else 2)
    assert copied or f"--model: {name}:one is one model that can't be copied" in said
