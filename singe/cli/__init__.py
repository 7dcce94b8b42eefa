"""The command line: ``singe score | prune | compress | compare | info | demo``.

Exit status: 0 done; 1 a bug (with a traceback); 2 wrong use or input, with a message that says what;
3 ``compress`` stopped before its last round and kept the last good one; 130 interrupted; 141 nobody reads
standard output any more.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, NoReturn

import typer

from singe import __version__
from singe.cli.compare import compare
from singe.cli.compress import compress
from singe.cli.output import print_error
from singe.cli.prune import prune
from singe.cli.score import score
from singe.cli.show import demo, info
from singe.cli.users_files import in_users_file
from singe.errors import SingeError

app = typer.Typer(
    help="Channel pruning by integrated gradient variation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (score, prune, compress, compare, info, demo):
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"singe {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; an error the user can repair is one line and exit status 2."""
    # torch tells every user of torch.vmap about its own plans for adaptive pooling.
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet")
    try:
        app(prog_name="singe")
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as end:
        # typer and rich, which met it, leave with 1; the shell's number for SIGPIPE says what it was.
        if isinstance(end.__context__, BrokenPipeError):
            sys.exit(141)
        raise
    except Exception as error:
        kind, said = type(error).__name__, str(error)
        if said.startswith("Caught "):  # by a loader's worker, which hands on its whole traceback
            said = said.rpartition(f"{kind}: ")[2]
        if isinstance(error, SingeError):
            _end(said)
        if place := in_users_file(error):
            _end(f"{place}: {kind}: {said}")
        if not isinstance(error, OSError):
            raise
        _end(said)


def _end(said: str) -> NoReturn:
    print_error(said)
    sys.exit(2)
