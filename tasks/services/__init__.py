"""Servers on this machine's loopback: Prefect, Ray's folder, the reports, and what keeps them closed to others."""
