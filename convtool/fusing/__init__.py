"""The core applied to checkpoints: which layers are fused, what is written, what is recorded, and whether it holds."""
