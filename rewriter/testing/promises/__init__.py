"""What a rule promises of its result, each promise in a file."""
