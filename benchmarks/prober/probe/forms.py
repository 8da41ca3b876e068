"""The forms of an operator that a runtime may or may not run: what varies, how it is written as text, and read back.

A form is written as its operator and the settings that differ from their defaults, as
``QMoE x=FLOAT16 bits=4,8 block=64``, so that the forms of a file of answers can be read by eye and by code.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar


@dataclass(frozen=True)
class LinearForm:
    """A MatMulNBits.

    Attributes:
        x: element type of x and of the scales, as ONNX names it.
        bits: width of a code.
        block: input features per scale.
        zeros: none, packed (uint8 codes) or float (of x's type).
        bias: whether slot 5 is given.
        layout: raw, sm80 or sm90.
        level: accuracy_level; 0 leaves it out.
        n: output features.
        k: input features.
        flat: whether the scales are written with one dimension.
    """

    operator: ClassVar[str] = "MatMulNBits"
    x: str = "FLOAT"
    bits: int = 4
    block: int = 32
    zeros: str = "none"
    bias: bool = False
    layout: str = "raw"
    level: int = 0
    n: int = 128
    k: int = 512
    flat: bool = False


@dataclass(frozen=True)
class LookupForm:
    """A GatherBlockQuantized of a uint8 table.

    Attributes:
        x: element type of the scales and of the output.
        bits: width of a code.
        block: codes per scale.
        zeros: none or packed.
        rank: of the table: 2 for [rows, K], 3 for [experts, rows, K].
        k: codes of a row.
    """

    operator: ClassVar[str] = "GatherBlockQuantized"
    x: str = "FLOAT"
    bits: int = 4
    block: int = 32
    zeros: str = "none"
    rank: int = 2
    k: int = 256


@dataclass(frozen=True)
class MoEForm:
    """A MoE with float weights.

    Attributes:
        x: element type of x, of the router and of the weights.
        act: activation_type.
        fusion: swiglu_fusion.
        fc3: whether the linear half is in fc3.
        constants: of SwiGLU: alpha, beta and limit.
        bias: which biases are given: none or all.
        normalize: normalize_routing_weights.
        sparse: whether use_sparse_mixer is set.
        top: k, the experts of a token.
        rank: of x: 2 for [T, H], 3 for [1, T, H].
        h: hidden features.
        i: intermediate features.
    """

    operator: ClassVar[str] = "MoE"
    x: str = "FLOAT"
    act: str = "swiglu"
    fusion: int = 1
    fc3: bool = False
    constants: str = "1,0,inf"
    bias: str = "none"
    normalize: bool = True
    sparse: bool = False
    top: int = 2
    rank: int = 2
    h: int = 256
    i: int = 256


@dataclass(frozen=True)
class QMoEForm(MoEForm):
    """A QMoE.

    Attributes:
        bits: widths of the codes of fc1 and fc2; fc3's are fc1's.
        block: input features per scale; 0 is the whole row.
        zeros: which projections have zero points: none, all, fc1 or fc2.
        scales: signed (half of them negative) or positive.
        layout: of the codes: raw ([N, K] rows), columns ([K, N] rows, of fp4), sm80 or sm90.
        prepacked: the attribute weights_prepacked: auto (0 for raw codes and 1 for others, where the operator has it),
            none, or its value.
        weights: whether router_weights are given.
        level: accuracy_level; 0 leaves it out.
        quant: quant_type: int, or mxfp4 (written fp4) or nvfp4.
    """

    operator: ClassVar[str] = "QMoE"
    bits: tuple[int, int] = (4, 4)
    block: int = 32
    zeros: str = "none"
    scales: str = "signed"
    layout: str = "raw"
    prepacked: str = "auto"
    weights: bool = False
    level: int = 0
    quant: str = "int"


Form = LinearForm | LookupForm | MoEForm | QMoEForm

_KINDS: dict[str, type[Form]] = {kind.operator: kind for kind in (LinearForm, LookupForm, MoEForm, QMoEForm)}


def text_of(form: Form) -> str:
    """Writes a form."""
    changed = [f.name for f in fields(form) if getattr(form, f.name) != f.default]
    return " ".join([form.operator, *(f"{name}={_written(getattr(form, name))}" for name in changed)])


def form_of(text: str) -> Form:
    """Reads a form.

    Raises:
        ValueError: the text is no form.
    """
    operator, *settings = text.split()
    kind = _KINDS.get(operator)
    if kind is None:
        raise ValueError(f"'{text}' starts with no operator of {', '.join(_KINDS)}")
    defaults = {f.name: f.default for f in fields(kind)}
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in defaults:
            raise ValueError(f"'{setting}' in '{text}' is no setting of {operator} ({', '.join(defaults)})")
        found[name] = _read(value, defaults[name])
    return kind(**found)


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


def _read(value: str, default: object) -> object:
    if isinstance(default, bool):
        return bool(int(value))
    if isinstance(default, int):
        return int(value)
    return tuple(map(int, value.split(","))) if isinstance(default, tuple) else value
