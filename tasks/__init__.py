"""Prefect tasks and Ray actors: retries, timeouts, resources. Each is policy around one call into the pipeline."""
