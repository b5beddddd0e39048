"""A study as one HTML page and its figures."""
