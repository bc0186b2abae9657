"""What `prepare-tokenizer` found and kept, by source: `report.md` and `sources.png`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm import charts
from minillm.files import human_bytes, write_text

CHART, TEXT = "sources.png", "report.md"

_MAX_BARS = 25
"""Sources in the chart; the others, smaller, are one bar."""


@dataclass(slots=True)
class SourceCount:
    """One source, before and after."""

    documents: int = 0
    text_bytes: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0

    def add(self, other: "SourceCount") -> None:
        """Add the counts of another source."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.kept_documents += other.kept_documents
        self.kept_bytes += other.kept_bytes


@dataclass(frozen=True, slots=True)
class SampleReport:
    """What was sampled."""

    folder: Path
    num_inputs: int
    """Files read."""
    num_without_source: int
    """Of these, files that have no column of sources."""
    num_files: int
    """Files written."""
    ratio: float
    seed: int
    sources: Mapping[str, SourceCount]
    """By name, the one with most documents first."""

    @property
    def total(self) -> SourceCount:
        """All sources together."""
        total = SourceCount()
        for count in self.sources.values():
            total.add(count)
        return total

    def rows(self) -> list[list[object]]:
        """Return the table's rows; their columns are `COLUMNS`."""
        total = self.total
        return [
            [
                number,
                name,
                count.documents,
                f"{count.documents / total.documents:.2%}",
                human_bytes(count.text_bytes),
                count.kept_documents,
                f"{count.kept_documents / total.kept_documents:.2%}",
                human_bytes(count.kept_bytes),
            ]
            for number, (name, count) in enumerate(self.sources.items(), 1)
        ]


COLUMNS = ("#", "source", "documents", "share", "text", "kept", "share kept", "text kept")


def is_report(entry: Path) -> bool:
    """Tell whether a file in the sample's folder is one of the report's."""
    return entry.name in (CHART, TEXT)


def write_sample_report(report: SampleReport, folder: Path) -> None:
    """Write the table and the chart; the same sample gives the same bytes."""
    total = report.total
    draw_sources(report, folder / CHART)
    lines = [
        "# Sample for the tokenizer",
        "",
        f"{total.kept_documents:,} of {total.documents:,} documents "
        f"({human_bytes(total.kept_bytes)} of {human_bytes(total.text_bytes)} of text), ratio "
        f"{report.ratio:.6g}, seed {report.seed}, from {report.num_inputs:,} files.",
        "",
    ]
    if report.num_without_source:
        lines += [
            f"{report.num_without_source:,} of the files have no column of sources; "
            "their documents count as `(none)`.",
            "",
        ]
    lines += [f"![sources]({CHART})", ""]
    if any(label.startswith("#") for _, label in labels(report)):
        lines += [f"{charts.NUMBERED}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---:|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in report.rows()]
    write_text(folder / TEXT, "\n".join(lines) + "\n")


def labels(report: SampleReport) -> list[tuple[str, str]]:
    """Return each source in the chart and what stands there for it."""
    names = list(report.sources)[:_MAX_BARS]
    return list(zip(names, charts.readable(names), strict=True))


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).replace("|", "\\|").split())


def draw_sources(report: SampleReport, path: Path) -> None:
    """Draw the share of each source, before and after, by documents and by text."""
    shown = list(report.sources.values())[:_MAX_BARS]
    names = [label for _, label in labels(report)]
    rest = SourceCount()
    for count in list(report.sources.values())[_MAX_BARS:]:
        rest.add(count)
    if rest.documents:
        shown.append(rest)
        names.append(f"{len(report.sources) - _MAX_BARS:,} others")
    total = report.total
    with charts.figure(9, 1.6 + 0.32 * len(names)) as figure:
        by_documents, by_bytes = figure.subplots(1, 2, sharey=True)
        _bars(
            by_documents,
            [100 * count.documents / total.documents for count in shown],
            [100 * count.kept_documents / total.kept_documents for count in shown],
        )
        by_documents.set_title("share of documents (%)")
        by_documents.set_yticks(range(len(names)), names)
        by_documents.invert_yaxis()
        _bars(
            by_bytes,
            [100 * count.text_bytes / total.text_bytes for count in shown],
            [100 * count.kept_bytes / total.kept_bytes for count in shown],
        )
        by_bytes.set_title("share of text (%)")
        figure.legend(
            *by_documents.get_legend_handles_labels(), loc="outside lower center", ncols=2
        )
        title = f"{total.documents:,} documents before, {total.kept_documents:,} after sampling"
        if any(label.startswith("#") for label in names):
            title += f"\n# is the row of the table in {TEXT}"
        figure.suptitle(title)
        charts.save_png(figure, path)


def _bars(axes: Any, before: list[float], after: list[float]) -> None:
    places = range(len(before))
    axes.barh([place - 0.2 for place in places], before, 0.38, label="before", color="#9ab8d6")
    axes.barh([place + 0.2 for place in places], after, 0.38, label="after", color="#1f5f9e")
    axes.grid(visible=False, axis="y")
