"""Order, fan-out, and what happens when one task fails. One file per job, plus the command line."""
