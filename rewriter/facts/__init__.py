"""What is known of a model's values: facts, the recognisers that state them, and the engine that keeps them."""

from rewriter.facts.facts import DeclineTracer, Facts, agreed
from rewriter.facts.family import Family, Transfer

__all__ = ["DeclineTracer", "Facts", "Family", "Transfer", "agreed"]
