"""Scores of encoders and adapters, with intervals and paired tests. The only package that calls ``mteb.evaluate``."""
