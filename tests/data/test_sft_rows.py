"""Reading SFT parquet of others: padding goes, contradictions are named."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minillm.data.sft_rows import SftRows
from minillm.errors import InputError

PACKED = {
    "token_ids": [[5, 6, 7, 8, 9, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]],
    "labels": [[-100, 6, -100, -100, 9, -100, -100, -100], [-100] * 7 + [8]],
    "position_ids": [[0, 1, 0, 1, 2, 0, 0, 0], list(range(8))],
    "length": [5, 8],
    "sample_lengths": [[2, 3], [8]],
    "type": ["a", "b"],
}
UNPACKED = {
    "token_ids": [[5, 6, 7, 0], [1, 2, 3, 4]],
    "labels": [[-100, 6, 7, -100], [-100, 2, 3, 4]],
    "position_ids": [[0, 1, 2, 3], [0, 1, 2, 3]],
    "length": [3, 4],
    "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
    "type": ["a", "b"],
}


def write(folder: Path, columns: dict[str, Any], **changes: Any) -> Path:
    columns = {name: column for name, column in (columns | changes).items() if column is not None}
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


def rows(path: Path) -> list[tuple[list[int], list[int], list[int]]]:
    opened = SftRows.open(path, 10)
    found = [opened.row(i) for i in range(len(opened))]
    assert all(a.dtype == np.int32 for r in found for a in (r.token_ids, r.labels, r.position_ids))
    return [(r.token_ids.tolist(), r.labels.tolist(), r.position_ids.tolist()) for r in found]


def test_padding_of_packed_rows_is_removed(tmp_path: Path) -> None:
    assert rows(write(tmp_path, PACKED)) == [
        ([5, 6, 7, 8, 9], [-100, 6, -100, -100, 9], [0, 1, 0, 1, 2]),
        ([1, 2, 3, 4, 5, 6, 7, 8], [-100] * 7 + [8], list(range(8))),
    ]


def test_padding_of_unpacked_rows_is_removed(tmp_path: Path) -> None:
    wanted = [
        ([5, 6, 7], [-100, 6, 7], [0, 1, 2]),
        ([1, 2, 3, 4], [-100, 2, 3, 4], [0, 1, 2, 3]),
    ]
    assert rows(write(tmp_path, UNPACKED)) == wanted
    assert rows(write(tmp_path, UNPACKED, attention_mask=None)) == wanted


def test_padding_on_the_left_is_removed_too(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        UNPACKED,
        token_ids=[[0, 5, 6, 7], [1, 2, 3, 4]],
        labels=[[-100, -100, 6, 7], [-100, 2, 3, 4]],
        position_ids=[[0, 0, 1, 2], [0, 1, 2, 3]],
        attention_mask=[[0, 1, 1, 1], [1, 1, 1, 1]],
    )
    assert rows(path)[0] == ([5, 6, 7], [-100, 6, 7], [0, 1, 2])


def test_positions_follow_from_sample_lengths_where_there_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, PACKED, position_ids=None)
    assert rows(path)[0][2] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64()], ids=lambda kind: str(kind)
)
@pytest.mark.parametrize("wrap", [pa.list_, pa.large_list, lambda k: pa.list_(k, 4)])
def test_any_width_of_integers_and_kind_of_lists_is_read(
    tmp_path: Path, kind: pa.DataType, wrap: Any
) -> None:
    lists = {
        name: pa.array(UNPACKED[name], wrap(kind))
        for name in ("token_ids", "labels", "position_ids", "attention_mask")
    }
    assert rows(write(tmp_path, UNPACKED, **lists)) == rows(write(tmp_path, UNPACKED))


def test_a_long_file_is_read_over_many_batches(tmp_path: Path) -> None:
    ids = [[i % 10] * (1 + i % 3) for i in range(5000)]
    path = write(tmp_path, {"token_ids": ids, "labels": ids, "length": [len(i) for i in ids]})
    opened = SftRows.open(path, 10)
    assert len(opened) == 5000
    assert [opened.row(i).token_ids.tolist() for i in (0, 1023, 1024, 4999)] == [
        ids[i] for i in (0, 1023, 1024, 4999)
    ]
    assert opened.num_label_tokens == opened.num_tokens == sum(map(len, ids))


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        (PACKED, {"token_ids": [PACKED["token_ids"][0], [1, 2, 10, 4, 5, 6, 7, 8]]},
         r"row 1 has a token id outside the vocabulary of 10 \(token 2\)"),
        (PACKED, {"token_ids": [[-1] + [6] * 7, PACKED["token_ids"][1]]}, "row 0 has a token id"),
        (PACKED, {"labels": [[-100, 6, 3, -100, 9, -100, -100, -100], [-100] * 8]},
         r"row 0 has a label that is neither -100 nor its token \(token 2\)"),
        (PACKED, {"labels": [[-100] * 8, [-100] * 7]}, "row 1 has 7 labels for 8 token_ids"),
        (PACKED, {"position_ids": [[0, 1, 2, 3, 4, 0, 0, 0], list(range(8))]},
         "row 0 has position_ids that contradict sample_lengths"),
        (PACKED, {"position_ids": [[0, 1, 0, 2, 3, 0, 0, 0], list(range(8))]},
         "row 0 has position_ids that neither count on nor restart"),
        (PACKED, {"position_ids": [[0, 1, 0, 1, 2, 0, 0, 0], list(range(1, 9))]},
         "row 1 has position_ids that neither count on nor restart"),
        (PACKED, {"sample_lengths": [[2, 3], [9]]}, "row 1 has a length of 9, but 8 token_ids"),
        (PACKED, {"sample_lengths": [[2, 3], [-1, 9]]}, "row 1 has a negative sample length"),
        (PACKED, {"length": [4, 8]}, "row 0 has a length of 4, but 5 tokens"),
        (UNPACKED, {"length": [2, 4]}, "row 0 has a length of 2, but 3 tokens"),
        (UNPACKED, {"attention_mask": [[1, 1, 1], [1] * 4]}, "row 0 has 3 attention_mask for 4"),
        (UNPACKED, {"attention_mask": [[0] * 4, [1] * 4], "length": [4, 4]}, "row 0 has no token"),
        (UNPACKED, {"labels": None}, "has no column `labels`"),
        (UNPACKED, {"labels": [None, [1, 2, 3, 4]]}, "missing values near row 0"),
        (UNPACKED, {"labels": [["a"] * 4, ["b"] * 4]}, "holds list<.*>, not integers"),
    ],
)  # fmt: skip
def test_a_row_that_contradicts_itself_is_named(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        SftRows.open(write(tmp_path, base, **changes), 10)
    assert "x.parquet" in str(caught.value)
    assert caught.value.hint


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dialogues at"):
        SftRows.open(tmp_path / "none.parquet", 10)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="not a readable parquet"):
        SftRows.open(tmp_path / "bad.parquet", 10)
    with pytest.raises(InputError, match="holds no row"):
        SftRows.open(write(tmp_path, {name: column[:0] for name, column in UNPACKED.items()}), 10)


def test_a_foreign_file_names_no_tokenizer(tmp_path: Path) -> None:
    opened = SftRows.open(write(tmp_path, PACKED), 10)
    assert opened.tokenizer_sha256 == ""
    assert len(opened.sha256) == 64
    with pytest.raises(IndexError):
        opened.row(2)
