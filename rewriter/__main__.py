"""The command ``rewriter``, and ``python -m rewriter``."""

import signal
import sys

from rewriter.process import open_streams, quit_cleanly, quit_quietly


def main() -> int:
    """Runs the command line; Ctrl-C is quiet from the first moment, though importing the commands takes a while."""
    open_streams()
    quit_quietly()
    from rewriter.cli import main as run  # noqa: PLC0415 -- after Ctrl-C is quiet

    quit_cleanly()
    code = run()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


if __name__ == "__main__":
    sys.exit(main())
