"""From a finished run to a published one: gate, stage, verify, then one commit or one swap. The only writer to the Hub."""
