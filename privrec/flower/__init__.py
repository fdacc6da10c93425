"""Recommenders and a secure sum in Flower; the only room that imports ``flwr``."""
