"""Detection of objects in images, and GenEval's rules on what is detected."""
