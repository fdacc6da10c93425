"""Noise that is drawn when its row is read."""
