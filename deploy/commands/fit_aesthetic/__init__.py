"""ddpo fit-aesthetic: fit an aesthetic head on rated images."""
