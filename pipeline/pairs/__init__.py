"""Pairs of texts: read from files, packages, a mirror or the Hub, checked, scaled and split. Fills mteb's tasks."""
