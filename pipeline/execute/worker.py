"""The process that runs one pass: `python -P -m pipeline.execute.worker FOLDER`.

It reads FOLDER/request.json, writes blobs below FOLDER and FOLDER/result.json, and says on standard output, one JSON
object a line, how far it is. Whatever else is printed, by the pass or by libraries in C, goes to standard error, which
the parent has pointed at the stage's log. So do Python's stacks where it crashes, or where the parent asks for them
because it takes too long.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.execute.request import REQUEST, RESULT, Answer, Failure, Request, describe
from pipeline.execute.write_guard import WriteGuard, WriteOutsideError
from pipeline.parent import die_with_parent
from pipeline.plugin import PassContext, Registry
from pipeline.store.room import DISK_FULL
from pipeline.store.writer import BLOBS, OutputWriter


def main(folder: Path) -> int:
    die_with_parent()
    faulthandler.register(signal.SIGUSR1)
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as progress:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

        def report(fraction: float, message: str) -> None:
            progress.write(json.dumps({"fraction": fraction, "message": message}) + "\n")

        request = Request.model_validate_json((folder / REQUEST).read_bytes())
        with _observed(request, folder) as seen:
            answer = _run(request, folder, report)
        answer = answer.model_copy(update={"observed": seen})
    (folder / RESULT).write_text(answer.model_dump_json(), encoding="utf-8")
    return 0 if answer.failure is None else 1


def _observed(request: Request, folder: Path) -> AbstractContextManager[dict[str, Any]]:
    """The request's observer, which is not a module that the engine knows."""
    if request.observer is None:
        return nullcontext({})
    module, _, name = request.observer.partition(":")
    observer: AbstractContextManager[dict[str, Any]] = getattr(import_module(module), name)(request, folder)
    return observer


def _run(request: Request, folder: Path, report: object) -> Answer:
    blobs = Path(request.blobs)
    context = PassContext(
        output=OutputWriter(folder),
        inputs={role: Artifact(manifest, blobs) for role, manifest in request.inputs.items()},
        facets=request.facets,
        threads=request.threads,
        report_progress=report,  # type: ignore[arg-type]
        logger=logging.getLogger(f"pipeline.pass.{request.pass_name}"),
    )
    try:
        if request.artifact is None:
            from pipeline.models.random_weights import draw_model

            return Answer(manifest=draw_model(request.params, context.output, context.progress, blobs).manifest)
        guard = WriteGuard(folder, blobs.parent)
        guard.install()
        found = Registry(code="run").load(request.pass_name, request.code)
        params = found.Params.model_validate_json(json.dumps(request.params))
        parent = Artifact(request.artifact, blobs)
        made = guard.watch(lambda: found().run(parent, params, context))
        expected = found.formats(params)[1]
        if not isinstance(made, Artifact) or made.format != expected:
            message = f"the pass {found.name!r} returned {describe(made)} where it promises {expected!r}"
            return Answer(failure=Failure(message=message))
        return Answer(manifest=made.manifest, rules=context.rules)
    except PipelineError as error:
        _log(folder)
        return Answer(failure=Failure(message=error.message, hint=error.hint, expected=True))
    except (Exception, SystemExit) as error:  # a pass may be a stranger's: what it raises fails its stage
        _log(folder)
        return Answer(failure=_unexpected(error, request))


def _log(folder: Path) -> None:
    """Write the exception into the log, once what the pass had written is gone: the disk may be full of that."""
    for path in (folder / BLOBS).iterdir():
        os.truncate(path, 0)  # it may be open still, and then it would keep its room without a name
        path.unlink()
    with suppress(OSError):  # no room even so; the answer says what happened
        traceback.print_exc()


def _unexpected(error: BaseException, request: Request) -> Failure:
    """What to say of an exception that the pass did not mean for its user."""
    message = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return Failure(message=message, disk_full=True)
    if isinstance(error, WriteOutsideError):
        return Failure(
            message=f"the pass tried to write {error.filename}, outside its context; nothing was written there",
            hint="files of the artifact go through context.output, others into the folder of context.output.scratch()",
        )
    if isinstance(error, MemoryError):
        return Failure(message=message, hint="there was too little memory for it")
    if isinstance(error, SystemExit):
        message = f"the pass ended its process with sys.exit({error.code!r}) and made nothing"
    try:
        author = "its author" if request.code else f"the author of {Registry().info(request.pass_name).origin}"
    except PipelineError:  # the source, which no package registers
        author = "its author"
    return Failure(message=message, hint=f"the pass did not expect this; {author} may want to see the log")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
