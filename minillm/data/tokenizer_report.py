"""What a trained tokenizer does to text: `report.md` and `report.png` in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minillm import charts
from minillm.data.tokenizer_measure import Fit, Fits
from minillm.files import human_bytes, write_text

CHART, TEXT = "report.png", "report.md"

_MAX_SOURCES = 20
_LONGEST, _UNUSED = 20, 30
_LEAST_SHARE = 0.005
"""A script with less of the text than this is not in the chart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokens, and how often each appears in the text that was trained on.

    Attributes:
        texts: Each token decoded by itself, by id.
        sizes: int array: bytes of each token, 0 for control tokens.
        counts: int array: how often it appears.
        is_step: bool array: a longer token is merged from it.
    """

    texts: Sequence[str]
    sizes: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    is_step: npt.NDArray[np.bool_]

    @property
    def unused(self) -> npt.NDArray[np.int64]:
        """Ids that never appear, without control tokens and single bytes."""
        found: npt.NDArray[np.int64] = np.flatnonzero((self.counts == 0) & (self.sizes > 1))
        return found

    @property
    def longest(self) -> npt.NDArray[np.int64]:
        """Ids of the longest tokens, the longest first."""
        found: npt.NDArray[np.int64] = np.argsort(-self.sizes, kind="stable")[:_LONGEST]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts:
    """What the report says of the corpus."""

    num_documents: int
    corpus_bytes: int
    text_bytes: int
    seed: int
    is_held_out: bool
    measured_bytes: int


def write_tokenizer_report(
    folder: Path, facts: ReportFacts, vocabulary: Vocabulary, fits: Sequence[Fits]
) -> None:
    """Write the report; the same tokenizer and text give the same bytes.

    Args:
        folder: The tokenizer's.
        facts: Of the corpus.
        vocabulary: The new tokenizer's.
        fits: The new tokenizer and those it is compared with, on the same text.
    """
    ours = fits[0]
    sources = list(ours.by_source)[:_MAX_SOURCES]
    _draw(folder / CHART, vocabulary, fits, sources)
    parts = [
        _about(facts),
        f"![report]({CHART})\n",
        "## Compression\n\nUTF-8 bytes per token; more is better.\n",
        _comparison(fits),
        "## By language\n\nFertility is tokens per word; of Chinese each letter counts as one.\n",
        _groups("language", ours.by_language),
        "## By source\n",
        _groups("source", {name: ours.by_source[name] for name in sources}),
    ]
    if len(ours.by_source) > len(sources):
        parts.append(f"{len(ours.by_source) - len(sources):,} smaller sources are not shown.\n")
    if any(label.startswith("#") for label in charts.readable(sources)):
        parts.append(f"{charts.NUMBERED}.\n")
    parts += [_unused(vocabulary), _longest(vocabulary)]
    write_text(folder / TEXT, "\n".join(parts))


def _about(facts: ReportFacts) -> str:
    share = facts.text_bytes / max(1, facts.corpus_bytes)
    sampled = f"{share:.2%} of it, at random with seed {facts.seed}" if share < 1 else "all of it"
    where = "that was not trained on" if facts.is_held_out else "of the same that was trained on"
    return (
        f"# Tokenizer\n\nThe corpus is {human_bytes(facts.corpus_bytes)} of text in "
        f"{facts.num_documents:,} documents; trained on {human_bytes(facts.text_bytes)} "
        f"({sampled}).\n\nMeasured on {human_bytes(facts.measured_bytes)} of text {where}.\n"
    )


def _comparison(fits: Sequence[Fits]) -> str:
    languages = list(fits[0].by_language)
    head = ["tokenizer", "vocabulary", "all", *languages]
    rows = [
        [
            fit.name,
            f"{fit.vocab_size:,}",
            f"{fit.total.bytes_per_token:.3f}",
            *(f"{fit.by_language[name].bytes_per_token:.3f}" for name in languages),
        ]
        for fit in fits
    ]
    return _table(head, rows)


def _groups(what: str, groups: dict[str, Fit]) -> str:
    rows = [
        [
            str(number),
            name,
            human_bytes(fit.text_bytes),
            f"{fit.bytes_per_token:.3f}",
            f"{fit.tokens_per_character:.3f}",
            f"{fit.fertility:.3f}",
        ]
        for number, (name, fit) in enumerate(groups.items(), 1)
    ]
    return _table(["#", what, "text", "bytes per token", "tokens per character", "fertility"], rows)


def _unused(vocabulary: Vocabulary) -> str:
    unused = vocabulary.unused
    final = [index for index in unused if not vocabulary.is_step[index]]
    num_bytes = int(np.sum((vocabulary.counts == 0) & (vocabulary.sizes == 1)))
    text = (
        f"## Unused tokens\n\n{len(unused):,} of {int(np.sum(vocabulary.sizes > 1)):,} merged "
        f"tokens never appear in the text that was trained on, {len(unused) - len(final):,} of "
        "them because they are steps to longer tokens. "
        f"{num_bytes} of the 256 single bytes do not appear; any text can be encoded all the same."
        "\n"
    )
    if final:
        shown = " ".join(_code(vocabulary.texts[index]) for index in final[:_UNUSED])
        text += f"\nOf the others: {shown}\n"
    return text


def _longest(vocabulary: Vocabulary) -> str:
    rows = [
        [
            _code(vocabulary.texts[index]),
            str(vocabulary.sizes[index]),
            f"{vocabulary.counts[index]:,}",
        ]
        for index in vocabulary.longest
    ]
    return "## Longest tokens\n\n" + _table(["token", "bytes", "times"], rows)


def _code(text: str) -> str:
    return f"`{ascii(text)[1:-1] if not text.isprintable() else text}`".replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = (
        "|"
        + "|".join(
            "---" if name in ("tokenizer", "language", "source", "token") else "---:"
            for name in head
        )
        + "|"
    )
    lines = [f"| {' | '.join(head)} |", rule]
    lines += [f"| {' | '.join(' '.join(cell.split()) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _draw(path: Path, vocabulary: Vocabulary, fits: Sequence[Fits], sources: Sequence[str]) -> None:
    ours = fits[0]
    with charts.figure(10, 4.4 + 0.2 * max(len(sources), 6)) as figure:
        (languages, by_source), (sizes, usage) = figure.subplots(2, 2)
        _languages(languages, fits)
        places = range(len(sources))
        values = [ours.by_source[name].bytes_per_token for name in sources]
        by_source.barh(places, values, color="#1f5f9e")
        by_source.set_yticks(places, charts.readable(sources))
        by_source.invert_yaxis()
        by_source.grid(visible=False, axis="y")
        by_source.set_title("bytes per token by source")
        longest = int(vocabulary.sizes.max())
        sizes.hist(
            vocabulary.sizes[vocabulary.sizes > 0],
            bins=np.arange(0.5, longest + 1.5),
            color="#1f5f9e",
        )
        sizes.set_title("tokens by their length in bytes")
        sizes.set_xlabel("bytes")
        counts = np.sort(vocabulary.counts[vocabulary.counts > 0])[::-1]
        usage.loglog(np.arange(1, len(counts) + 1), counts, color="#1f5f9e")
        usage.set_title("how often a token appears, by rank")
        usage.set_xlabel("rank")
        if any(label.startswith("#") for label in charts.readable(sources)):
            figure.suptitle(f"# is the row of the table in {TEXT}")
        charts.save_png(figure, path)


def _languages(axes: Any, fits: Sequence[Fits]) -> None:
    least = _LEAST_SHARE * fits[0].total.text_bytes
    names = [name for name, fit in fits[0].by_language.items() if fit.text_bytes >= least]
    labels = charts.readable([fit.name for fit in fits])
    height = 0.8 / len(fits)
    for number, (fit, label) in enumerate(zip(fits, labels, strict=True)):
        places = [place + (number - (len(fits) - 1) / 2) * height for place in range(len(names))]
        values = [fit.by_language[name].bytes_per_token for name in names]
        axes.barh(places, values, height * 0.95, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_title("bytes per token by script")
    axes.legend()
