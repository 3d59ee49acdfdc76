"""What an encoder or adapter scores, with intervals and paired tests. The door to mteb.evaluate."""
