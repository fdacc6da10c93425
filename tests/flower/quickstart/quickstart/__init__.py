"""An app of Flower's Message API that trains a small network on images made from a seed."""
