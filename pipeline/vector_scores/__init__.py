"""Scores of text vectors, frozen beside adapted, with intervals over texts and paired differences."""
