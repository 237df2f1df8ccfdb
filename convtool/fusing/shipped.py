"""The recipes that ship with convtool: the TOML files in the folder `convtool/recipes`."""

from __future__ import annotations

import tomllib
from importlib import resources

from convtool.fusing.recipe import Recipe, parse_recipe


def shipped() -> dict[str, Recipe]:
    """Return the recipes by name, in order of their names."""
    files = sorted(resources.files("convtool.recipes").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".toml"): parse_recipe(tomllib.loads(file.read_text(encoding="utf-8")), file.name)
        for file in files
        if file.name.endswith(".toml")
    }
