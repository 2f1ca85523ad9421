"""Where models come from: built in, a folder, the Hugging Face hub, an ONNX file, an architecture and a seed."""

from pipeline.models.source import Source, builtin_names, evaluation_text, find_source, source_artifact

__all__ = ["Source", "builtin_names", "evaluation_text", "find_source", "source_artifact"]
