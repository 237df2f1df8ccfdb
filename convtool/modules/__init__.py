"""Modules of a live model: what they are, what they compute, and new ones that compute what a `Conv` does."""
