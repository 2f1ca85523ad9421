"""Recipes: what a person writes, with the position of every key and value."""

from pipeline.recipe.load import load_cells, load_recipe
from pipeline.recipe.schema import Gate, Recipe, Stage
from pipeline.recipe.validation import validate

__all__ = ["Gate", "Recipe", "Stage", "load_cells", "load_recipe", "validate"]
