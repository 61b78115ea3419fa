"""A reward behind HTTP, on a machine and in an environment of its own."""
