"""What the driver is composed of: components, workers, start, progress, supervision."""
