"""Whether what Olive wrote loads, and runs on a few tokens. What it computes is for the report to judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from passes.graph.agreement import outputs_of
from passes.graph.offline import session_options
from pipeline import Artifact, PassContext, PipelineError

TOKENS = 8


def try_out(made: Artifact, path: Path, context: PassContext) -> None:
    """Load the graph, or the model folder, and run it.

    Raises: PipelineError where it does not load or run.
    """
    if made.format == "onnx":
        _try_graph(made, path, context)
    else:
        _try_checkpoint(made, path)


def _try_graph(made: Artifact, path: Path, context: PassContext) -> None:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(
            str(path), session_options(context.threads, "all"), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's exceptions share no base of their own
        raise PipelineError(f"ONNX Runtime refuses the graph that Olive made: {_first_line(error)}") from error
    outputs_of(session, made.interface)


def _try_checkpoint(made: Artifact, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    trusted = bool(made.manifest.execution.get("trust_remote_code", False))
    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trusted,
            dtype=made.manifest.execution.get("dtype", "auto"),
            output_loading_info=True,
        )
        tokens = torch.arange(TOKENS)[None] % (made.interface.vocab_size or TOKENS)
        with torch.inference_mode():
            model.eval()(input_ids=tokens)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, AssertionError) as error:
        raise PipelineError(f"transformers cannot load the model that Olive saved: {_first_line(error)}") from error
    if missing := sorted(notes["missing_keys"]):
        raise PipelineError(f"the model that Olive saved lacks {len(missing)} of its tensors, such as {missing[0]}")


def _first_line(error: Any) -> str:
    return str(error).strip().partition("\n")[0]
