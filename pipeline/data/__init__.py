"""From the name of a data set to texts and labels to learn from. The door to mteb's tasks."""
