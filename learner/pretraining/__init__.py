"""Pretrain the embedded model: drawings, autoencoder, denoiser, and the probe that evaluates it."""
