"""Where things are, and which run is the latest."""

import os
from pathlib import Path

import pytest

from minillm import paths
from minillm.errors import InputError


def make_run(runs: Path, name: str, age_s: int, *, finished: bool = False) -> Path:
    run = runs / name
    run.mkdir(parents=True)
    (run / "run.toml").touch()
    os.utime(run / "run.toml", (1_000_000 - age_s, 1_000_000 - age_s))
    if finished:
        (run / "final").mkdir()
        (run / "final/COMPLETE").touch()
    return run


def test_the_word_bundled_is_the_one_in_the_package(tmp_path: Path) -> None:
    assert paths.resolve(Path("bundled"), paths.BUNDLED_CORPUS) == paths.BUNDLED_CORPUS
    assert paths.resolve(tmp_path, paths.BUNDLED_CORPUS) == tmp_path


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder at `nowhere`"):
        paths.resolve(Path("nowhere"), tmp_path)


@pytest.mark.parametrize(
    "bundled", [paths.BUNDLED_CORPUS, paths.BUNDLED_DIALOGUES, paths.BUNDLED_TOKENIZER]
)
def test_the_bundled_files_are_in_the_package(bundled: Path) -> None:
    assert bundled.exists()


def test_run_folders_are_counted_by_stage_and_model(tmp_path: Path) -> None:
    assert paths.new_run_folder(tmp_path, "sft", "a").name == "sft-a-1"
    make_run(tmp_path, "sft-a-9", 0)
    make_run(tmp_path, "sft-a-2", 0)
    make_run(tmp_path, "pretrain-a-20", 0)
    assert paths.new_run_folder(tmp_path, "sft", "a").name == "sft-a-10"
    assert paths.new_run_folder(tmp_path, "sft", "mini:tiny/x").name == "sft-mini-tiny-x-1"


def test_the_latest_run_is_the_youngest_of_its_stage(tmp_path: Path) -> None:
    old = make_run(tmp_path, "sft-a-2", 50, finished=True)
    young = make_run(tmp_path, "sft-a-1", 5)
    make_run(tmp_path, "pretrain-a-1", 1)
    (tmp_path / "sft-a-3").mkdir()  # no run.toml: not a run
    assert paths.latest_run(tmp_path, "sft") == young
    assert paths.latest_run(tmp_path, "sft", finished=True) == old
    assert paths.latest_run(tmp_path, "*", finished=True) == old
    assert paths.latest_run(tmp_path / "none", "sft") is None


def test_resume_takes_latest_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no sft run below `runs/`"):
        paths.resolve_resume("latest", "sft")
    run = make_run(Path("runs"), "sft-a-1", 5)
    assert paths.resolve_resume("latest", "sft") == run
    assert paths.resolve_resume(str(run), "sft") == run
    with pytest.raises(InputError, match="no run to resume at `runs`"):
        paths.resolve_resume("runs", "sft")
