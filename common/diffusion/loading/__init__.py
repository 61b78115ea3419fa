"""Load published models: find their files, check their configuration, load what a role needs."""
