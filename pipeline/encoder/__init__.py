"""The frozen encoder: found and pinned, loaded once, texts in, vectors out."""
