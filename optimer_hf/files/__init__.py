"""Text files, references, locks, digests and writes that are whole or not at all."""
