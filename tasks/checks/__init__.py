"""Checks of `lorafleet doctor`: this machine, its libraries, and the servers that it uses."""
