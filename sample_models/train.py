"""Train the sample networks on scikit-learn's handwritten digits and save their checkpoints.

Run as `python sample_models/train.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import NETWORKS
from safetensors.torch import save
from torch import Tensor, nn

SEED = 20
HELD_OUT = 400
EPOCHS = 40
BATCH = 32
PEAK_RATE = 5e-3
WANTED_ACCURACY = 0.95


def load_images() -> tuple[Tensor, Tensor]:
    """Return all images, (N, 1, 8, 8) in 0..1, and their labels."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        sys.exit("train.py needs scikit-learn for the digit images: pip install scikit-learn")
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).div(16).unsqueeze(1).contiguous()
    return images, torch.from_numpy(digits.target).to(torch.int64)


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train the network in place and leave it in evaluation mode."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=1e-2)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_RATE, total_steps=steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        # The rest of an epoch that does not fill a batch is dropped: batch norm is noisy on a short batch.
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            loss = F.cross_entropy(network(images[chosen]), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the network labels correctly."""
    return float((network(images).argmax(dim=1) == labels).double().mean())


def main() -> int:
    """Train and save every network; return 1 if one of them falls short of the wanted accuracy."""
    parser = argparse.ArgumentParser(description="Train the sample networks and save their checkpoints.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
    out: Path = parser.parse_args().out

    torch.use_deterministic_algorithms(True)
    # Sums split over threads round differently, and the files are meant to come out the same on every run.
    torch.set_num_threads(1)

    images, labels = load_images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    out.mkdir(parents=True, exist_ok=True)
    (out / "digits.safetensors").write_bytes(save({"images": images[held], "labels": labels[held]}))

    print(f"{'network':<12} {'parameters':>10} {'held-out accuracy':>18}")
    short = []
    for name, make in NETWORKS.items():
        # Seeded for each network, so that a change to one leaves the checkpoints of the others as they are.
        torch.manual_seed(SEED)
        network = make()
        train(network, images[rest], labels[rest], EPOCHS)
        score = accuracy(network, images[held], labels[held])
        parameters = sum(p.numel() for p in network.parameters())
        print(f"{name:<12} {parameters:>10} {score:>17.2%}", flush=True)
        if score < WANTED_ACCURACY:
            short.append(name)
            continue
        (out / f"{name}.safetensors").write_bytes(save(network.state_dict()))
        torch.save(network.state_dict(), out / f"{name}.pt")
    if short:
        print(f"not saved, below {WANTED_ACCURACY:.0%}: {', '.join(short)}", file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
