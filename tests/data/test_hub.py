"""Downloads against a hub that fails in the ways hubs and networks do: right bytes, or an error."""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from minillm.data import web
from minillm.data.catalog import find_sets
from minillm.data.download import download, plan
from minillm.data.fetch import CHUNK_BYTES, fetch
from minillm.data.hub import check_relative, endpoint, list_files
from minillm.data.meter import FileMeter, Meter
from minillm.data.web import TIMEOUT_S, TRIES, StoppedError, Web, asked_wait_s
from minillm.errors import ConfigError, InputError, MinillmError, RunError, SetupError
from minillm.files import folder_lock
from minillm.log import Silent
from minillm.settings import DownloadConfig
from tests.data.loopback_hub import Fault, LoopbackHub, make_zip, running_hub

MINE = "wangkunqing/mini_llm_dataset"
DEEPCTRL = "deepctrl/deepctrl-sft-data"
FINEWEB = "opencsg/Fineweb-Edu-Chinese-V2.1"
TOKENIZER = "WKQ9411/Mini-Qwen3-Next-160M-A100M-SFT"
JSONL = "sft_data_zh.jsonl"
BIG = random.Random(0).randbytes(5 * CHUNK_BYTES + 123)
PARQUET = {f"4_5/{i:04d}.parquet": random.Random(i).randbytes(1000 + i) for i in range(8)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with running_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(web, "FIRST_WAIT_S", 0.001)
        hub.repos[FINEWEB] = {**PARQUET, "README.md": b"#", "2_3/0.parquet": b"low score"}
        hub.repos[MINE] = {
            "grpo_data.zip": make_zip({"a/train.parquet": b"t" * 5000, "b.parquet": b"v" * 50}),
        }
        hub.repos[DEEPCTRL] = {JSONL: BIG}
        hub.repos[TOKENIZER] = {"tokenizer.json": b"{}" * 99, "model.safetensors": b"w" * 9999}
        hub.small.add("tokenizer.json")
        yield hub


@pytest.fixture
def get(tmp_path: Path) -> Any:
    def run(*sets: str, **knobs: Any) -> Any:
        config = DownloadConfig(sets=sets, out=tmp_path / "data", **knobs)
        return SimpleNamespace(reports=download(config, Silent()), out=config.out)

    return run


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".downloads" not in path.parts
    }


@pytest.mark.parametrize("name", ["modelscope", "huggingface"])
def test_both_hubs_give_the_files_of_the_set_and_no_other(
    hub: LoopbackHub, get: Any, name: str
) -> None:
    done = get("fineweb-edu-zh", hub=name)
    assert files_below(done.out / "raw/fineweb-edu-zh") == PARQUET
    assert done.reports[0].num_files == 8
    assert done.reports[0].fetched_bytes == sum(map(len, PARQUET.values()))


@pytest.mark.parametrize("name", ["modelscope", "huggingface"])
def test_a_second_run_fetches_nothing(hub: LoopbackHub, get: Any, name: str) -> None:
    get("2", hub=name)
    hub.forget()
    done = get("2", hub=name)
    assert (hub.sent_bytes, done.reports[0].fetched_bytes) == (0, 0)


def test_modelscope_listings_of_many_pages_are_read_to_the_end(
    hub: LoopbackHub, get: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.data.hub.PAGE_SIZE", 4)  # 8 files: the last page is empty
    assert files_below(get("2", hub="modelscope").out / "raw/fineweb-edu-zh") == PARQUET


def test_a_token_goes_to_the_hub_but_not_to_its_cdn(hub: LoopbackHub, get: Any) -> None:
    get("tokenizer")
    sent = {r.path.split("/")[1]: r.authorization for r in hub.requests}
    assert sent == {
        "api": "Bearer hf_secret",
        "cdn": "",
        TOKENIZER.split("/")[0]: "Bearer hf_secret",
    }


def test_a_cut_body_is_continued_where_it_stopped(hub: LoopbackHub, get: Any) -> None:
    hub.faults[JSONL] = [Fault("cut", at=3 * CHUNK_BYTES)]
    done = get("6")
    assert (done.out / "dialogues" / JSONL).read_bytes() == BIG
    first, second = (r for r in hub.bodies() if "FilePath" in r.path)
    assert (first.range, second.range) == ("", f"bytes={3 * CHUNK_BYTES}-")


def test_a_part_left_by_a_killed_run_is_continued(
    hub: LoopbackHub, get: Any, tmp_path: Path
) -> None:
    part = tmp_path / "data/.downloads/deepctrl-jsonl/parts" / f"{JSONL}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BIG[:100_000])
    done = get("6")
    assert (done.out / "dialogues" / JSONL).read_bytes() == BIG
    assert done.reports[0].fetched_bytes == len(BIG) - 100_000
    assert [r.range for r in hub.bodies() if "FilePath" in r.path] == ["bytes=100000-"]
    assert not part.parent.exists()


@pytest.mark.parametrize("part", [b"other bytes" * 1000, BIG + b"longer", BIG[:-1] + b"\0"])
def test_a_part_that_is_not_of_this_file_is_thrown_away(
    hub: LoopbackHub, get: Any, tmp_path: Path, part: bytes
) -> None:
    path = tmp_path / "data/.downloads/deepctrl-jsonl/parts" / f"{JSONL}.part"
    path.parent.mkdir(parents=True)
    path.write_bytes(part)
    assert (get("6").out / "dialogues" / JSONL).read_bytes() == BIG


def test_a_server_that_ignores_ranges_costs_the_whole_file_but_not_its_truth(
    hub: LoopbackHub, get: Any
) -> None:
    hub.faults[JSONL] = [Fault("cut", at=CHUNK_BYTES), Fault("ignore_range")]
    assert (get("6").out / "dialogues" / JSONL).read_bytes() == BIG


@pytest.mark.parametrize(("kind", "at"), [("cut", 0), ("cut_whole", 2 * CHUNK_BYTES)])
def test_a_server_that_never_gets_farther_is_given_up(
    hub: LoopbackHub, get: Any, kind: str, at: int
) -> None:
    hub.faults[JSONL] = [Fault(kind, times=99, at=at)]
    with pytest.raises(RunError, match=f"{TRIES} times in a row"):
        get("6")


def test_wrong_bytes_once_are_fetched_again(hub: LoopbackHub, get: Any) -> None:
    hub.faults[JSONL] = [Fault("flip", at=70_000)]
    assert (get("6").out / "dialogues" / JSONL).read_bytes() == BIG


@pytest.mark.parametrize(
    ("sets", "path"), [("6", JSONL), ("tokenizer", "tokenizer.json"), ("11", "grpo_data.zip")]
)
def test_wrong_bytes_are_never_accepted(
    hub: LoopbackHub, get: Any, tmp_path: Path, sets: str, path: str
) -> None:
    hub.faults[path] = [Fault("flip", times=99, at=50)]
    with pytest.raises(RunError, match="its listing says") as caught:
        get(sets)
    assert hub.url in str(caught.value)
    left = [file.name for file in (tmp_path / "data").rglob("*") if path in file.name]
    assert left == []


def test_a_login_page_instead_of_the_file_does_not_cost_the_part(
    hub: LoopbackHub, get: Any
) -> None:
    hub.faults[JSONL] = [Fault("cut", at=2 * CHUNK_BYTES), Fault("html")]
    get("6")
    ranges = [r.range for r in hub.bodies() if "FilePath" in r.path]
    assert ranges == ["", *[f"bytes={2 * CHUNK_BYTES}-"] * 2]


@pytest.mark.parametrize("path", [JSONL, "listing"])
@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_hub_is_asked_again(hub: LoopbackHub, get: Any, path: str, status: int) -> None:
    hub.faults[path] = [Fault("status", times=2, status=status)]
    assert (get("6").out / "dialogues" / JSONL).read_bytes() == BIG


def test_retry_after_is_waited_for(hub: LoopbackHub, get: Any) -> None:
    hub.faults[JSONL] = [Fault("status", status=429, headers={"Retry-After": "1"})]
    start = time.monotonic()
    get("6")
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "17"}, 17),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({}, None),
    ],
)
def test_the_wait_that_a_hub_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait_s(headers) == seconds


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_final_no_is_not_repeated(hub: LoopbackHub, get: Any, status: int) -> None:
    hub.faults["listing"] = [Fault("status", times=99, status=status)]
    with pytest.raises(MinillmError, match=f"HTTP {status}"):
        get("11")
    assert len(hub.requests) == 1


def test_a_listing_that_is_a_login_page_is_named(hub: LoopbackHub, get: Any) -> None:
    hub.faults["listing"] = [Fault("html", times=99)]
    with pytest.raises(RunError, match="not JSON"):
        get("11")


def test_a_hub_that_is_down_is_named(
    get: Any, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"no connection from `http://127\.0\.0\.1:9/api/v1"):
        get("11")


def test_auto_takes_the_hub_that_answers(
    get: Any, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert files_below(get("2").out / "raw/fineweb-edu-zh") == PARQUET
    assert "trying the next hub" in caplog.text


def test_a_complete_set_is_found_without_a_hub(
    get: Any, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    get("11")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        assert get("11").reports[0].fetched_bytes == 0
    assert "is complete and verified" in caplog.text


def test_a_set_is_looked_for_only_where_it_is(get: Any, hub: LoopbackHub) -> None:
    with pytest.raises(ConfigError, match="not on Hugging Face") as caught:
        get("11", hub="huggingface")
    assert "--hub modelscope" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["modelscope", "huggingface"])
@pytest.mark.parametrize("evil", ["4_5/../../../evil.parquet", "4_5/..\\evil.parquet"])
def test_a_listed_path_never_leaves_the_folder(
    hub: LoopbackHub, get: Any, tmp_path: Path, name: str, evil: str
) -> None:
    hub.repos[FINEWEB][evil] = b"evil"
    with pytest.raises(RunError, match="would leave the target folder"):
        get("2", hub=name)
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize("path", ["/etc/passwd", "", "a/../b", "C:/x", "a\0b"])
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(RunError):
        check_relative(path)


def test_a_link_inside_the_folder_is_not_followed_out(
    hub: LoopbackHub, get: Any, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "data/raw/fineweb-edu-zh"
    folder.mkdir(parents=True)
    (folder / "4_5").symlink_to(outside)
    with pytest.raises(RunError, match="leads out of"):
        get("2")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_file_damaged_later_is_noticed_kept_aside_and_fetched_again(
    hub: LoopbackHub, get: Any, damage: str
) -> None:
    target = get("6").out / "dialogues" / JSONL
    bad = BIG[:1000] if damage == "cut" else b"\0" + BIG[1:]
    target.write_bytes(bad)
    done = get("6")
    assert target.read_bytes() == BIG
    assert (done.out / ".downloads/deepctrl-jsonl/replaced" / JSONL).read_bytes() == bad


def test_a_zip_is_unpacked_and_not_kept(hub: LoopbackHub, get: Any) -> None:
    done = get("11")
    members = {"a/train.parquet": b"t" * 5000, "b.parquet": b"v" * 50}
    assert files_below(done.out / "grpo") == members
    assert list(done.out.rglob("*.zip")) == []
    hub.forget()
    assert get("11").reports[0].num_files == 2
    assert hub.sent_bytes == 0


def test_a_damaged_member_brings_the_whole_zip_again(hub: LoopbackHub, get: Any) -> None:
    done = get("11")
    (done.out / "grpo/b.parquet").write_bytes(b"x" * 50)
    get("11")
    assert (done.out / "grpo/b.parquet").read_bytes() == b"v" * 50


def test_a_zip_does_not_replace_a_folder_with_files_of_the_users(
    hub: LoopbackHub, get: Any, tmp_path: Path
) -> None:
    own = tmp_path / "data/grpo/notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        get("11")
    assert own.read_text() == "mine"


def test_a_bad_zip_leaves_nothing(hub: LoopbackHub, get: Any, tmp_path: Path) -> None:
    hub.repos[MINE]["grpo_data.zip"] = make_zip({"ok": b"1", "../evil": b"2"})
    with pytest.raises(RunError, match="would leave the target folder"):
        get("11")
    assert files_below(tmp_path) == {}


def test_two_downloads_of_one_set_do_not_mix(hub: LoopbackHub, get: Any, tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path / "data/.downloads/grpo"),
        pytest.raises(RunError, match="another process"),
    ):
        get("11")


def test_a_file_of_the_users_own_is_never_overwritten(
    hub: LoopbackHub, get: Any, tmp_path: Path
) -> None:
    own = tmp_path / "data/tokenizer/tokenizer.json"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(InputError, match="is not the file of set `tokenizer`"):
        get("9")
    assert own.read_text() == "mine"


def test_a_right_file_that_was_brought_by_other_means_is_taken(
    hub: LoopbackHub, get: Any, tmp_path: Path
) -> None:
    own = tmp_path / "data/dialogues" / JSONL
    own.parent.mkdir(parents=True)
    own.write_bytes(BIG)
    assert get("6").reports[0].fetched_bytes == 0


def test_a_change_whose_time_was_set_back_is_noticed(hub: LoopbackHub, get: Any) -> None:
    target = get("6").out / "dialogues" / JSONL
    stat = target.stat()
    target.write_bytes(b"\0" + BIG[1:])
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert get("6").reports[0].fetched_bytes == len(BIG)
    assert target.read_bytes() == BIG


def test_verify_notices_what_a_disk_lost_by_itself(hub: LoopbackHub, get: Any) -> None:
    done = get("6")
    target, ledger = done.out / "dialogues" / JSONL, done.out / ".downloads/deepctrl-jsonl"
    target.write_bytes(b"\0" + BIG[1:])
    line = json.loads((ledger / "verified.jsonl").read_text())
    stat = target.stat()  # as if the file system had not noticed
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    (ledger / "verified.jsonl").write_text(json.dumps({**line, **times}))
    assert get("6").reports[0].fetched_bytes == 0
    assert get("6", verify=True).reports[0].fetched_bytes == len(BIG)
    assert target.read_bytes() == BIG


@pytest.mark.parametrize(("free", "is_enough"), [(1.05, False), (1.15, True)])
def test_a_disk_needs_a_tenth_more_than_the_files(
    hub: LoopbackHub, get: Any, monkeypatch: pytest.MonkeyPatch, free: float, is_enough: bool
) -> None:
    space = SimpleNamespace(free=int(free * len(BIG)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: space)
    if is_enough:
        get("6")
        return
    with pytest.raises(SetupError, match="the download"):
        get("6")
    assert hub.bodies() == []


def test_a_plan_writes_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    config = DownloadConfig(sets=("6", "tokenizer"), out=tmp_path / "data")
    plans = plan(config, Silent())
    assert [item.fetch_bytes for item in plans] == [len(BIG), 198]
    assert list(tmp_path.iterdir()) == []


def test_the_next_step_names_a_file_that_is_there(hub: LoopbackHub, get: Any) -> None:
    command = get("6").reports[0].next_step
    assert command.startswith("minillm prepare-sft --data ")
    assert Path(command.split()[-1]).is_file()


def test_a_model_is_fetched_by_its_id_without_code_and_pickles(hub: LoopbackHub, get: Any) -> None:
    weights, config = b"w" * 9999, b'{"model_type": "mini_llama3"}'
    hub.repos["WKQ9411/Mini-Llama3-100M-Base"] = {
        "config.json": config,
        "model.safetensors": weights,
        "pytorch_model.bin": b"a pickle",
        "modeling.py": b"code",
    }
    done = get("WKQ9411/Mini-Llama3-100M-Base")
    assert files_below(done.out) == {
        "models/Mini-Llama3-100M-Base/config.json": config,
        "models/Mini-Llama3-100M-Base/model.safetensors": weights,
    }
    assert done.reports[0].next_step == f"minillm chat {done.reports[0].folder}"


def test_another_process_gets_the_tokenizer_while_the_set_is_fetched(
    hub: LoopbackHub, get: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults[JSONL] = [Fault("stall", at=CHUNK_BYTES)]
    first = threading.Thread(target=lambda: get("tokenizer", "6"))
    first.start()
    part = tmp_path / "data/.downloads/deepctrl-jsonl/parts" / f"{JSONL}.part"
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    assert get("tokenizer").reports[0].fetched_bytes == 0
    with pytest.raises(RunError, match="another process"):
        get("6")
    hub.released.set()
    first.join(30)
    assert (tmp_path / "data/dialogues" / JSONL).read_bytes() == BIG


@pytest.mark.parametrize("name", ["modelscope", "huggingface"])
def test_a_proxy_is_used(
    hub: LoopbackHub, get: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://modelscope.invalid")
    monkeypatch.setenv("HF_ENDPOINT", "http://huggingface.invalid")
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    assert files_below(get("2", hub=name).out / "raw/fineweb-edu-zh") == PARQUET
    assert hub.requests[0].path.startswith(f"http://{name}.invalid/api/")


def test_modelscope_gets_its_own_token_and_no_other(
    hub: LoopbackHub, get: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    get("6")
    sent = {(request.authorization, request.cookie) for request in hub.requests}
    assert sent == {("Bearer ms_secret", "m_session_id=ms_secret")}
    hub.forget()
    get("tokenizer")
    assert not any("ms_secret" in r.authorization + r.cookie for r in hub.requests)


@pytest.mark.parametrize(
    ("variable", "value", "address"),
    [
        ("MODELSCOPE_ENDPOINT", "hub.example/", "https://hub.example"),
        ("MODELSCOPE_DOMAIN", "www.modelscope.ai", "https://www.modelscope.ai"),
        ("HF_ENDPOINT", "http://mirror.example", "http://mirror.example"),
        ("HF_ENDPOINT", "", "https://huggingface.co"),
    ],
)
def test_endpoints(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, address: str
) -> None:
    for name in ("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert endpoint("huggingface" if variable.startswith("HF") else "modelscope") == address


def test_a_later_page_that_is_forbidden_once_is_asked_again(
    hub: LoopbackHub, get: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.data.hub.PAGE_SIZE", 4)
    hub.faults["listing"] = [Fault("none"), Fault("status", status=403)]
    assert files_below(get("2", hub="modelscope").out / "raw/fineweb-edu-zh") == PARQUET


def test_a_listing_without_end_is_named(
    hub: LoopbackHub, get: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.data.hub.PAGE_SIZE", 4)
    hub.repeats_pages = True
    with pytest.raises(RunError, match="the same page"):
        get("2", hub="modelscope")


def test_our_listing_is_that_of_the_official_client(hub: LoopbackHub) -> None:
    place = find_sets(["2"])[0].places[1]
    official = HfApi(endpoint=hub.url, token=False).list_repo_tree(
        place.repo, repo_type="dataset", path_in_repo="4_5", recursive=True
    )
    theirs = [(file.path, file.size, f"sha256:{file.lfs.sha256}") for file in official]
    ours = [
        (file.path, file.size_bytes, file.digest) for file in list_files(place, Web(), Silent())
    ]
    assert ours == theirs
    assert len(ours) == len(PARQUET)


def test_halt_ends_a_transfer_that_waits_for_a_silent_server(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.faults[JSONL] = [Fault("stall", at=2 * CHUNK_BYTES)]
    halted = Web()
    place = find_sets(["6"])[0].places[0]
    [remote] = list_files(place, halted, Silent())
    part, ended = tmp_path / "part", []

    def run() -> None:
        try:
            fetch(halted, remote, part, tmp_path / "target", {}, FileMeter(Meter(Silent()), None))
        except StoppedError:
            ended.append("stopped")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not (part.exists() and part.stat().st_size == 2 * CHUNK_BYTES):
        time.sleep(0.01)
    halted.halt()
    thread.join(TIMEOUT_S[1] / 2)  # without it, the thread waits for the whole time-out
    assert ended == ["stopped"]
    assert part.stat().st_size == 2 * CHUNK_BYTES
