"""Pictures of `prepare-sft`: numbers that are drawn, masks that are right, no boxes."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minillm.data.sft_mask import draw_mask, visible
from minillm.data.sft_report import SftReport, draw_charts
from minillm.data.sft_scan import Rejected
from minillm.errors import InputError


def report(path: Path, by_type: dict[str, int]) -> SftReport:
    lengths, rows = np.zeros(65, np.int64), np.zeros(65, np.int64)
    lengths[[10, 20, 60]] = 4, 3, 1
    rows[[60, 64]] = 2, 1
    counts = dict.fromkeys(("num_read", "num_identity", "num_sampled_out"), 0)
    counts |= dict.fromkeys(("num_never_encoded", "num_too_long", "num_too_short", "longest"), 0)
    return SftReport(
        path=path,
        rejected=Rejected(),
        num_dialogues=8,
        num_multi_turn=0,
        num_rows=3,
        sequence_length=64,
        packed=True,
        num_tokens=160,
        num_label_tokens=100,
        lengths=lengths,
        row_lengths=rows,
        by_type=by_type,
        **counts,
    )


@pytest.mark.filterwarnings("error")
def test_types_in_chinese_are_drawn_without_a_missing_letter(tmp_path: Path) -> None:
    """matplotlib warns of each letter that it has no glyph for, and warnings are errors."""
    types = {"翻译": 3, "阅读理解": 2, "$x_1$": 1, "": 1, "a" * 200: 1}
    types |= {f"type {i}": 0 for i in range(20)}
    places = draw_charts(report(tmp_path / "sft.parquet", types))
    assert [place.name for place in places] == ["sft-lengths.png", "sft-fill.png"]
    for place in places:
        assert matplotlib.image.imread(place).std() > 0.1


def test_a_token_sees_those_before_it_in_its_dialogue() -> None:
    document = np.array([1, 1, 1, 2, 3, 3])
    wanted = [[i >= j and document[i] == document[j] for j in range(6)] for i in range(6)]
    assert visible(document).tolist() == wanted


def columns() -> dict[str, list[list[int]]]:
    return {
        "token_ids": [[5, 6, 7, 8, 9, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]],
        "labels": [[-100, 6, -100, -100, 9, -100, -100, -100], [-100] * 7 + [8]],
        "position_ids": [[0, 1, 0, 1, 2, 0, 0, 0], list(range(8))],
        "sample_lengths": [[2, 3], [8]],
    }


def test_the_mask_of_any_row_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({k: v * 500 for k, v in columns().items()}), path, row_group_size=300)
    for number, lengths, learned in ((0, [2, 3], 2), (601, [8], 1), (998, [2, 3], 2)):
        picture = draw_mask(path, number)
        assert (picture.lengths, picture.num_learned) == (lengths, learned)
        assert picture.path == tmp_path / f"x-mask-{number}.png"
        image = matplotlib.image.imread(picture.path)[..., :3]
        dark = np.abs(image - np.array([0x08, 0x51, 0x9C]) / 255).max(-1) < 0.01
        light = np.abs(image - np.array([0x9E, 0xCA, 0xE1]) / 255).max(-1) < 0.01
        # places seen by learned tokens and by others, from the definition
        seen = {"[2, 3]": (2 + 3, 1 + 1 + 2), "[8]": (8, 28)}[str(lengths)]
        assert dark.sum() / light.sum() == pytest.approx(seen[0] / seen[1], rel=0.1)
    with pytest.raises(InputError, match="has 1000 rows, none is number 1000"):
        draw_mask(path, 1000)


def test_a_long_row_is_drawn_from_a_part_of_its_tokens(tmp_path: Path) -> None:
    ids = [[1] * 5000]
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table({"token_ids": ids, "labels": ids}), path)
    assert draw_mask(path, 0).lengths == [5000]


def test_what_has_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dialogues at"):
        draw_mask(tmp_path / "none.parquet", 0)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="not a readable parquet"):
        draw_mask(tmp_path / "bad.parquet", 0)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(InputError, match="has no column `token_ids`"):
        draw_mask(tmp_path / "text.parquet", 0)
