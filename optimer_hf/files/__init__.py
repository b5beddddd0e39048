"""Text files, references, locks, digests and atomic writes."""
