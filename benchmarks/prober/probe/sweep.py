"""Every form that is measured: what rules emit or read, and what a table has to know the border of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from probe.forms import Form, LinearForm, LookupForm, MoEForm, QMoEForm

TYPES = ("FLOAT", "FLOAT16", "BFLOAT16")
_BLOCKS = (0, 16, 32, 64, 128, 256)
_ZEROS = ("none", "all")
_ACTS = (
    {"act": "relu", "fusion": 0},
    {"act": "relu2", "fusion": 0},
    {"act": "gelu", "fusion": 0},
    {"act": "silu", "fusion": 0},
    {"act": "identity", "fusion": 0},
    {"act": "swiglu", "fusion": 1},
    {"act": "swiglu", "fusion": 2},
    {"act": "geglu", "fusion": 1},
    {"act": "geglu", "fusion": 2},
    {"act": "swiglu", "fusion": 0, "fc3": True},
    {"act": "silu", "fusion": 0, "fc3": True},
    {"act": "gelu", "fusion": 0, "fc3": True},
)
_PATHS = (
    QMoEForm(bits=(2, 2), block=64),
    QMoEForm(bits=(8, 8), block=64),
    *(QMoEForm(bits=bits, block=block) for bits in ((4, 8), (8, 4), (2, 4)) for block in (16, 64)),
    *(QMoEForm(bits=(bits, bits), block=block, layout="sm80") for bits in (4, 8) for block in (0, 64)),
    *(QMoEForm(quant="mxfp4", layout=layout, prepacked=told) for layout, told in (("raw", "1"), ("columns", "0"))),
    *(QMoEForm(quant="nvfp4", block=16, layout=own, prepacked=told) for own, told in (("raw", "1"), ("columns", "0"))),
)
"""What kernels have code of their own for."""


def forms() -> list[Form]:
    """Returns the forms, each once."""
    return list(dict.fromkeys((*_linears(), *_lookups(), *_moes(), *_qmoes())))


def _linears() -> Iterator[LinearForm]:
    for bits, block, zeros, x in itertools.product((2, 3, 4, 8), _BLOCKS[1:], ("none", "packed"), TYPES):
        yield LinearForm(x=x, bits=bits, block=block, zeros=zeros)
    for bits, zeros, x in itertools.product((2, 4, 8), ("none", "packed"), TYPES):
        own = LinearForm(x=x, bits=bits, zeros=zeros)
        yield replace(own, bias=True)
        yield replace(own, k=480)
        yield replace(own, block=128, k=320)
        yield replace(own, block=64, k=192)
        yield replace(own, block=16, k=40)
        yield replace(own, n=97)
        yield replace(own, level=4)
        yield replace(own, level=1)
    for bits, block, x in itertools.product((2, 4, 8), (32, 128), TYPES[:2]):
        yield LinearForm(x=x, bits=bits, block=block, zeros="float")
        yield LinearForm(x=x, bits=bits, block=block, flat=True)
    for sm, bits, block, zeros in itertools.product(("sm80", "sm90"), (4, 8), _BLOCKS[2:], ("none", "packed")):
        yield LinearForm(x="FLOAT16", bits=bits, block=block, zeros=zeros, layout=sm)
    for x in ("FLOAT", "BFLOAT16"):
        yield LinearForm(x=x, layout="sm80")
    yield LinearForm(x="FLOAT16", layout="sm80", bias=True)


def _lookups() -> Iterator[LookupForm]:
    for bits, block, zeros, x in itertools.product((2, 4, 8), _BLOCKS[1:], ("none", "packed"), TYPES):
        yield LookupForm(x=x, bits=bits, block=block, zeros=zeros)
    for bits, block, zeros, x in itertools.product((2, 4, 8), _BLOCKS[1:], ("none", "packed"), TYPES):
        yield LookupForm(x=x, bits=bits, block=block, zeros=zeros, rank=3, k=block)
    for bits, zeros, x, rank in itertools.product((2, 4, 8), ("none", "packed"), TYPES, (2, 3)):
        yield LookupForm(x=x, bits=bits, zeros=zeros, rank=rank)
        yield LookupForm(x=x, bits=bits, zeros=zeros, rank=rank, k=96)
        yield LookupForm(x=x, bits=bits, zeros=zeros, rank=rank, k=120)


def _moes() -> Iterator[MoEForm]:
    for act, x, bias in itertools.product(_ACTS, TYPES, ("none", "all")):
        yield MoEForm(x=x, bias=bias, **act)
    yield from _routings(MoEForm())
    yield MoEForm(h=96, i=96)
    yield MoEForm(h=96, i=96, x="FLOAT16")


def _routings(own: MoEForm) -> Iterator[MoEForm]:
    """What both operators have in common beside the activation."""
    for x in TYPES:
        typed = replace(own, x=x)
        for constants in ("1.702,1,7", "1.3,0.5,2"):
            yield replace(typed, constants=constants)
        for top in (1, 2, 4):
            yield replace(typed, top=top)
            yield replace(typed, top=top, normalize=False)
        yield replace(typed, normalize=False, act="silu", fusion=0)
        yield replace(typed, sparse=True)
        yield replace(typed, rank=3)
        yield replace(typed, rank=3, normalize=False)


def _qmoes() -> Iterator[QMoEForm]:
    for x in TYPES:
        yield from _widths(x)
    for act, bits, x in itertools.product(_ACTS, (4, 8), TYPES):
        yield QMoEForm(x=x, bits=(bits, bits), **act)
        yield QMoEForm(x=x, bits=(bits, bits), bias="all", zeros="all", **act)
    yield from _routings(QMoEForm())
    for x, layout, normalize in itertools.product(TYPES, ("raw", "sm80"), (True, False)):
        for top, sizes in itertools.product((1, 2, 4), ({}, {"rank": 3})):
            yield QMoEForm(x=x, layout=layout, normalize=normalize, top=top, weights=True, **sizes)
    for x, layout in itertools.product(TYPES, ("raw", "sm80")):
        yield QMoEForm(x=x, layout=layout, normalize=False)
        yield QMoEForm(x=x, layout=layout, sparse=True)
        yield QMoEForm(x=x, layout=layout, bias="all")
    for x, bits, block in itertools.product(TYPES, (2, 4, 8), (0, 32, 128)):
        yield QMoEForm(x=x, bits=(bits, bits), block=block, level=4)
    yield from _layouts()
    yield from _four_bit_floats()
    for path, x in itertools.product(_PATHS, TYPES):
        own = replace(path, x=x)
        yield own
        yield replace(own, h=192, i=128)
        yield from (replace(own, **act) for act in _ACTS[:7])
        yield replace(own, bias="all", zeros="all" if own.quant == "int" and own.bits[0] == own.bits[1] else "none")
        yield replace(own, bias="all", constants="1.702,1,7")
        yield replace(own, top=1, rank=3)
        yield replace(own, normalize=False, top=4)


def _widths(x: str) -> Iterator[QMoEForm]:
    for bits, block, zeros in itertools.product((2, 3, 4, 8), _BLOCKS, _ZEROS):
        yield QMoEForm(x=x, bits=(bits, bits), block=block, zeros=zeros)
    for block in (32, 64, 128):
        yield QMoEForm(x=x, bits=(3, 3), block=block, scales="positive")
    for bits, block, zeros in itertools.product(((4, 8), (8, 4), (2, 4), (2, 8)), (0, 32, 128), _ZEROS):
        yield QMoEForm(x=x, bits=bits, block=block, zeros=zeros)
    for bits, zeros in itertools.product((2, 4, 8), ("none", "all", "fc1", "fc2")):
        own = QMoEForm(x=x, bits=(bits, bits), zeros=zeros)
        yield replace(own, bias="all")
        yield replace(own, h=192, i=192, block=64)
        yield replace(own, h=256, i=192, block=64)
        yield replace(own, h=192, i=256, block=64)
        yield replace(own, h=128, i=128, block=128)
        yield replace(own, h=128, i=256, block=128)
        yield replace(own, h=256, i=128, block=128)
        yield replace(own, h=96, i=96)
        yield replace(own, h=96, i=96, block=0)
        yield replace(own, h=160, i=128)


def _layouts() -> Iterator[QMoEForm]:
    for x, bits, block in itertools.product(TYPES, (4, 8), _BLOCKS):
        for layout, zeros in itertools.product(("sm80", "sm90"), _ZEROS if block > 16 else _ZEROS[:1]):
            if layout == "sm80" or (x == "FLOAT16" and zeros == "none"):
                yield QMoEForm(x=x, bits=(bits, bits), block=block, zeros=zeros, layout=layout)
    for act, bits, x in itertools.product(_ACTS, (4, 8), TYPES):
        yield QMoEForm(x=x, bits=(bits, bits), layout="sm80", **act)
    for x in TYPES:
        own = QMoEForm(x=x, layout="sm80", zeros="all", block=64)
        yield replace(own, h=192, i=192)
        yield replace(own, h=256, i=192)
        yield replace(own, bits=(8, 8), h=192, i=192)
        yield replace(own, bits=(4, 8), zeros="none")
        yield replace(own, bits=(8, 4), zeros="none")
        for prepacked, layout in itertools.product(("none", "-1", "1"), ("raw", "sm80")):
            yield QMoEForm(x=x, layout=layout, prepacked=prepacked)
            yield QMoEForm(x=x, bits=(8, 8), layout=layout, prepacked=prepacked)


def _four_bit_floats() -> Iterator[QMoEForm]:
    """Floats of 4 bits."""
    for x, (quant, block), layout, prepacked in itertools.product(
        TYPES, (("mxfp4", 32), ("nvfp4", 16)), ("raw", "columns"), ("none", "0", "1")
    ):
        yield QMoEForm(x=x, quant=quant, block=block, layout=layout, prepacked=prepacked)
    for x, (quant, block) in itertools.product(TYPES, (("mxfp4", 32), ("nvfp4", 16))):
        for layout in ("raw", "columns"):
            own = QMoEForm(x=x, quant=quant, block=block, layout=layout, prepacked="1")
            yield replace(own, bias="all", constants="1.702,1,7")
            yield replace(own, weights=True, normalize=False)
            yield replace(own, normalize=False)
            yield replace(own, act="silu", fusion=0)
            yield replace(own, h=192, i=192)
