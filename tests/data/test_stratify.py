from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import paths
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


def sample(data: Path, out: Path, **settings) -> list[tuple[str, str]]:
    stratify(PrepareTokenizerConfig(data=data, out=out, **settings))
    return [
        (row["text"], row["source"])
        for part in sorted(out.iterdir())
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
    rows = pq.read_table(tmp_path / "out").to_pylist()
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
    assert sample(tmp_path, tmp_path / "out", sample_ratio=1.0) == [("a", "all"), ("b", "all")]


def test_parts_are_of_bounded_size(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_ROWS", 400)
    rows = sample(corpus, tmp_path / "out", sample_ratio=1.0)
    files = sorted((tmp_path / "out").iterdir())
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
    assert [(r["text"], r["source"]) for r in pq.read_table(out).to_pylist()] == before


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
