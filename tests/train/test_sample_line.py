"""Samples shown while training fit a terminal of 80 columns, Chinese included."""

from rich.cells import cell_len

from minillm.train.loop import sample_line


def test_long_chinese_is_cut_at_both_ends() -> None:
    line = sample_line("user\n" + "你有身体吗？" * 5 + "\nassistant\n", "我是\n" + "好" * 60)
    assert cell_len(line) <= 80
    assert line.startswith("  …")
    assert line.endswith("…")
    assert " → 我是⏎好" in line


def test_short_question_and_answer_stay_whole() -> None:
    assert sample_line("user\nHi\nassistant\n", "Hello") == "  Hi → Hello"
    assert sample_line("", "") == "   → "
