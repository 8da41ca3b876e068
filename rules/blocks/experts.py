"""Every recogniser of MoE blocks, a family per file."""

from __future__ import annotations

from rewriter.facts import Recogniser
from rewriter.rules.blocks import (
    activations,
    combines,
    computed,
    contractions,
    elementwise,
    gathers,
    grouped,
    linears,
    movement,
    parts,
    routers,
    sizes,
    uniform,
    views,
)

RECOGNISERS: tuple[Recogniser, ...] = (
    *views.RECOGNISERS,
    *computed.RECOGNISERS,
    *sizes.RECOGNISERS,
    *movement.RECOGNISERS,
    *parts.RECOGNISERS,
    *uniform.RECOGNISERS,
    *gathers.RECOGNISERS,
    *routers.RECOGNISERS,
    *linears.RECOGNISERS,
    *activations.RECOGNISERS,
    *combines.RECOGNISERS,
    *contractions.RECOGNISERS,
    *grouped.RECOGNISERS,
    *elementwise.RECOGNISERS,
)
