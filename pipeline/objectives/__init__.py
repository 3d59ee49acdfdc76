"""What an adapter is trained for: the examples, their loss, and the number that selects the epoch."""
