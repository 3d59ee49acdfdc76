"""Export of one adapter for other tools. Each export is read back and compared before it appears."""
