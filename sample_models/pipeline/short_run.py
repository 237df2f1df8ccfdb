"""Training in miniature: `python short_run.py OUT SEED` fits a small network for a few steps and saves its weights.

In a project of one's own this is the script that there is already; all that convtool needs is the state dict.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

SAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SAMPLES))
from networks import ConvBatchNorm  # noqa: E402

out, seed = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(seed)
digits = load_file(SAMPLES / "digits.safetensors")
network = ConvBatchNorm()
optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
for _ in range(20):
    chosen = torch.randint(len(digits["labels"]), (32,))
    loss = F.cross_entropy(network(digits["images"][chosen]), digits["labels"][chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
out.parent.mkdir(parents=True, exist_ok=True)
save_file(network.state_dict(), out)
print(f"{out}: loss {float(loss.detach()):.3f}")
