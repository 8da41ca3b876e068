"""The functions between an expert's projections, one record each: what they compute, and what an exporter writes.

Source: ``activation_type`` in the schemas of com.microsoft::MoE and QMoE; what they leave open, as the kernels do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

Step = tuple[str | float, ...]
"""An elementwise function as a graph spells it: its operator in lower case, and its numbers."""


@dataclass(frozen=True)
class Activation:
    """A function of one linear map, or of one that multiplies another.

    Attributes:
        name: the value of ``activation_type``.
        function: of the linear that is activated, element by element.
        spellings: the elementwise functions that make it up, in their order; each way to write it.
        power: how often that is multiplied with itself.
        gated: whether it multiplies another linear.
        fusions: where it is gated, the values of ``swiglu_fusion``: 0 gate and linear apart in fc1 and fc3, 1 rows
            interleaved in fc1, 2 concatenated.
        fc3: whether an fc3 may gate it without being part of the activation.
        swiglu: whether it has alpha, beta and limit: ``G * sigmoid(alpha * G) * (L + beta)``, G and L limited.
    """

    name: str
    function: Callable[[Float32], Float32]
    spellings: tuple[tuple[Step, ...], ...] = ()
    power: int = 1
    gated: bool = False
    fusions: tuple[int, ...] = ()
    fc3: bool = False
    swiglu: bool = False

    def apply(self, gate: Float32, linear: Float32 | None, alpha: float, beta: float, limit: float) -> Float32:
        """Returns the activated features [T, I].

        Args:
            gate: [T, I] the linear that is activated.
            linear: [T, I] what it multiplies, or None.
            alpha: of ``swiglu``, as beta and limit.
            beta: see alpha.
            limit: see alpha; infinite for none.
        """
        if self.swiglu and linear is not None:
            gate = np.minimum(gate, np.float32(limit))
            linear = np.clip(linear, -np.float32(limit), np.float32(limit))
            return gate * _sigmoid(np.float32(alpha) * gate) * (linear + np.float32(beta))
        activated = self.function(gate) ** self.power
        return activated if linear is None else activated * linear


def _sigmoid(x: Float32) -> Float32:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)), np.float32)


def _relu(x: Float32) -> Float32:
    return np.maximum(x, np.float32(0))


def _silu(x: Float32) -> Float32:
    return x * _sigmoid(x)


def _gelu(x: Float32) -> Float32:
    """The tanh form."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return np.asarray(0.5 * x * (1 + np.tanh(inner)), np.float32)


_RELU: tuple[tuple[Step, ...], ...] = ((("relu",),), (("clip", 0.0, math.inf),))
_GELU: tuple[tuple[Step, ...], ...] = ((("gelu",),),)

IDENTITY = Activation("identity", lambda x: x, ((),))
SILU = Activation("silu", _silu, fc3=True)
SWIGLU = Activation("swiglu", _silu, gated=True, fusions=(1, 2, 0), swiglu=True)
ACTIVATIONS = [
    Activation("relu", _relu, _RELU),
    Activation("relu2", _relu, _RELU, power=2),
    Activation("gelu", _gelu, _GELU),
    SILU,
    IDENTITY,
    SWIGLU,
    Activation("geglu", _gelu, _GELU, gated=True, fusions=(1, 2)),
]
"""Every activation that is known. ``silu`` and ``swiglu`` are products, so that no spelling stands here."""


def activation_of(name: str) -> Activation | None:
    """Returns the activation of a name, or None."""
    return next((activation for activation in ACTIVATIONS if activation.name == name), None)
