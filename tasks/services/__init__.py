"""Servers on loopback (Prefect, reports), the folders that they use, and their protection from other users."""
