"""Recipes: patterns over layer names, resolved into the fusions of one checkpoint."""

from convtool.fusing.recipe.language import Recipe as Recipe
from convtool.fusing.recipe.language import parse_recipe as parse_recipe
from convtool.fusing.recipe.pattern import Names as Names
from convtool.fusing.recipe.resolve import Known as Known
from convtool.fusing.recipe.resolve import NothingFitsError as NothingFitsError
from convtool.fusing.recipe.resolve import PlannedFusion as PlannedFusion
from convtool.fusing.recipe.resolve import resolve as resolve
