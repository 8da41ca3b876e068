"""One thread for each product of matrices: the weight's rows and inputs are shared out among the cores already.

BLAS's own threads wait for one another by spinning: on a busy machine of two cores that made GPTQ twenty times slower.
And what one thread computes does not depend on how many there are.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_lock = threading.Lock()
_inside = 0
_limit: Any = None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Holds BLAS to one thread until the last of those that are inside has left."""
    global _inside, _limit  # noqa: PLW0603 -- the setting is the process's own
    with _lock:
        _inside += 1
        if _inside == 1:
            _limit = _setter().submit(lambda: _libraries().limit(limits=1, user_api="blas")).result()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _setter().submit(_limit.restore_original_limits).result()


@functools.cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController  # noqa: PLC0415 -- it looks at every loaded library

    return ThreadpoolController()


@functools.cache
def _setter() -> ThreadPoolExecutor:
    # threadpoolctl heeds only the thread that set a limit first, and those who enter are many.
    return ThreadPoolExecutor(1, thread_name_prefix="blas")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_setter.cache_clear)
