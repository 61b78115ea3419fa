"""ddpo plan: the sizes and the memory that follow from a recipe."""
