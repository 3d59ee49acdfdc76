"""The frozen encoder: find and pin its files, load it once, and turn texts into vectors."""
