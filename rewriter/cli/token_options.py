"""What real inputs the commands may be given: tokens, or text and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli.options import given, size
from rewriter.errors import UsageError

if TYPE_CHECKING:
    from rewriter.parity.runtime import Array

Tokens = Annotated[Path | None, given("FILE.npy", "Token ids \\[sequences, length], each run from its beginning.")]
Text = Annotated[Path | None, given("FILE", "Text in UTF-8, in place of tokens; needs --tokenizer.")]
Tokenizer = Annotated[Path | None, given("FILE.json", "The model's tokenizer.json, which reads the text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of each sequence that the text is cut into.")]
Sequences = Annotated[int | None, given("N", "Use the first N sequences only.", min=1)]
Memory = Annotated[
    int | None,
    given(
        "SIZE",
        "Memory for a model that is run on tokens, by default 4GiB; a larger model is run a few layers at a time.",
        parser=size,
    ),
]


def given_tokens(
    tokens: Path | None, text: Path | None, tokenizer: Path | None, length: int, sequences: int | None
) -> Array | None:
    """Returns [sequences, length] token ids; None where neither tokens nor a text is given.

    Raises:
        UsageError: both are given, or a tokenizer is missing, or a file cannot be read.
    """
    from rewriter.parity.tokens import read_tokens, tokenize

    if tokens is not None and text is not None:
        raise UsageError("--tokens and --text are two ways to give the same; choose one")
    if (text is None) != (tokenizer is None):
        raise UsageError("--text and --tokenizer belong together")
    if text is not None and tokenizer is not None:
        found = tokenize(text, tokenizer, length)
    elif tokens is not None:
        found = read_tokens(tokens)
    elif sequences is not None:
        raise UsageError("--sequences is about --tokens or --text")
    else:
        return None
    return found[:sequences]
