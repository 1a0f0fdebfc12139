"""How tests run a command."""

from __future__ import annotations

from typer.testing import CliRunner

from decompclip.cli import app


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def succeeds(*arguments: object) -> tuple[str, str]:
    """Stdout and stderr of a command that ends well."""
    code, stdout, stderr = run(*arguments)
    assert code == 0, stderr
    return stdout, stderr


def refused(*arguments: object) -> str:
    """The one line in which a command says what is wrong with its input."""
    code, stdout, stderr = run(*arguments)
    assert code == 2 and "Traceback" not in stdout + stderr, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line
