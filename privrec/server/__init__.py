"""The server: who is sampled, what is released, and how the model moves."""
