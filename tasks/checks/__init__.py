"""Checks of `lorafleet doctor`: this machine, its libraries and its servers."""
