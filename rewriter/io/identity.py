"""The identity of a run: all that decides the bytes of its weights, as text that a run that resumes it must match."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np

import rewriter
from rewriter.io.journal import Identity, identity_of
from rewriter.io.replacing import identity
from rewriter.report.provenance import TOOL, Made
from rewriter.tensors.view import Array

KERNELS = ("numpy", "ml_dtypes", "numba", "llvmlite", "onnx-ir")
"""Packages that compute or store what is written."""

_DIGESTED = 16 << 20
"""Bytes of a file whose content is looked at; of a larger one size, time and inode are."""

_LOOK, _WHOLE = "look at what lies on a grid", "whole"


def of_inputs(
    source: Path, imatrix: str | os.PathLike[str] | Mapping[str, Array] | None, calibration: Path | None
) -> Identity:
    """Returns the part of a run's identity that its input files decide.

    Args:
        source: the model file.
        imatrix: what weighs the errors of weights: arrays, a file of them, or a folder that holds one.
        calibration: the manifest of what the weights saw.
    """
    found = {"model": files([source])}
    if imatrix is not None:
        found["imatrix"] = _of_arrays(imatrix) if isinstance(imatrix, Mapping) else files([Path(imatrix)])
    if calibration is not None:
        found["calibration"] = files([calibration])
    return found


def of_rules(made: Made, *, whole: bool) -> Identity:
    """Returns the part of a run's identity that its rule set decides.

    Args:
        made: the run.
        whole: whether weights that may lie on a grid were looked at whole, and not a sample of them.
    """
    return {
        "rule set": f"{made.rule_set} {made.digest[:12]}",
        "target": made.target,
        _LOOK: _WHOLE if whole else "sample",
    }


def looked_whole(run: Identity | Path | None) -> bool:
    """Whether a run, or the one that left a folder, looked at weights whole; False where there is none."""
    known = identity_of(run) if isinstance(run, Path) else run or {}
    return known.get(_LOOK) == _WHOLE


@functools.cache
def code() -> str:
    """Returns the version of this package with a digest of its source, and the versions of what computes."""
    folder = Path(rewriter.__file__).parent
    digest = hashlib.blake2b(digest_size=6)
    # In a source tree rules/ is a link, which rglob does not follow.
    found = {file.relative_to(folder) for file in (*folder.rglob("*.py"), *(folder / "rules").rglob("*.py"))}
    for file in sorted(found):
        digest.update((folder / file).read_bytes())
    versions = [f"{name} {metadata.version(name)}" for name in KERNELS]
    return ", ".join([f"{metadata.version(TOOL)} {digest.hexdigest()}", *versions])


def files(paths: Iterable[Path]) -> str:
    """Returns what tells when files were replaced or changed: inode, bytes, time, content."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(path.resolve() for path in paths):
        size = path.stat().st_size
        content = hashlib.sha256(path.read_bytes()).digest() if path.is_file() and size <= _DIGESTED else b""
        digest.update(repr((path.name, identity(path), content)).encode())
    return digest.hexdigest()


def _of_arrays(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
