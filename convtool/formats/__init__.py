"""File formats: each is read and written in one module, for checkpoints and for matrices, and all write in one way."""
