"""Models that score images, shared by rewards and by the fitting of heads."""
