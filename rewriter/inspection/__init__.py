"""What a model is, read off its graph: weights by role, MoE blocks and their form; nothing is computed or changed."""
