# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files that say how a model of somebody's repository is built and made sparse.

>>> recipe = load_recipe("recipes/norse-convnet.yaml")      # every mistake of the file at once
>>> loaded = load_model("recipes/norse-convnet.yaml")       # the model, its input, its plan
>>> results = check("recipes/", root="~/checkouts")         # really applied, stage by stage
>>> text = draft_recipe("models.net:Net", shape=[4, 3, 32, 32])

Pydantic and yaml are imported with the first of these names that is used.
"""

from typing import TYPE_CHECKING

from spikenm_fx._lazy import attach

if TYPE_CHECKING:
    from spikenm_fx.recipe.checking import check
    from spikenm_fx.recipe.draft import draft_recipe
    from spikenm_fx.recipe.loaded import LoadedModel, load_model
    from spikenm_fx.recipe.schema import Recipe, load_recipe, parse_recipe, recipe_json_schema
    from spikenm_fx.recipe.trial import CheckResult

__all__ = [
    "CheckResult",
    "LoadedModel",
    "Recipe",
    "check",
    "draft_recipe",
    "load_model",
    "load_recipe",
    "parse_recipe",
    "recipe_json_schema",
]

attach(
    __name__,
    {
        "CheckResult": "spikenm_fx.recipe.trial",
        "LoadedModel": "spikenm_fx.recipe.loaded",
        "Recipe": "spikenm_fx.recipe.schema",
        "check": "spikenm_fx.recipe.checking",
        "draft_recipe": "spikenm_fx.recipe.draft",
        "load_model": "spikenm_fx.recipe.loaded",
        "load_recipe": "spikenm_fx.recipe.schema",
        "parse_recipe": "spikenm_fx.recipe.schema",
        "recipe_json_schema": "spikenm_fx.recipe.schema",
    },
)
