"""Running a plan: each pass in a worker process of its own."""

from pipeline.execute.stages import Cost, StageResult, execute

__all__ = ["Cost", "StageResult", "execute"]
