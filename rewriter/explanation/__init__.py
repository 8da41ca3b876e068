"""What a rule set would do to a model, and why: answers for Python, which the command line prints."""
