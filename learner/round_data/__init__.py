"""A round's transitions on the learner: which there are, and what is precomputed for them."""
