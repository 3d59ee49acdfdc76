"""Flows and command line: order of the stages, fan-out, handling of failed tasks. One file per flow."""
