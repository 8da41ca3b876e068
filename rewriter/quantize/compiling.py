"""How compiled loops are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(fastmath: set[str] | bool = False, *, inline: bool = True) -> Callable[[Function], Function]:
    """Returns a decorator: compile on the first call, keep on disk, run without the GIL.

    Four things are needed for vector code in blocks of 32: no test of every divisor, as Python's division makes it; no
    calls, which cost as much as a short loop; loops over ``range``, not over an array's values; selections instead of
    branches.
    """

    def decorate(function: Function) -> Function:
        def jit(cache: bool) -> Function:
            made = numba.njit(nogil=True, cache=cache, fastmath=fastmath, error_model="numpy", forceinline=inline)
            return cast("Function", made(function))

        try:
            return jit(cache=True)
        except RuntimeError:  # nowhere to keep it: an installation that is read-only, for a user without a home
            return jit(cache=False)

    return decorate
