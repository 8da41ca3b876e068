"""The command ``rewriter``, and ``python -m rewriter``."""

import gc
import signal
import sys

from rewriter.process import open_streams, quit_cleanly, quit_quietly


def main() -> int:
    """Runs the command line; Ctrl-C is quiet from the first moment, though importing the commands takes a while."""
    open_streams()
    quit_quietly()
    gc.set_threshold(200_000, 20)  # a graph is millions of objects, all of which stay: to scan them takes a second
    from rewriter.cli import main as run  # noqa: PLC0415 -- after Ctrl-C is quiet

    quit_cleanly()
    code = run()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.freeze()  # nor are they scanned at the end
    return code


if __name__ == "__main__":
    sys.exit(main())
