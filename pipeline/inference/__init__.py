"""Inference with trained adapters: find them by reference, merge them, and run several over one encoder."""
