"""ddpo report: one HTML page from what a run has left and a comparison on held-out prompts."""
