"""The recipe: tables, bounds, overrides, and the registries that they name components of."""
