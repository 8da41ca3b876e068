"""The old place of ``rewriter.operators.form``, for rule packages; it goes with the next release."""

import warnings

from rewriter.operators.form import *  # noqa: F403 -- whatever it has, it had here

warnings.warn("rewriter.experts is rewriter.operators.form now", DeprecationWarning, stacklevel=2)
