"""The command line: one module per verb. Each parses, calls and prints; none imports the engine before it is needed."""

from __future__ import annotations

import sys
import traceback

import typer

from pipeline.cli import (
    cache,
    compare,
    diff,
    hardware,
    import_olive,
    init,
    passes,
    plan,
    report,
    reproduce,
    run,
    schema,
    why,
)
from pipeline.cli.output import fail
from pipeline.cli.verb import Verbs

INTERRUPTED = 130
READER_LEFT = 141  # what a shell shows for a process that SIGPIPE ended

app = Verbs(
    name="pipeline",
    help="Optimize models by recipe: run passes, and measure what each of them really did.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run_verb)
app.command("init")(init.init_verb)
app.command("import-olive")(import_olive.import_olive_verb)
app.command("plan")(plan.plan_verb)
app.command("why")(why.why_verb)
app.command("report")(report.report_verb)
app.command("compare")(compare.compare_verb)
app.command("diff")(diff.diff_verb)
app.command("reproduce")(reproduce.reproduce_verb)
app.add_typer(passes.app, name="passes")
app.add_typer(hardware.app, name="hardware")
app.add_typer(cache.app, name="cache")
app.command("schema")(schema.schema_verb)


def _version(asked: bool) -> None:
    if asked:
        from pipeline import __version__

        typer.echo(f"pipeline {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line and exit: 0 well, 1 gate, 2 recipe or command line, 3 stage, 4 host, 130 interrupted."""
    from pipeline.errors import PipelineError

    try:
        code = app(standalone_mode=False, prog_name="pipeline")
    except PipelineError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as error:  # a folder that cannot be written, a full disk
        from pipeline.errors import HostError
        from pipeline.store import default_store_path

        where = f"{error.filename}: " if error.filename else ""
        hint = f"the store is {default_store_path()} (PIPELINE_STORE), results go to ./runs (--runs)"
        sys.exit(fail(HostError(f"{where}{error.strerror or error}", hint=hint)))
    except SystemExit as ended:
        # typer ends with 1 where the reader of our output left, for example `head`; 1 is what a failed gate says
        sys.exit(READER_LEFT if ended.code == 1 else ended.code)
    except Exception as error:
        show = getattr(error, "show", None)  # what typer raises for a wrong command line
        if show is None:  # not a user's mistake but ours: show all of it
            traceback.print_exc()
            sys.exit(3)
        show()
        sys.exit(2)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this exit code itself where it can
        typer.echo("interrupted; finished stages stay in the store", err=True)
    sys.exit(code if isinstance(code, int) else 0)
