"""The command line, the only part of the package that prints: one module per command.

Nothing heavy is imported before a command runs, so that ``--help`` and shell completion answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import typer

from rewriter import memory
from rewriter.cli.apply import apply
from rewriter.cli.calibrate import calibrate
from rewriter.cli.check import check
from rewriter.cli.compare import compare
from rewriter.cli.explain import explain
from rewriter.cli.inspect import inspect
from rewriter.cli.postponed import postpone
from rewriter.cli.rules import rules
from rewriter.errors import ParityError, RewriterError, RewriterWarning, nearest, one_line
from rewriter.process import TerminatedError, clean_endings, open_streams

DONE, FAILED, BAD, INTERRUPTED = 0, 1, 2, 130
_DEBUG = "REWRITER_DEBUG"
_COMPLETING = "_REWRITER_COMPLETE"

_INSTEAD = {
    "--block-size": ("--set quantization.default.block_size=", "128"),
    "--symmetric": ("--set quantization.default.symmetric=true", ""),
    "--asymmetric": ("--set quantization.default.symmetric=false", ""),
    "--algorithm": ("--set quantization.default.algorithm=", "k-quant"),
    "--bits": ("--set quantization.default.bits=", "8"),
    "--exclude": ("--set 'quantization.exclude=[{role: lm_head}]'", ""),
    "--device": ("--target ", "cuda"),
    "--output": ("--out ", "FOLDER"),
}
"""What to write for options that people try, as a rule set holds them; and a value, where they give none."""

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 parity or a limit failed, or a rule named by --require never fired; "
    "2 bad usage, rule set or model. REWRITER_DEBUG=1 shows tracebacks.",
)
for _command in (apply, inspect, explain, compare, calibrate, check, rules):
    app.command(no_args_is_help=_command is not rules)(_command)


def _version(asked: bool) -> None:
    if not asked:
        return
    from rewriter.report.provenance import PACKAGES, version_of

    parts = [f"{name} {found}" for name in PACKAGES if (found := version_of(name))]
    typer.echo(f"{parts[0]} ({', '.join(parts[1:])})")
    raise typer.Exit


@app.callback()
def rewriter(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Rewrite ONNX Mixture-of-Experts models by rules, quantize their weights, and prove every rewrite by running it.

    [bold]rewriter apply model.onnx -o out --rules moe-int4[/bold]
        rewrite, quantize, prove, save
    [bold]rewriter inspect model.onnx[/bold]
        what a model is, and how small each rule set would make it
    [bold]rewriter explain model.onnx[/bold]
        what that would do, without doing it
    [bold]rewriter compare model.onnx rtn k-quant moe-int4[/bold]
        which rule set to take: size, errors, time, what stays float
    [bold]rewriter check model.onnx out/model.onnx[/bold]
        how far the outputs of two models are apart
    [bold]rewriter calibrate model.onnx --tokens tokens.npy -o calibration[/bold]
        what each weight sees on real tokens
    [bold]rewriter rules[/bold]
        which rules and rule sets there are
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; every failure is one line on stderr.

    Args:
        arguments: by default those of the process.

    Returns:
        The exit code.
    """
    debug = bool(os.environ.get(_DEBUG))
    postpone()
    open_streams()
    try:
        with clean_endings(), contextlib.nullcontext() if debug else _without_warnings():
            code = typer.main.get_command(app).main(
                list(sys.argv[1:] if arguments is None else arguments), prog_name="rewriter", standalone_mode=False
            )
            sys.stdout.flush()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # so rich ends where nobody reads on, as behind `| head`
            return DONE
        if _COMPLETING not in os.environ:  # no code of this package exits
            _say(f"a rule or a library ended the program (exit code {error.code}); see which one with {_DEBUG}=1")
            return BAD
        code = error.code
    except BaseException as error:
        if debug and not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        code = _failed(error, list(sys.argv[1:] if arguments is None else arguments))
    if code == INTERRUPTED:
        _say("interrupted")  # said here, since a command that is aborted returns the code
    return code if isinstance(code, int) else DONE


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps what libraries warn of and log off stderr, which is for this project's own lines."""
    said = set[str]()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in said:
            said.add(str(message))
            _say(str(message), "warning")

    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", RewriterWarning)
            warnings.showwarning = show
            yield
    finally:
        logging.getLogger().removeHandler(handler)


def _failed(error: BaseException, given: Sequence[str]) -> int:
    """Says what went wrong with what was given in one line; returns the exit code."""
    match error:
        case KeyboardInterrupt() | typer.Abort():
            return INTERRUPTED
        case TerminatedError():
            _say(str(error))
            return error.code
        case BrokenPipeError():
            _silence()
            return DONE
        case _ if memory.ran_out(error):
            _say(f"out of memory; {memory.remedy()}")
        case ParityError():
            _say(str(error))
            return FAILED
        case RewriterError():
            _say(str(error))
        case typer.TyperException():
            if message := _usage(error, given):
                _say(message)
        case OSError(errno=errno.ENOSPC):
            _say("no space left on the device; free some space or choose another place")
            _silence()
        case _ if memory.has_few_addresses():  # a library that cannot be mapped says that it is not there
            _say(f"out of memory; {memory.remedy()}")
        case _:
            _say(f"internal: {type(error).__name__}: {error} ({_DEBUG}=1 shows the traceback; please report it)")
    return BAD


def _silence() -> None:
    """Python flushes stdout once more as it exits, which fails where it failed before."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str, kind: Literal["error", "warning"] = "error") -> None:
    color = typer.colors.RED if kind == "error" else typer.colors.YELLOW
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        typer.echo(f"{typer.style(f'{kind}:', fg=color, bold=True)} {one_line(message)}", err=True)


def _usage(error: Any, given: Sequence[str]) -> str:
    """Returns typer's complaint in this project's words: the thing, the nearest valid name, where to read on."""
    message = error.format_message().strip().rstrip(".").replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    if not message or message.startswith("Usage:") or context is None:
        return "" if context is not None else message
    if option := getattr(error, "option_name", ""):
        message = message.partition("(")[0].strip()
        if message.startswith("No such option"):
            known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
            instead = f" (write {_instead(option, given)})" if option in _INSTEAD else _near(option, known)
            message = f"no such option '{option}'{instead}"
    elif message.startswith("No such command"):
        name = context.args[0] if context.args else message.split("'")[1]
        message = f"no such command '{name}'{nearest(name, context.command.list_commands(context))}"
    return f"{message[0].lower()}{message[1:]}; see {context.command_path} --help"


def _instead(option: str, given: Sequence[str]) -> str:
    """Returns what to write for an option, with the value that was given to it."""
    write, value = _INSTEAD[option]
    after = (*given[given.index(option) + 1 :], "") if option in given else ("",)
    joined = next((word.partition("=")[2] for word in given if word.startswith(f"{option}=")), "")
    return write + ((joined or (after[0] if not after[0].startswith("-") else "") or value) if value else "")


def _near(name: str, known: Iterable[str]) -> str:
    """As ``nearest``, without the list of all options where none is close."""
    hint = nearest(name, known)
    return hint if hint.startswith(" (did") else ""
