"""The domain: data, encoder, adapter, training, evaluation, artefacts. Knows nothing of Prefect or Ray."""

__version__ = "0.1.0"
