"""Runners: load one artifact in a given way and run inference on it."""

from pipeline.runtime.protocol import CausalLMRunner, ExecutionSpec, has_cache, load_model, load_runner, runner_version

__all__ = ["CausalLMRunner", "ExecutionSpec", "has_cache", "load_model", "load_runner", "runner_version"]
