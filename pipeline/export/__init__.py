"""One adapter in the form that another tool loads, read back and compared before it appears."""
