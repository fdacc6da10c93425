"""DP-SGD for PyTorch models with large embedding tables."""
