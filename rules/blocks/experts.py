"""Every recogniser of MoE blocks, a family per file, and those that other packages add to the families."""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.facts import Transfer
from rewriter.facts.outside import load_recognisers
from rewriter.facts.shapes import sizes
from rewriter.rules.blocks.activations import activations
from rewriter.rules.blocks.combines import combines
from rewriter.rules.blocks.contractions import contractions
from rewriter.rules.blocks.counted import counts
from rewriter.rules.blocks.elementwise import elementwise
from rewriter.rules.blocks.gathers import gathers
from rewriter.rules.blocks.grouped import rows
from rewriter.rules.blocks.hits import hits
from rewriter.rules.blocks.linears import linears
from rewriter.rules.blocks.masks import masks
from rewriter.rules.blocks.movement import movement
from rewriter.rules.blocks.routers import routers
from rewriter.rules.blocks.routing_weights import routing_weights
from rewriter.rules.blocks.tables import tables
from rewriter.rules.blocks.uniform import numbers
from rewriter.rules.blocks.written import written


class _Blocks:
    """The recognisers, as the families hold them when they are asked for."""

    def __iter__(self) -> Iterator[Transfer]:
        load_recognisers()
        for family in (
            sizes,
            movement,
            numbers,
            gathers,
            routers,
            routing_weights,
            linears,
            activations,
            masks,
            combines,
            contractions,
            rows,
            counts,
            tables,
            hits,
            written,
            elementwise,
        ):
            yield from family


RECOGNISERS = _Blocks()
