"""ddpo doctor: find what would go wrong with a recipe here, before it does."""
