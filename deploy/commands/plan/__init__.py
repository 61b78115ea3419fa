"""ddpo plan: batch sizes, data volumes and memory of a recipe."""
