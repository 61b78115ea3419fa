"""The model card of `ddpo push`: what the hub shows of a run, from what it has left."""
