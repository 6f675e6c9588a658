"""Recipes: each changes nothing in the two scripts, and its docstring says how it is used."""
