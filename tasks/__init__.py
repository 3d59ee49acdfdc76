"""Prefect tasks and Ray: retries, timeouts, resources, actors. Policy around one call into the pipeline below."""
