"""`metrics.jsonl` as it lies in a run's folder; reading it needs no torch."""

import json
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; a line cut off by a kill is left out."""
    rows = []
    for line in (run / FILE).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
