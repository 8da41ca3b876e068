"""Importance as llama.cpp's ``llama-imatrix`` writes it: sums of squares by tensor, under llama.cpp's own names.

Two kinds of files: GGUF, with ``NAME.in_sum2`` and ``NAME.counts``, read by the package ``gguf``; and the older
``.dat``, whose entries are a name, a number of calls, and as many means times calls as the tensor has input features,
for every expert of a stack in turn. Names there are of roles and layers, as ``blk.3.ffn_down_exps.weight``: so they fit
any export.

Source: llama.cpp, tools/imatrix.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rewriter.errors import UsageError, reason, to_install
from rewriter.quantize.types import FloatArray

_ATTENTION = {
    **{"q": ("attn_q",), "k": ("attn_k",), "v": ("attn_v",), "o": ("attn_output",)},
    **{letters: ("attn_qkv", *(f"attn_{letter}" for letter in letters)) for letters in ("qkv", "qk", "kv", "qv")},
}
_FAMILIES = {"mlp": "", "expert": "_exps", "shared_expert": "_shexp"}
_PARTS = {"gate_up": ("gate_up", "gate", "up"), "gate": ("gate", "gate_up"), "up": ("up", "gate_up"), "down": ("down",)}
_OTHERS = {"router": "ffn_gate_inp", "shared_expert.router": "ffn_gate_inp_shexp"}
_BLOCK = re.compile(r"blk\.(\d+)\.")


def tensor_names(role: str, layer: int | None) -> tuple[str, ...]:
    """Returns the names that llama.cpp may give to weights of a role: several where they may be joined or apart."""
    if role == "lm_head":
        return ("output.weight",)
    family, _, part = role.partition(".")
    if layer is None:
        return ()
    if role in _OTHERS:
        names: tuple[str, ...] = (_OTHERS[role],)
    elif family == "attention":
        names = _ATTENTION.get(part, ())
    else:
        names = tuple(f"ffn_{found}{_FAMILIES[family]}" for found in _PARTS.get(part, ()) if family in _FAMILIES)
    return tuple(f"blk.{layer}.{name}.weight" for name in names)


def blocks_of(arrays: Mapping[str, FloatArray]) -> int:
    """Returns how many blocks there are."""
    return 1 + max((int(found[1]) for name in arrays if (found := _BLOCK.match(name))), default=-1)


def read_imatrix(path: Path) -> dict[str, FloatArray]:
    """Reads mean squares by tensor: [K], or [E, K] of a stack; of a ``.dat`` file [E * K], as it does not say E.

    Raises:
        UsageError: the file is no such file, or the package ``gguf`` is needed and not installed.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
        found = _read_gguf(path) if start == b"GGUF" else _read_dat(path.read_bytes())
    except (OSError, ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        why, hint = reason(error), "give an imatrix file of llama.cpp, .gguf or .dat, or a NumPy .npz file"
        raise UsageError(f"importance file '{path}' cannot be read ({why}); {hint}") from error
    if not found:
        raise UsageError(f"importance file '{path}' holds no imatrix; give one that llama-imatrix wrote")
    return {name: _means(sums, counts) for name, (sums, counts) in found.items()}


def _means(sums: FloatArray, counts: FloatArray) -> FloatArray:
    """Returns mean squares; experts that saw nothing have what the others have together."""
    counts = counts.reshape(-1, 1)
    every = sums.sum(axis=0) / max(float(counts.sum()), 1.0)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), every).astype(np.float32)
    return means[0] if len(means) == 1 else means


def _read_gguf(path: Path) -> dict[str, tuple[FloatArray, FloatArray]]:
    try:
        import gguf  # noqa: PLC0415 -- an extra
    except ImportError as error:
        hint = to_install("gguf")
        raise UsageError(f"'{path}' needs the package gguf, which is not installed: {hint}") from error
    tensors = {tensor.name: np.asarray(tensor.data, np.float64) for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    return {
        name: (np.atleast_2d(tensors[f"{name}.in_sum2"]), np.atleast_1d(tensors[f"{name}.counts"])) for name in names
    }


def _read_dat(data: bytes) -> dict[str, tuple[FloatArray, FloatArray]]:
    offset = 0

    def take(format_: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(format_, data, offset)
        offset += struct.calcsize(format_)
        return int(value)

    found: dict[str, tuple[FloatArray, FloatArray]] = {}
    for _ in range(take("<i")):
        length = take("<i")
        name = data[offset : offset + max(length, 0)].decode("utf-8")
        offset += len(name.encode())
        calls, size = take("<i"), take("<i")
        if length <= 0 or size <= 0:
            raise ValueError("it is no imatrix")
        values = np.frombuffer(data, "<f4", size, offset).astype(np.float64)
        offset += 4 * size
        found[name] = (values[None], np.array([float(max(calls, 1))]))
    return found
