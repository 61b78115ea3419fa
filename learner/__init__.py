"""The side that learns."""
