"""Load a user's own code, and name its file and line when it fails."""
