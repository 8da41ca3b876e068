"""A budget in place of a plan."""
