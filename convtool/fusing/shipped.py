"""The recipes that ship with convtool: the TOML files in the folder `convtool/recipes`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from convtool.errors import UsageError, did_you_mean
from convtool.formats.toml import STREAM, read_toml
from convtool.fusing.recipe import Recipe, parse_recipe


@cache
def shipped() -> Mapping[str, Recipe]:
    """Return the recipes by name, in order of their names."""
    files = sorted(resources.files("convtool.recipes").iterdir(), key=lambda file: file.name)
    texts = {file.name.removesuffix(".toml"): file.read_text("utf-8") for file in files if file.name.endswith(".toml")}
    return {name: parse_recipe(tomllib.loads(text), f"the recipe {name}") for name, text in texts.items()}


def is_file(name: str) -> bool:
    """Return whether a recipe is named by its file, and so is none of those that ship."""
    return name.endswith(".toml") or name == STREAM


def find_recipe(name: str) -> Recipe | None:
    """Return a recipe by its name or the path of its file; None for 'auto'; raise UsageError where there is none."""
    if name == "auto":
        return None
    if is_file(name):
        return parse_recipe(read_toml(Path(name)), name)
    known = shipped()
    if name not in known:
        near = did_you_mean(name, known, cutoff=0.8)
        raise UsageError(
            f"--recipe: no recipe {name!r}{near or ';'} --recipe auto takes the one that fits, `convtool fuse"
            " --list-recipes` lists all, and a recipe of your own is a .toml file"
        )
    return known[name]
