"""The `thinkserve` command.

Nothing slow is imported before everything that can be checked has been checked: a mistake is one line on stderr and
exit status 2 within a second.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from thinkserve.server import __version__, cli_budget, cli_vectors
from thinkserve.server.config import Config, redacted
from thinkserve.server.flags import from_settings
from thinkserve.server.model_dir import StartError

app = typer.Typer(
    help="OpenAI-compatible reasoning server: a strategy per request, inside vLLM, every token accounted for.",
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at the effective configuration: options > THINKSERVE_* > YAML file > defaults.")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options before a command."""
    if version:
        print(__version__)


@app.command()
@from_settings
def serve(config: Config) -> None:
    """Start the server; MODEL is a directory or a Hugging Face name (default: the embedded model).

    Every option is also THINKSERVE_<NAME> in the environment and <name> in the YAML file (--max-chains is max_chains).
    API keys go into the environment or a file of their own, presets and the effort map into the YAML file.
    """
    from thinkserve.server.serve import run

    raise typer.Exit(run(config.settings, Console(stderr=True)))


@app.command()
@from_settings
def check(config: Config) -> None:
    """Check whether this machine can serve: versions, cores, memory, GPU, model, port. Exit status 0 or 1."""
    from thinkserve.server.check import findings

    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")
    found = list(findings(config.settings))
    for finding in found:
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.name, finding.value)
    Console().print(table)
    raise typer.Exit(0 if all(finding.ok for finding in found) else 1)


@config_app.command()
@from_settings
def show(config: Config) -> None:
    """Print every setting with its origin, as a YAML file that can be used again."""
    sys.stdout.write(redacted(config))


@config_app.command("check")
@from_settings
def check_config(config: Config) -> None:
    """Check the configuration without starting: names, types, presets, model directory. Exit status 0 or 2."""
    from thinkserve.server.preflight import check as preflight

    checked = preflight(config.settings)
    print(f"ok: {checked.served} from {checked.deployment.target.model.path}, {len(config.origin)} settings set")


@app.command()
def strategies(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table in README.")] = False,
) -> None:
    """List the strategies with their parameters."""
    from thinkserve.server import catalogue

    if markdown:
        print(catalogue.markdown())
        return
    table = Table(*catalogue.COLUMNS, box=None, padding=(0, 2, 0, 0))
    for row in catalogue.rows():
        table.add_row(*row)
    Console().print(table)


@app.command()
def openapi(
    output: Annotated[Path, typer.Argument(help="File to write; '-' is standard output.")] = Path("openapi.yaml"),
) -> None:
    """Write the OpenAPI document of the server."""
    from thinkserve.server.openapi import published

    text = published()
    if str(output) == "-":
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


app.add_typer(config_app, name="config")
app.add_typer(cli_vectors.app, name="vectors")
app.add_typer(cli_budget.app, name="budget")


def main() -> None:
    """Entry point: every mistake becomes one line on stderr and exit status 2."""
    try:
        status = app(args=sys.argv[1:] or ["--help"], prog_name="thinkserve", standalone_mode=False)
    except TyperException as error:
        _fail(error.format_message())
    except StartError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(status)


def _fail(message: str) -> None:
    print("thinkserve:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
