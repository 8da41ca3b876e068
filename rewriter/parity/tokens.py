"""Token ids from files: arrays of them, or text by way of a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rewriter.errors import UsageError, require_no_pipe, to_install
from rewriter.parity.runtime import Array

LENGTH = 512
"""Tokens of a sequence that text is cut into."""

_LONGEST = 8192
"""Tokens of an array without a dimension of sequences: of more, someone forgot to cut a text."""


def read_tokens(file: Path) -> Array:
    """Reads [sequences, length] token ids from a ``.npy`` file; one sequence may be [length].

    Raises:
        UsageError: the file is missing, or holds something else.
    """
    require_no_pipe(file)
    try:
        found: Array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file '{file}'; give a .npy file of token ids [sequences, length]") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"'{file}' is not a .npy file of plain numbers; write it with numpy.save") from error
    if not isinstance(found, np.ndarray) or found.ndim not in (1, 2) or found.dtype.kind not in "iu" or not found.size:
        what = f"{found.dtype}{list(found.shape)}" if isinstance(found, np.ndarray) else "several arrays"
        raise UsageError(f"'{file}' holds {what}; give token ids, integers [sequences, length]")
    if found.ndim == 1 and len(found) > _LONGEST:
        raise UsageError(f"'{file}' holds one sequence of {len(found):,}; give [sequences, length]")
    return found.reshape(-1, found.shape[-1])


def tokenize(text: Path, tokenizer: Path, length: int = LENGTH) -> Array:
    """Reads a text, and cuts its tokens into sequences [sequences, length]; what is left over at the end is dropped.

    Args:
        text: a file in UTF-8.
        tokenizer: a ``tokenizer.json``, or the directory that holds one.
        length: tokens of a sequence.

    Raises:
        UsageError: a file cannot be read, the text is too short, or the package ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise UsageError(f"text needs the package tokenizers, which is not installed: {to_install('text')}") from error
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the text '{text}' cannot be read ({error})") from error
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # a plain Exception is what the package raises
        raise UsageError(f"the tokenizer '{file}' cannot be read ({error}); give a tokenizer.json") from error
    ids = np.array(loaded.encode(words, add_special_tokens=False).ids, np.int64)
    count = len(ids) // length
    if not count:
        raise UsageError(f"'{text}' has {len(ids)} tokens, fewer than one sequence of {length}; give more, or --length")
    return ids[: count * length].reshape(count, length)
