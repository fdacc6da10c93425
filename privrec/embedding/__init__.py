"""The shared item memory: hashing, and the random subspace it spans."""
