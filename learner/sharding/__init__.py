"""A learner whose weights are sharded over its ranks, with PyTorch's FSDP2."""
