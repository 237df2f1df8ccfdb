"""The shared core: frozen values and pure functions. Nothing in here prints or opens a file."""
