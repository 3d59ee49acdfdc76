"""Publish a finished run: gate, stage, verify, then one commit or one swap. The only writer to the Hub."""
