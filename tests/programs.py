"""Call the suite's program in this process."""

from __future__ import annotations

from click.testing import CliRunner

from benchmarks.__main__ import cli


def call(*arguments: str, status: int = 0) -> str:
    """Return the output of a call; unexpected errors are raised."""
    done = CliRunner().invoke(cli, arguments, obj=0.0)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return done.stdout
