"""One training run, from a checked config to a finished folder. Contains the work of one worker, without Ray."""
