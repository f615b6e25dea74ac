# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files that say how a model of somebody's repository is built and made sparse."""
