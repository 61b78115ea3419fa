"""The acting side: samplers and reward workers."""
