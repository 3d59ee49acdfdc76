"""Trained adapters at work: found by reference, merged, several over one encoder."""
