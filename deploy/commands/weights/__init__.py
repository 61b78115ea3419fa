"""Find the weights that a command is given, and the base model that they belong to."""
