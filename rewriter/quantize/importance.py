"""Importance of input features: an "imatrix", mean squared activations that weigh a quantizer's squared error.

It is known by the names of a model's weights, or, where llama.cpp wrote it, by roles and layers.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from rewriter.errors import UsageError, nearest, reason, require_no_pipe
from rewriter.quantize.llama_imatrix import blocks_of, read_imatrix, tensor_names
from rewriter.quantize.types import FloatArray

CALIBRATED = "importance.npz"
"""The file of a calibration folder with the importance of every weight."""

LLAMA_FILES = (".gguf", ".dat")


class Importance:
    """Importance by weight: [K] under the name of a weight, or [K] or [E, K] under the name of an expert stack."""

    def __init__(self, arrays: Mapping[str, FloatArray], *, others: bool = False, blocks: int | None = None) -> None:
        """Checks the values.

        Args:
            arrays: by name of a weight or of a stack; finite and not negative.
            others: whether some may be of weights that are not quantized.
            blocks: how many there are, where the names are llama.cpp's.

        Raises:
            UsageError: an array is of another rank, or holds something else.
        """
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind != "f":
                what = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise UsageError(f"importance of '{name}' is {what}; give floats, [K] or [E, K]")
            if not np.isfinite(array).all() or (array < 0).any():
                raise UsageError(f"importance of '{name}' holds a negative value or one that is not finite")
        self._arrays = arrays
        self._others = others
        self._blocks = blocks
        self._used: set[str] = set()

    @classmethod
    def given(cls, imatrix: str | os.PathLike[str] | Mapping[str, FloatArray] | None) -> Importance:
        """Returns what a user gives: arrays, a file of them, or nothing.

        Raises:
            UsageError: it is something else, or holds wrong values.
        """
        if imatrix is None:
            return cls({})
        if isinstance(imatrix, str | os.PathLike):
            return cls.read(imatrix)
        if isinstance(imatrix, Mapping) and all(isinstance(name, str) for name in imatrix):
            return cls(imatrix)
        raise UsageError(f"importance is a .npz file, or arrays by weight name, not {type(imatrix).__name__}")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Importance:
        """Reads a NumPy ``.npz`` file with an array for each weight, the one in a calibration folder, or llama.cpp's.

        Raises:
            UsageError: the file is missing, is no such file, or holds wrong values.
        """
        require_no_pipe(path)
        folder = Path(path).is_dir()
        if Path(path).suffix in LLAMA_FILES:
            found = read_imatrix(Path(path))
            return cls(found, others=True, blocks=blocks_of(found))
        path = Path(path) / CALIBRATED if folder else path
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise UsageError(
                f"importance file '{path}' cannot be read ({reason(error)}); give a NumPy .npz file, or llama.cpp's"
            ) from error
        return cls(arrays, others=folder)

    def of(
        self,
        weight: str,
        sources: Iterable[str],
        expert: int | None,
        features: int,
        *,
        role: str = "",
        layer: int | None = None,
        layers: int = 0,
    ) -> FloatArray | None:
        """Returns the [K] importance for one weight, or None where none is given.

        Args:
            weight: its name.
            sources: names of what it is a part of, or is made of.
            expert: its index in them, where they are stacks.
            features: K.
            role: what it is for.
            layer: index of its layer, or None.
            layers: how many the model has.

        Raises:
            UsageError: what is given does not have the weight's number of input features, or differs for two weights
                whose rows are quantized as one.
        """
        if self._blocks is not None:
            if layer is not None and layers != self._blocks:
                raise UsageError(f"the imatrix is of a model of {self._blocks} blocks; this one has {layers} layers")
            names = [name for name in tensor_names(role, layer) if name in self._arrays]
        elif not self._arrays:
            return None
        else:
            names = [weight] if weight in self._arrays else [name for name in sources if name in self._arrays]
        self._used.update(names)
        found = [self._of(name, weight, expert, features) for name in names]
        for name, array in zip(names[1:], found[1:], strict=True):
            if not np.allclose(array, found[0], rtol=1e-3):
                raise UsageError(
                    f"importance of '{names[0]}' and of '{name}' differ, but they are one weight, '{weight}', whose"
                    " rows read the same input: give the same for both"
                )
        return found[0] if found else None

    def _of(self, name: str, weight: str, expert: int | None, features: int) -> FloatArray:
        array = self._arrays[name]
        if self._blocks is not None and expert is not None and array.size % features == 0:
            array = array.reshape(-1, features)  # a .dat file does not say how many experts there are
        if array.ndim == 2:
            if expert is None or not expert < len(array):
                raise UsageError(f"importance of '{name}' has {len(array)} experts; weight '{weight}' is none of them")
            array = array[expert]
        if array.shape != (features,):
            raise UsageError(f"importance of '{name}' is for {len(array)} input features; the weight has {features}")
        return array

    def require_used(self, names: Iterable[str]) -> None:
        """Raises where a given name is that of no weight.

        Raises:
            UsageError: names the first and the nearest weight.
        """
        if self._blocks is not None and not self._used:
            raise UsageError("the imatrix is of no weight that is quantized; is it of another model?")
        for name in () if self._others else self._arrays:
            if name not in self._used:
                hint = nearest(name, names)
                raise UsageError(f"importance is given for '{name}', which is no quantized weight{hint}")
