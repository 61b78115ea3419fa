"""ddpo migrate: turn a DDPOConfig of TRL's into a recipe."""
