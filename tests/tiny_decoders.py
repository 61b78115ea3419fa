"""Configurations of small decoders that the families' small models share."""

AUTOENCODER = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
EIGHTFOLD = AUTOENCODER | {  # 8 × 8 pixels of a latent, which SDXL is told of
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
FLOW_AUTOENCODER = AUTOENCODER | {
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
}
