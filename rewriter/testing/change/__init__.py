"""One fact of a model changed: what near misses are made of."""
