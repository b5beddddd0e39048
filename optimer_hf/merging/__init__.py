"""Base plus weighted vectors, as a model directory or in memory; mergekit."""
