"""What the file adapters share: the one way a file comes into being."""
