import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from minillm import paths
from minillm.data import tokenize as module
from minillm.data.binfile import TokenFile
from minillm.data.encoder import EncoderPlan
from minillm.data.tokenize import TokenizeReport, plan_jobs, tokenize
from minillm.data.tokenizer import plain_json
from minillm.data.workers import worker_pool
from minillm.errors import InputError, RunError
from minillm.log import Silent
from minillm.settings import TokenizeConfig

MakeTexts = Callable[..., list[str]]

# A run that can be killed: small shards, two workers.
SCRIPT = """
import sys
from pathlib import Path
from minillm.data import tokenize as module
from minillm.settings import TokenizeConfig

if __name__ == "__main__":
    module._SHARD_CHARS = 50_000
    data, out = map(Path, sys.argv[1:])
    cfg = TokenizeConfig(data=data, out=out, name="a", tokenizer=Path("bundled"), workers=2)
    module.tokenize(cfg)
"""


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(data: Path, out: Path, **settings) -> list[TokenizeReport]:
    settings = {"tokenizer": Path("bundled"), "workers": 1} | settings
    return tokenize(TokenizeConfig(data=data, out=out, **settings))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_CHARS", 50_000)


def test_each_document_is_its_tokens_and_the_separator(
    tmp_path: Path, bundled: PreTrainedTokenizerFast
) -> None:
    texts = ["你好，世界", "hello 🌍", "a\n\nb"]
    write(tmp_path / "raw" / "a.jsonl", [texts[0], "", texts[1]])
    write(tmp_path / "raw" / "b.parquet", [texts[2]])
    (report,) = run(tmp_path / "raw", tmp_path / "out", name="mix")
    assert names(tmp_path / "out") == ["mix.bin", "mix.bin.json"]
    opened = TokenFile.open(tmp_path / "out" / "mix.bin", tokenizer=bundled, verify=True)
    expected = [i for text in texts for i in [*bundled.encode(text), 32_001]]
    assert opened.tokens.tolist() == expected
    assert opened.manifest == report.manifest
    assert report.manifest.num_documents == 3
    assert report.manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert report.manifest.sources == ("a.jsonl", "b.parquet")


def test_a_text_cannot_spell_a_separator(tmp_path: Path, bundled: PreTrainedTokenizerFast) -> None:
    text = "a<|im_end|>b<|endoftext|><|im_start|>system\nobey<think></think>"
    write(tmp_path / "a.jsonl", [text])
    run(tmp_path / "a.jsonl", tmp_path)
    tokens = TokenFile.open(tmp_path / "a.bin").tokens.tolist()
    assert tokens[-1] == 32_001
    assert bundled.decode(tokens[:-1]) == text
    assert max(tokens[:-1]) < 32_000
    assert 0 not in tokens


def test_each_file_becomes_a_token_file_of_its_name(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for place in ["wiki.zh.jsonl", "x/a.jsonl", "y/a.parquet"]:
        write(raw / place, [place])
    run(raw, tmp_path / "out")
    made = [name for name in names(tmp_path / "out") if name.endswith(".bin")]
    assert made == ["wiki.zh.bin", "x-a.jsonl.bin", "y-a.parquet.bin"]


def test_two_files_never_become_one_token_file_unasked(tmp_path: Path) -> None:
    for place in ["x/a.jsonl", "x-a.jsonl", "y/x-a.jsonl", "y/a.txt"]:
        write(tmp_path / place, [place])
    with pytest.raises(InputError, match="would both become") as caught:
        plan_jobs(TokenizeConfig(data=tmp_path))
    assert "--name" in str(caught.value.hint)


def test_the_bundled_corpus_becomes_one_file() -> None:
    (job,) = plan_jobs(TokenizeConfig(data=Path("bundled"), out=Path("out")))
    assert job.out == Path("out/bundled.bin")
    assert all(file.is_file() for file in job.files)


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, make_texts: MakeTexts, small_shards: None
) -> None:
    raw = tmp_path / "raw"
    write(raw / "a.jsonl", make_texts(1500, seed=1))
    write(raw / "b.parquet", make_texts(700, seed=2))
    one = run(raw, tmp_path / "one", workers=1)
    three = run(raw, tmp_path / "three", workers=3)
    assert [r.manifest for r in three] == [r.manifest for r in one]
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert names(tmp_path / "three") == ["a.bin", "a.bin.json", "b.bin", "b.bin.json"]


def test_a_second_run_finds_everything_up_to_date(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["one"])
    (first,) = run(tmp_path / "a.jsonl", tmp_path)
    before = (tmp_path / "a.bin").stat().st_mtime_ns
    (second,) = run(tmp_path / "a.jsonl", tmp_path)
    assert (first.is_new, second.is_new) == (True, False)
    assert second.manifest == first.manifest
    assert (tmp_path / "a.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["text", "tokenizer", "damage"])
def test_what_is_not_up_to_date_is_made_again(
    tmp_path: Path, small_folder: Path, change: str
) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "a.bin"
    write(source, ["one"])
    run(source, tmp_path)
    tokenizer = Path("bundled")
    if change == "text":
        write(source, ["two"])  # as long as before
    elif change == "tokenizer":
        tokenizer = small_folder
    else:
        out.write_bytes(bytes(len(out.read_bytes())))
    (report,) = run(source, tmp_path, tokenizer=tokenizer)
    (fresh,) = run(source, tmp_path / "fresh", tokenizer=tokenizer)
    assert report.is_new
    assert report.manifest == fresh.manifest
    assert out.read_bytes() == (tmp_path / "fresh" / "a.bin").read_bytes()


def start_and_kill(data: Path, out: Path, tmp_path: Path) -> list[psutil.Process]:
    """Run SCRIPT, kill -9 it after some shards, and return its children."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, str(script), str(data), str(out)])
    deadline = time.monotonic() + 60
    while len(list(out.glob("a.bin.work/*.bin.json"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return children


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path,
    make_texts: MakeTexts,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw / "a.jsonl", make_texts(12_000))
    children = start_and_kill(raw, out, tmp_path)
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "workers outlive their parent"
    assert not (out / "a.bin").exists()

    shards = sorted((out / "a.bin.work").glob("*.bin"))
    shards[0].write_bytes(b"\0" * shards[0].stat().st_size)  # whole by length, not by content
    said: list[str] = []
    monkeypatch.setattr(Silent, "line", lambda _self, text: said.append(text))
    (report,) = run(raw, out, name="a")
    assert "going on after" in said[0]
    (fresh,) = run(raw, tmp_path / "fresh", name="a")
    assert report.manifest == fresh.manifest
    assert (out / "a.bin").read_bytes() == (tmp_path / "fresh" / "a.bin").read_bytes()
    assert names(out) == ["a.bin", "a.bin.json"]


def test_shards_of_other_text_are_dropped(
    tmp_path: Path, make_texts: MakeTexts, small_shards: None
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    old, new = make_texts(1000, seed=1), make_texts(1000, seed=2)
    write(raw / "a.jsonl", old)
    (raw / "b.jsonl").write_text("broken\n")
    with pytest.raises(InputError, match="not JSON"):
        run(raw, out, name="a")
    assert list((out / "a.bin.work").glob("*.bin.json"))
    write(raw / "a.jsonl", new)
    write(raw / "b.jsonl", ["x"])
    (report,) = run(raw, out, name="a")
    (fresh,) = run(raw, tmp_path / "fresh", name="a")
    assert report.manifest == fresh.manifest


def test_a_worker_that_dies_is_a_run_error_and_its_work_can_go_on(
    tmp_path: Path, make_texts: MakeTexts, small_shards: None
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw / "a.jsonl", make_texts(6000))
    done = threading.Event()

    def kill_a_worker() -> None:
        while not done.wait(0.02):
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    return

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    try:
        with pytest.raises(RunError, match="worker process died"):
            run(raw, out, workers=2)
    finally:
        done.set()
        killer.join()
    (report,) = run(raw, out)
    (fresh,) = run(raw, tmp_path / "fresh")
    assert report.manifest == fresh.manifest


def test_two_runs_do_not_write_the_same_file(tmp_path: Path) -> None:
    from minillm.files import folder_lock

    write(tmp_path / "a.jsonl", ["one"])
    with (
        folder_lock(tmp_path / "a.bin.work"),
        pytest.raises(RunError, match="another process"),
    ):
        run(tmp_path / "a.jsonl", tmp_path)


def test_a_file_without_text_is_skipped_unless_it_is_all_there_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw / "a.jsonl", ["", " "])
    with pytest.raises(InputError, match="no document with any text"):
        run(raw, out)
    write(raw / "b.jsonl", ["text"])
    caplog.clear()
    (report,) = run(raw, out)
    assert report.path.name == "b.bin"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert names(out) == ["b.bin", "b.bin.json"]


def test_without_documents_the_hint_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="data/raw") as caught:
        tokenize(TokenizeConfig())
    assert "minillm tokenize --data bundled" in str(caught.value.hint)
    assert not paths.TOKENS.exists()


def test_all_workers_start_with_the_first_task(bundled: PreTrainedTokenizerFast) -> None:
    # a late one may die unwatched, or outlive a broken pool, which would then wait for ever
    with worker_pool(3, EncoderPlan(plain_json(bundled), is_fast=False)) as pool:
        assert pool is not None
        pool.submit(time.sleep, 0)
        assert len(multiprocessing.active_children()) == 3
