"""Recommenders over item vectors, their losses, and how their parameters lie in one vector."""
