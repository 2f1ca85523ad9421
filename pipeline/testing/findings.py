"""What the kit found: one finding for each check, in words that tell the author what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pipeline.artifact import Frozen

Outcome = Literal["passed", "warning", "failed", "skipped"]

CHECKS = {
    "declarations": "what the class says of itself is known here",
    "parameters": "its parameters survive JSON, there and back",
    "key": "each parameter, and the model, change the stage's key",
    "formats": "the plan refuses what it does not take",
    "run": "it makes an artifact of the model, in time",
    "reads": "it reads nothing that its key does not hold",
    "writes": "it writes through its context alone",
    "input": "it leaves what it reads as it was",
    "determinism": "two runs give the same, or it says that they do not",
    "effect": "what it tells of itself is what was found changed",
    "tolerance": "the model computes what it computed before",
    "odd_model": "it fails cleanly on a model that it does not expect",
}
"""The checks, in their order, and what each asks for."""


class Finding(Frozen):
    """What one check found."""

    check: str = Field(description="one of CHECKS")
    outcome: Outcome
    message: str = Field("", description="what was found, and what to do about it")


class Findings(Frozen):
    """What all checks found of one pass with one set of parameters."""

    pass_name: str
    origin: str = Field("", description="package and version that the pass comes from")
    example: str = Field("", description="parameters and entries before it, in words")
    findings: tuple[Finding, ...]
    host_lacks: str = Field("", description="why the pass cannot run here; empty where it can")
    seconds: float = 0.0

    def __getitem__(self, check: str) -> Finding:
        """Raises: KeyError where there was no such check."""
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(check)

    def __iter__(self) -> Iterator[Finding]:  # type: ignore[override]
        return iter(self.findings)

    def of(self, outcome: Outcome) -> tuple[Finding, ...]:
        """Those with that outcome."""
        return tuple(finding for finding in self.findings if finding.outcome == outcome)

    @property
    def failed(self) -> tuple[Finding, ...]:
        return self.of("failed")

    @property
    def ok(self) -> bool:
        """Whether no check failed and the pass could run here."""
        return not self.failed and not self.host_lacks

    def require_ok(self) -> None:
        """Raises: AssertionError that shows what failed."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        title = f"{self.pass_name}" + (f" ({self.example})" if self.example else "")
        lines = [f"{f.outcome:8} {f.check}: {f.message}" for f in self.findings if f.outcome != "passed"]
        if self.host_lacks:
            lines.insert(0, f"cannot run here: {self.host_lacks}")
        passed = len(self.of("passed"))
        return "\n  ".join([title, *lines, f"{passed} of {len(self.findings)} checks passed"])
