"""The side that acts: samplers and reward workers."""
