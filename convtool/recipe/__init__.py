"""Recipes: patterns over layer names, resolved into the fusions of one checkpoint."""

from convtool.recipe.language import Recipe as Recipe
from convtool.recipe.language import parse_recipe as parse_recipe
from convtool.recipe.names import LayerFacts as LayerFacts
from convtool.recipe.names import Names as Names
from convtool.recipe.resolve import Known as Known
from convtool.recipe.resolve import PlannedFusion as PlannedFusion
from convtool.recipe.resolve import resolve as resolve
