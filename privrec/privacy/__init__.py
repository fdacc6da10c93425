"""Noise, privacy events and their accounting, and the ledger that ε is computed from."""
