"""The sealed test: the merge against every baseline."""
