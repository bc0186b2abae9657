import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import charts, paths
from minillm.data import sample_report, sample_rows
from minillm.data import stratify as module
from minillm.data.stratify import share_out, stratify
from minillm.errors import InputError, RunError
from minillm.settings import PrepareTokenizerConfig

COUNTS = {"law": 600, "poem": 300, "chat": 97, "rare": 3}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files, sources interleaved; every text is different."""
    rows = [
        (f"{name} 第{i}篇 " + "字" * (i % 9), name) for name, n in COUNTS.items() for i in range(n)
    ]
    rows.sort(key=lambda row: hash_of(row[0]))
    folder = tmp_path / "raw"
    folder.mkdir()
    for number, part in enumerate([rows[:400], rows[400:]]):
        table = pa.table({"text": [r[0] for r in part], "source": [r[1] for r in part]})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=100)
    return folder


def hash_of(text: str) -> int:
    return sum(byte * 31**i for i, byte in enumerate(text.encode()[:12])) % 1009


def read(folder: Path) -> list[dict[str, str]]:
    return pq.read_table(sorted(folder.glob("*.parquet"))).to_pylist()


def sample(data: Path, out: Path, **settings) -> list[tuple[str, str]]:
    stratify(PrepareTokenizerConfig(data=data, out=out, **settings))
    return [
        (row["text"], row["source"])
        for part in sorted(out.glob("*.parquet"))
        for row in pq.read_table(part).to_pylist()
    ]


def test_each_source_keeps_its_exact_share(corpus: Path, tmp_path: Path) -> None:
    rows = sample(corpus, tmp_path / "out", sample_ratio=0.1)
    assert Counter(source for _, source in rows) == {"law": 60, "poem": 30, "chat": 10, "rare": 1}
    assert len({text for text, _ in rows}) == len(rows)
    assert all(text.startswith(source) for text, source in rows)


def test_the_report_counts_before_and_after(corpus: Path, tmp_path: Path) -> None:
    report = stratify(PrepareTokenizerConfig(data=corpus, out=tmp_path / "out", sample_ratio=0.5))
    assert {name: count.documents for name, count in report.sources.items()} == COUNTS
    rows = read(tmp_path / "out")
    for name, count in report.sources.items():
        mine = [row["text"] for row in rows if row["source"] == name]
        assert count.kept_documents == len(mine)
        assert count.kept_bytes == sum(len(text.encode()) for text in mine)


def test_the_same_seed_picks_the_same_documents(corpus: Path, tmp_path: Path) -> None:
    first = sample(corpus, tmp_path / "a", sample_ratio=0.2, seed=1)
    assert sample(corpus, tmp_path / "b", sample_ratio=0.2, seed=1) == first
    assert sample(corpus, tmp_path / "b", sample_ratio=0.2, seed=2) != first


def test_picks_are_spread_over_the_files(corpus: Path, tmp_path: Path) -> None:
    order = [row["text"] for row in pq.read_table(corpus).to_pylist()]
    places = [order.index(text) for text, _ in sample(corpus, tmp_path / "o", sample_ratio=0.2)]
    assert places == sorted(places)
    # 200 of 1000: hypergeometric mean 50 a quarter, standard deviation 5.5
    for quarter in range(4):
        assert 25 < sum(quarter * 250 <= place < quarter * 250 + 250 for place in places) < 75


def test_ratio_one_keeps_everything_in_order(corpus: Path, tmp_path: Path) -> None:
    order = [row["text"] for row in pq.read_table(corpus).to_pylist()]
    assert [t for t, _ in sample(corpus, tmp_path / "o", sample_ratio=1.0)] == order


def test_ratio_zero_aims_at_a_size(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(sample(corpus, tmp_path / "all")) == sum(COUNTS.values())
    monkeypatch.setattr(module, "AUTO_BYTES", 3000)
    size = sum(len(text.encode()) for text, _ in sample(corpus, tmp_path / "some"))
    assert 2500 < size < 3500


def test_without_source_column_all_is_one_source(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "", None, "b"]}), tmp_path / "a.parquet")
    rows = sample(tmp_path, tmp_path / "out", sample_ratio=1.0)
    assert rows == [("a", "(none)"), ("b", "(none)")]


def test_parts_are_of_bounded_size(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_rows, "PART_ROWS", 400)
    rows = sample(corpus, tmp_path / "out", sample_ratio=1.0)
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert [file.name for file in files] == [f"part-{i:05d}.parquet" for i in range(3)]
    assert [pq.read_metadata(file).num_rows for file in files] == [400, 400, 200]
    assert len(rows) == 1000
    assert pq.read_metadata(files[0]).row_group(0).column(0).compression == "ZSTD"


def test_an_earlier_sample_is_replaced_whole(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(corpus, out, sample_ratio=1.0)
    (out / "part-00007.parquet").write_bytes(b"old")
    assert len(sample(corpus, out, sample_ratio=0.1)) == 101
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_folder_with_foreign_files_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("mine")
    with pytest.raises(InputError, match=r"holds `thesis\.doc`"):
        sample(corpus, out, sample_ratio=0.1)
    assert [file.name for file in out.iterdir()] == ["thesis.doc"]


def test_a_failure_leaves_the_earlier_sample(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = sample(corpus, out, sample_ratio=0.1)

    def shrink(*_args: object) -> dict[str, int]:
        return {name: count + 1 for name, count in COUNTS.items()}

    monkeypatch.setattr(module, "share_out", shrink)
    with pytest.raises(RunError, match="changed between"):
        stratify(PrepareTokenizerConfig(data=corpus, out=out, sample_ratio=0.1))
    assert [(r["text"], r["source"]) for r in read(out)] == before


def test_what_cannot_be_sampled_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="data/raw") as caught:
        stratify(PrepareTokenizerConfig())
    assert "--data bundled" in str(caught.value.hint)
    paths.RAW.mkdir(parents=True)
    (paths.RAW / "a.txt").write_text("text")
    with pytest.raises(InputError, match="no parquet file"):
        stratify(PrepareTokenizerConfig())
    pq.write_table(pa.table({"text": [" "]}), paths.RAW / "a.parquet")
    with pytest.raises(InputError, match="no document"):
        stratify(PrepareTokenizerConfig())


def test_a_source_may_be_missing_from_a_file_or_a_row(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), data / "a.parquet")
    some = pa.table({"text": ["c", "d", "e"], "source": ["x", None, " "]})
    pq.write_table(some, data / "b.parquet")
    numbers = pa.table({"source": [7, 7], "text": ["f", "g"]})
    pq.write_table(numbers, data / "c.parquet")
    coded = pa.table({"text": ["h"], "source": pa.array(["x"]).dictionary_encode()})
    pq.write_table(coded, data / "d.parquet")
    report = stratify(PrepareTokenizerConfig(data=data, out=tmp_path / "o", sample_ratio=1.0))
    counts = {name: count.documents for name, count in report.sources.items()}
    assert counts == {"(none)": 4, "7": 2, "x": 2}
    assert (report.num_inputs, report.num_without_source) == (4, 1)
    text = (tmp_path / "o" / "report.md").read_text()
    assert "1 of the files have no column of sources" in text
    alike = sample(data, tmp_path / "o", sample_ratio=0.5, source_column="")
    assert [source for _, source in alike] == ["(none)"] * 4


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a", "b"], "site": ["x", "y"]}), tmp_path / "a.parquet")
    columns = {"text_column": "content", "source_column": "site"}
    rows = sample(tmp_path, tmp_path / "out", sample_ratio=1.0, **columns)
    assert rows == [("a", "x"), ("b", "y")]
    with pytest.raises(InputError, match=r"has no `text`, only `content`, `site`") as caught:
        sample(tmp_path, tmp_path / "out", sample_ratio=1.0)
    assert caught.value.hint == "`--text-column content`"


def test_addresses_and_lists_are_no_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SOURCES", 5)
    place = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": ["a"] * 6, "source": [f"http://{i}" for i in range(6)]}), place
    )
    with pytest.raises(InputError, match="more than 5 different values") as caught:
        sample(place, tmp_path / "out")
    assert "--source-column ''" in str(caught.value.hint)
    pq.write_table(pa.table({"text": ["a"], "source": [["x"]]}), place)
    with pytest.raises(InputError, match="not names"):
        sample(place, tmp_path / "out")


def test_an_earlier_sample_below_the_data_is_not_sampled(corpus: Path) -> None:
    first = sample(corpus, corpus / "sample", sample_ratio=0.5)
    assert sample(corpus, corpus / "sample", sample_ratio=0.5) == first


def test_the_same_seed_gives_the_same_bytes_whatever_the_row_groups(
    corpus: Path, tmp_path: Path
) -> None:
    sample(corpus, tmp_path / "a", sample_ratio=0.3)
    again = tmp_path / "again"
    again.mkdir()
    for file in corpus.iterdir():
        pq.write_table(pq.read_table(file), again / file.name, row_group_size=37)
    sample(again, tmp_path / "b", sample_ratio=0.3)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["part-00000.parquet", "report.md", "sources.png"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_report_has_a_row_per_source_and_the_numbers_of_the_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "can_draw", str.isascii)  # as on a system without Chinese
    table = pa.table({"text": ["a"] * 6, "source": ["中文"] * 3 + ["b|c"] * 2 + ["law"]})
    pq.write_table(table, tmp_path / "a.parquet")
    report = stratify(PrepareTokenizerConfig(data=tmp_path, out=tmp_path / "out", sample_ratio=1.0))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 | 中文 | 3 | 50.00% | 3 B | 3 | 50.00% | 3 B |" in text
    assert "| 2 | b\\|c | 2 |" in text
    assert charts.NUMBERED in text
    assert sample_report.labels(report) == [("中文", "#1"), ("b|c", "b|c"), ("law", "law")]
    assert (tmp_path / "out" / "sources.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_file_is_named_and_nothing_is_written(corpus: Path, tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad, "source": ["x", "x"]}), corpus / "2.parquet")
    with pytest.raises(InputError, match=r"2\.parquet` cannot be read.*UTF8"):
        sample(corpus, tmp_path / "out")
    (corpus / "2.parquet").write_bytes((corpus / "1.parquet").read_bytes()[:3000])
    with pytest.raises(InputError, match=r"2\.parquet` cannot be read"):
        sample(corpus, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == [corpus.name]


def test_a_killed_run_leaves_the_earlier_sample_and_the_next_one_cleans_up(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = sample(corpus, out, sample_ratio=0.1)
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from minillm.data import stratify as module\n"
        "from minillm.settings import PrepareTokenizerConfig\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "module.write_sample_report = die\n"
        f"cfg = PrepareTokenizerConfig(data=Path({str(corpus)!r}), out=Path({str(out)!r}))\n"
        "module.stratify(cfg)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [(row["text"], row["source"]) for row in read(out)] == before
    assert len(sample(corpus, out, sample_ratio=0.5)) == 500
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "raw"]


@given(
    st.dictionaries(st.text(max_size=3), st.integers(1, 10_000), min_size=1, max_size=8),
    st.floats(1e-6, 1),
)
def test_quotas_are_the_share_rounded_up_or_down_and_never_zero(
    counts: dict[str, int], ratio: float
) -> None:
    quotas = share_out(counts, ratio)
    for name, count in counts.items():
        assert 1 <= quotas[name] <= count
        assert quotas[name] == 1 or abs(quotas[name] - count * ratio) < 1
    without_minimum = sum(quota for name, quota in quotas.items() if counts[name] * ratio >= 1)
    assert without_minimum <= round(sum(counts.values()) * ratio)
