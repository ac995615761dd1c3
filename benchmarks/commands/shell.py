"""What the commands share: sections of the help, names that a shell completes, options, output for readers and programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from benchmarks.harness.config.suite import Suite

EXIT_CODES = """\b
Exit status: 0 fine; 1 an error, said in one line, or a check that failed;
2 wrong usage; 130 interrupted.

\b
Shell completion (bash; zsh and fish likewise), in the shell's start-up file:
  eval "$(_{variable}_COMPLETE=bash_source {program})"
"""
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


class Command(click.Command):
    """A command of the suite: what ``methods.yaml`` names as plugins is imported before it works, not before it helps."""

    def invoke(self, ctx: click.Context) -> Any:
        from benchmarks.harness.config.plugins import import_plugins

        import_plugins()
        return super().invoke(ctx)


class Sections(click.Group):
    """A group whose help has its commands in sections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections: dict[str, list[str]] = {}

    def add_section(self, title: str, commands: Sequence[click.Command]) -> None:
        """Add commands below a title of their own; hidden ones work and are not shown."""
        for command in commands:
            self.add_command(command)
        self.sections[title] = [command.name or "" for command in commands if not command.hidden]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(len(name) for names in self.sections.values() for name in names)
        for title, names in self.sections.items():
            with formatter.section(title):
                limit = formatter.width - widest - 6
                formatter.write_dl(
                    [(name.ljust(widest), self.commands[name].get_short_help_str(limit)) for name in names]
                )

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in self.sections.values() for name in names]


def command(short: str, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command.

    Args:
        short: what it does, in a line of the group's help.
        attributes: others of click.
    """
    return click.command(cls=Command, short_help=short, **attributes)


def _suites(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    from benchmarks.harness.config.suite import suite_names

    return [name for name in suite_names() if name.startswith(begun)]


def _benchmarks(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    from benchmarks.harness.config.definition import benchmark_names

    return [name for name in benchmark_names() if name.startswith(begun)]


def benchmark_option(text: str, **attributes: Any) -> Callable[[AnyFunction], AnyFunction]:
    """``--benchmark``, completed by the shell."""
    return click.option("--benchmark", shell_complete=_benchmarks, help=text, **attributes)


def load_suite(suite: str, *benchmarks: str | None) -> Suite:
    """A suite as a job of the workflow sees it; benchmarks that are named have to be in it.

    Raises:
        DefinitionError: there is no such suite, or it has no such benchmark.
    """
    from benchmarks.harness.config.schema import check_names
    from benchmarks.harness.config.suite import suite_of_job

    loaded = suite_of_job(suite)
    check_names(f"suite {suite}: '", "benchmark", [name for name in benchmarks if name], loaded.settings.benchmarks)
    return loaded


SUITE = click.option(
    "--suite", default="mini", show_default=True, shell_complete=_suites, help="Which suite (a file in config/)."
)
THREADS = click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="All that was found, as JSON for programs.")


def echo_json(content: object) -> None:
    """Print JSON."""
    click.echo(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))


def echo_table(rows: Iterable[Mapping[str, object]], right: Sequence[str] = ()) -> None:
    """Print rows as a table; nothing where there are none.

    Args:
        rows: all with the same keys.
        right: columns of numbers, which stand on the right.
    """
    from tabulate import tabulate

    found = list(rows)
    if found:
        sides = ["right" if name in right else "left" for name in found[0]]
        click.echo(tabulate(found, headers="keys", tablefmt="simple", disable_numparse=True, colalign=sides))
