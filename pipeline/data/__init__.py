"""Data sets: from a name in the config to texts and labels, checked and split. The door to mteb's tasks."""
