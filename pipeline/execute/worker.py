"""The process that runs one pass: `python -P -m pipeline.execute.worker FOLDER`.

It reads FOLDER/request.json, writes blobs below FOLDER and FOLDER/result.json, and says on standard output, one JSON
object a line, how far it is. Whatever else is printed, by the pass or by libraries in C, goes to standard error, which
the parent has pointed at the stage's log.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.execute.request import REQUEST, RESULT, Answer, Failure, Request, describe
from pipeline.parent import die_with_parent
from pipeline.plugin import PassContext, Registry
from pipeline.store.writer import OutputWriter


def main(folder: Path) -> int:
    die_with_parent()
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as progress:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

        def report(fraction: float, message: str) -> None:
            progress.write(json.dumps({"fraction": fraction, "message": message}) + "\n")

        answer = _run(folder, report)
    (folder / RESULT).write_text(answer.model_dump_json(), encoding="utf-8")
    return 0 if answer.failure is None else 1


def _run(folder: Path, report: object) -> Answer:
    request = Request.model_validate_json((folder / REQUEST).read_bytes())
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
        found = Registry().load(request.pass_name)
        params = found.Params.model_validate_json(json.dumps(request.params))
        made = found().run(Artifact(request.artifact, blobs), params, context)
        expected = found.formats(params)[1]
        if not isinstance(made, Artifact) or made.format != expected:
            raise PipelineError(f"the pass {found.name!r} returned {describe(made)} where it promises {expected!r}")
        return Answer(manifest=made.manifest)
    except PipelineError as error:
        traceback.print_exc()
        return Answer(failure=Failure(message=error.message, hint=error.hint, expected=True))
    except Exception as error:  # a pass may be a stranger's: whatever it raises is the stage's failure, told and logged
        traceback.print_exc()
        return Answer(failure=Failure(message=f"{type(error).__name__}: {error}", expected=False))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
