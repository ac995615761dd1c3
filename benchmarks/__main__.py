"""``python -m benchmarks``: what the workflow calls, by hand."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time

import click

from benchmarks.commands import jobs, look, numbers, preparing, results
from benchmarks.commands.shell import EXIT_CODES, Command, Sections
from benchmarks.harness.run.forkserver import ask, serve

# a folder that cannot be written to, a full disk, too many open files: no mistake of ours
_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
# libraries that tell their makers of each use, unless the user wants that; read when they are imported
for _telemetry in ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_telemetry, "true")


def _version(context: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from emoe import __version__  # with torch, which takes seconds

        click.echo(f"{context.command_path} {__version__}")
        context.exit()


@click.group(
    cls=Sections,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES.format(variable="EMOE_BENCH", program="emoe-bench"),
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version and exit."
)
def cli() -> None:
    """Run, collect, compare and publish benchmark runs."""


@click.command("serve", cls=Command, hidden=True)
@click.argument("listener", type=int)
@click.argument("modules", nargs=-1)
def serve_command(listener: int, modules: tuple[str, ...]) -> None:
    """Import MODULES and fork for every command of a workflow that asks at the file descriptor LISTENER, until the input ends."""
    serve(socket.socket(fileno=listener), modules, _status)


cli.add_section("Look", look.COMMANDS)
cli.add_section("Run", jobs.COMMANDS)
cli.add_section("Results", results.COMMANDS)
cli.add_section("Numbers over time", numbers.COMMANDS)
cli.add_section("Set up", preparing.COMMANDS)
cli.add_section("For the workflow", [*jobs.OF_THE_WORKFLOW, serve_command])


def _status(arguments: list[str]) -> int:
    """Do a command; its exit status."""
    sys.argv[1:] = arguments
    try:
        _main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main() -> None:
    """Entry point: work done by a fork of the workflow's server where there is one, else in this process."""
    status = ask(sys.argv[1:])
    if status is None:
        _main()
    else:
        sys.exit(status)


def _main() -> None:
    """Expected errors are one line, not a traceback."""
    try:
        cli(standalone_mode=False, obj=time.time())
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as stop:
        if isinstance(stop.__cause__, EOFError):  # click takes an empty file for an interrupted prompt
            raise stop.__cause__ from None
        sys.exit(130)
    except ValueError as error:
        from emoe.errors import EMoEError  # a ValueError; help needs neither it nor torch, which comes with it

        if not isinstance(error, EMoEError):
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        click.echo(f"error: {error.filename or 'a file'}: {error.strerror}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
