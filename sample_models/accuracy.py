"""How often a sample network is right on the held-out digits, before and after convtool changed its checkpoint.

    python sample_models/accuracy.py chains sample_models/chains.safetensors fused.safetensors

A checkpoint that convtool fused is loaded with `convtool.apply`, which puts the fused layers into the network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from networks import NETWORKS
from safetensors.torch import load_file
from torch import Tensor

import convtool

HERE = Path(__file__).resolve().parent


def class_scores(network: str, checkpoint: Path, images: Tensor) -> Tensor:
    """(N, 10) scores of the network with that checkpoint's numbers."""
    model = NETWORKS[network]()
    opened = convtool.open_checkpoint(checkpoint)
    if opened.record is None:
        model.load_state_dict({name: opened.tensor(name) for name in opened.infos}, strict=True)
    else:
        convtool.apply(model, checkpoint)
    model.eval()
    with torch.inference_mode():
        scores: Tensor = model(images)
    return scores


def main() -> None:
    """Print one line per checkpoint; exit 1 where a later one classifies any digit differently from the first."""
    parser = argparse.ArgumentParser(description="Accuracy of sample networks on the held-out digits.")
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("checkpoints", nargs="+", type=Path)
    arguments = parser.parse_args()
    digits = load_file(HERE / "digits.safetensors")
    first: Tensor | None = None
    changed = False
    for checkpoint in arguments.checkpoints:
        scores = class_scores(arguments.network, checkpoint, digits["images"])
        answers = scores.argmax(1)
        right = int((answers == digits["labels"]).sum())
        line = f"{checkpoint}: {right} of {len(answers)} right ({right / len(answers):.2%})"
        if first is None:
            first = scores
        else:
            differing = int((answers != first.argmax(1)).sum())
            changed = changed or differing > 0
            largest = float((scores - first).abs().max() / first.abs().max())
            line += f"; {differing} answers changed, scores differ by {largest:.1e} of the largest"
        print(line)
    if changed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
