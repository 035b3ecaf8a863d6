"""Outcomes of many runs, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from harness.history import bound
from harness.running import Outcome, percentile

HEAD = (
    "| Test | Runs | Streams | Lost | Repeated | Changed | Noticed, s | Pause p50, s | p95, s "
    "| True rate of loss, 95 % |\n|" + " --- |" * 10
)


class Report:
    """What was run, in order."""

    def __init__(self, seed: int) -> None:
        self._seed, self._began = seed, time.strftime("%Y-%m-%d %H:%M")
        self._outcomes: list[Outcome] = []
        self._notes: list[dict[str, Any]] = []

    def add(self, outcome: Outcome) -> None:
        """One run of a scenario."""
        self._outcomes.append(outcome)

    def note(self, number: int, name: str, **figures: Any) -> None:
        """Figures of a test that is no scenario."""
        self._notes.append({"test": f"{number} {name}", **figures})

    def table(self) -> str:
        """Markdown, a line for each scenario."""
        lines = [HEAD]
        for name in dict.fromkeys(outcome.scenario for outcome in self._outcomes):
            runs = [outcome for outcome in self._outcomes if outcome.scenario == name]
            streams = sum(run.streams for run in runs)
            lost = sum(run.lost() for run in runs)
            gaps = [gap for run in runs for gap in run.gaps_s]
            seen = [seconds for run in runs for seconds in run.detect_s]
            noticed = f"{max(seen):.2f} at most" if seen else ""
            cells = [name, len(runs), streams, lost, sum(run.duplicated() for run in runs)]
            cells += [sum(run.changed() for run in runs), noticed]
            cells += [f"{percentile(gaps, 50):.1f}", f"{percentile(gaps, 95):.1f}"]
            cells += [f"< {100 * bound(lost, streams):.2g} %"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines)

    def write(self, file: Path) -> None:
        """The JSON to `file`, the table beside it with the ending .md."""
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "began": self._began,
            "seed": self._seed,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": os.getloadavg(),
            "outcomes": [dataclasses.asdict(outcome) for outcome in self._outcomes],
            "notes": self._notes,
        }
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        notes = [
            f"- {note['test']}: "
            + ", ".join(f"{key} {value}" for key, value in note.items() if key != "test")
            for note in self._notes
        ]
        text = "\n".join([self.table(), "", *notes, ""])
        file.with_suffix(".md").write_text(text, encoding="utf-8")
