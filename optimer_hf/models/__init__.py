"""A model on disk, on the Hub and in memory."""
