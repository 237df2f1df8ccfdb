"""The README's pipeline: train, fuse, verify, publish; as a script, with make, and as a job array. And the demo."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from schemas import validate

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: Path) -> Path:
    """A working folder with the sample models beside it."""
    shutil.copytree(ROOT / "sample_models", tmp_path / "sample_models")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.pathsep.join([str(warm), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    return tmp_path


def bash(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_pipeline_releases_what_was_proven(folder: Path) -> None:
    done = bash(folder, "sample_models/pipeline/pipeline.sh first 3 | tee log")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("to load it: ")
    assert done.stderr.count("\n") == 1
    assert "assumed" not in done.stdout  # the model says all of the geometry
    released = folder / "release" / "first.safetensors"
    proof = json.loads((folder / "release" / "first.proof.json").read_text())
    validate(proof)
    assert proof["equivalent"] is True
    assert {part["name"] for part in proof["fusions"]} == {"conv1", "conv2", "conv3", "conv4"}
    checksum = (folder / "release" / "first.sha256").read_text().split()
    assert checksum == [hashlib.sha256(released.read_bytes()).hexdigest(), "first.safetensors"]
    assert not any("bn" in name for name in load_file(released))
    assert bash(folder, "make -q -f sample_models/pipeline/release.mk release/first.safetensors").returncode == 0


def test_a_task_of_a_job_array_releases_its_own_run(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / "runs" / name).mkdir(parents=True)
        shutil.copy(ROOT / "sample_models" / "conv_bn.safetensors", folder / "runs" / name / "model.safetensors")
    done = bash(folder, "SLURM_ARRAY_TASK_ID=1 bash sample_models/pipeline/array.sh")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (folder / "release").iterdir()} == {"two.safetensors", "two.proof.json", "two.sha256"}


def test_the_demo_ends_well(folder: Path) -> None:
    done = bash(folder, "bash sample_models/demo.sh")
    assert done.returncode == 0, done.stderr
    assert "sparse array of dtype 'float32'" in done.stdout
    assert "equivalent, every basis vector run" in done.stdout
    assert "0 answers changed" in done.stdout
    assert "cannot fuse blur, sharpen exactly" in done.stderr
    assert {path.name for path in (folder / "demo_output").iterdir()} == {"widen.npz", "fused.safetensors"}


def test_what_verify_turns_down_is_not_released(folder: Path) -> None:
    """With a convtool of three lines, whose verify says no."""
    (folder / "bin").mkdir()
    fake = folder / "bin" / "convtool"
    fake.write_text(
        '#!/usr/bin/env bash\n[ "$1" = fuse ] && while [ "$1" != -o ]; do shift; done && touch "$2" && exit 0\nexit 1\n'
    )
    fake.chmod(0o755)
    (folder / "runs" / "bad").mkdir(parents=True)
    (folder / "runs" / "bad" / "model.safetensors").touch()
    done = bash(folder, 'PATH="$PWD/bin:$PATH" make -f sample_models/pipeline/release.mk release/bad.safetensors')
    assert done.returncode != 0
    assert "convtool verify" in done.stdout
    assert not (folder / "release" / "bad.safetensors").exists()
    assert not (folder / "release" / "bad.sha256").exists()
