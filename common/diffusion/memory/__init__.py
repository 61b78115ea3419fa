"""Predict peak memory on the meta device, without loading a model."""
