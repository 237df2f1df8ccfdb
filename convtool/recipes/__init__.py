"""The recipes that ship with convtool, one TOML file each."""

from __future__ import annotations

import tomllib
from importlib import resources

from convtool.fusing.recipe import Recipe, parse_recipe


def shipped() -> dict[str, Recipe]:
    """Recipes by name, in order of their names."""
    files = sorted(
        (file for file in resources.files(__name__).iterdir() if file.name.endswith(".toml")),
        key=lambda file: file.name,
    )
    return {
        file.name.removesuffix(".toml"): parse_recipe(tomllib.loads(file.read_text(encoding="utf-8")), file.name)
        for file in files
    }
