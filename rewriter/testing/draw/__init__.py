"""How each strategy draws its models."""
