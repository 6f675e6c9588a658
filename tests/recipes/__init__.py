"""Recipes: each file changes nothing in the two scripts, and says in its docstring how it is used."""
