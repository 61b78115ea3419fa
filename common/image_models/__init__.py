"""Models that score images, shared by rewards and the fitting of heads."""
