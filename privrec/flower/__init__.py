"""Federated training over Flower; an extra, which the rest of privrec does without."""
