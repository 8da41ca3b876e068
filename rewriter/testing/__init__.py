"""Property-based tests of rules: strategies that draw graphs, and a check that holds a rule to its promises."""
