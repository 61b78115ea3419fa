"""The training items of a round on the learner, and the outputs that are precomputed for them."""
