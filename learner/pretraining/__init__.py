"""How the embedded model was made: drawings, autoencoder, denoiser, and the probe that judges it."""
