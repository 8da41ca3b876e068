"""A prober of runtimes, which needs nothing of the rewriter."""
