"""LoRA: adapters in a network, and adapter files in every format."""
