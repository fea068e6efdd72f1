"""The entry point of the command line: the verbs, and how errors become one line and an exit code."""

from __future__ import annotations

import gc
import os
import sys
import traceback
import warnings
from importlib import import_module
from typing import Any

import click

import cnnc
from cnnc.errors import CnncError

_NAMES = "compile run bench bench-gpu profile verify tune inspect opt ops doctor cache"
VERBS = tuple(_NAMES.split())
_INTERNAL = 70
_INTERRUPTED = 130


class _Group(click.Group):
    """Loads a verb's file when the verb is used, so that `cnnc --help` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = import_module(f"cnnc.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(cnnc.__version__, prog_name="cnnc")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Compile convolutional networks to small self-contained binaries.

    Exit codes: 0 done, 1 compared and differs, 2 usage, 3 invalid model, 4 valid but unsupported, 5 limit
    reached, 6 environment, 7 self-check failed, 70 a bug of cnnc, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    code = run(sys.argv[1:] if arguments is None else arguments)
    # The interpreter would look through all of memory for garbage before it ends.
    gc.freeze()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line and give its exit code."""
    debug = "--debug" in arguments
    warnings.showwarning = _note
    try:
        result: Any = cli.main(arguments, prog_name="cnnc", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("cnnc: interrupted", err=True)
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except CnncError as error:
        return _fail(error, str(error), error.exit_code, debug)
    except MemoryError as error:
        return _fail(error, "memory is used up; the model is too large for this machine", 5, debug)
    except Exception as error:
        message = f"internal error: {type(error).__name__}: {error}; this is a bug of cnnc (--debug shows where)"
        return _fail(error, message, _INTERNAL, debug)
    return result if isinstance(result, int) else 0


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    text = message if code == _INTERNAL and debug else " ".join(message.split("\n"))
    click.echo(f"cnnc: error: {_printable(text)}", err=True)
    return code


def _printable(text: str) -> str:
    """Escape what a terminal would obey: names in a model are anybody's text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _note(message: Warning | str, category: type[Warning], *_rest: Any, **_options: Any) -> None:
    click.echo(f"cnnc: note: {_printable(str(message))}", err=True)


if __name__ == "__main__":
    main()
