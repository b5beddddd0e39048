"""Text sources -> documents."""
