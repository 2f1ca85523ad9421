"""What is collected while stages are measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.measure.samples import LoadSample, LoadTimes, Sample, StartUp, WarmUpSample


@dataclass
class Record:
    """All samples so far, and why stages are out."""

    samples: list[Sample] = field(default_factory=list)
    warm_ups: list[WarmUpSample] = field(default_factory=list)
    loads: list[LoadSample] = field(default_factory=list)
    start_ups: list[StartUp] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    rss: dict[str, int] = field(default_factory=dict)
    device_memory: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    unloadable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept_in_memory: list[str] = field(default_factory=list)
    """Stages whose files the kernel did not drop, so that their load was not cold."""

    def fail(self, stage: str, replica: int, launch: int, reason: str) -> None:
        """Leave the stage out from here on; without the baseline's second process only the noise is unknown.

        Its rounds so far stay: they were as good as the others', and the reason says how many they are.
        """
        if replica:
            self.notes.append(f"the second process of {stage} failed, the noise is not known: {reason}")
            return
        done = {(s.launch, s.round) for s in self.samples if s.stage == stage and not s.replica}
        if done:
            rounds = f"{len(done)} round" + ("s" if len(done) > 1 else "")
            reason = f"it failed in launch {launch + 1}, after {rounds}: {reason}"
        self.failures[stage] = reason

    def note(self, note: str) -> None:
        """Add a note that may come with every launch: it is told once."""
        if note not in self.notes:
            self.notes.append(note)

    def load_times(self, stages: Iterable[str]) -> dict[str, LoadTimes]:
        """Cold: the load for which the files had been dropped; warm: the median of those that found them in memory.

        One that found some of them there is neither, and so is one that compiled anew with the files in memory.
        """
        found = {}
        for stage in stages:
            mine = [sample for sample in self.loads if sample.stage == stage]
            warm = [sample.load_s for sample in mine if sample.warm and not sample.compiled_anew]
            found[stage] = LoadTimes(
                cold_s=next((sample.load_s for sample in mine if sample.cold), None),
                warm_s=statistics.median(warm) if warm else None,
            )
        return found
