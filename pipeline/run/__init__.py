"""One training run, from a checked config to a finished folder. The work of one worker, without Ray."""
