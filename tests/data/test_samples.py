"""What is in the package: size, licences, and nothing that contradicts who the model is."""

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from minillm import paths
from minillm.data.dialogues import read_file

SAMPLES = paths.BUNDLED_DIALOGUES.parent
CORPUS = paths.BUNDLED_CORPUS / "corpus.parquet"
ROWS = pq.read_table(CORPUS).to_pylist()
DIALOGUES = list(read_file(paths.BUNDLED_DIALOGUES))
ATTRIBUTION = (SAMPLES / "LICENSES" / "ATTRIBUTION.md").read_text("utf-8")
OTHERS = re.compile(
    r"chatgpt|openai|gpt-?\d|claude|gemini|deepseek|kimi|siri|copilot|豆包|文心|通义|小冰|小爱|"
    r"doorcore|知识库|我是.{0,12}(?:模型|助手|机器人)|\bI am (?:a|an) ",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """Without case, spaces and punctuation."""
    return re.sub(r"[\W_]", "", text.lower())


def test_corpus_is_small_enough_to_bundle_and_large_enough_to_train_on() -> None:
    size = sum(len(row["text"].encode()) for row in ROWS)
    assert 12e6 < size < 16e6
    assert CORPUS.stat().st_size < 5.5e6
    assert paths.BUNDLED_DIALOGUES.stat().st_size < 1.2e6


def test_corpus_is_mostly_chinese_prose_with_some_english() -> None:
    sizes: Counter[str] = Counter()
    for row in ROWS:
        sizes[row["source"]] += len(row["text"].encode())
    total = sum(sizes.values())
    assert 0.20 < sizes["austen"] / total < 0.27
    assert sum(sizes[name] for name in sizes if name.startswith("poem")) / total < 0.12


def test_documents_are_short_distinct_and_mixed() -> None:
    texts = [row["text"] for row in ROWS]
    assert len(set(texts)) == len(texts)
    assert max(len(text) for text in texts if "\n\n" not in text) <= 2000
    assert len({row["source"] for row in ROWS[:60]}) >= 5


def test_corpus_has_no_odd_characters() -> None:
    odd = re.compile(r"[^\n -~一-鿿，。：；、？！“”‘’（）《》〈〉·…—％℃×÷]")
    found = Counter(char for row in ROWS for char in odd.findall(row["text"]))
    assert not found


@pytest.mark.parametrize(
    "source", sorted({r["source"] for r in ROWS} | {d.source for d in DIALOGUES})
)
def test_every_source_has_its_row_in_the_attribution(source: str) -> None:
    assert f"`{source}`" in ATTRIBUTION


def test_attribution_tells_the_size_of_each_part_of_the_corpus() -> None:
    counts = Counter(row["source"] for row in ROWS)
    for source, count in counts.items():
        assert re.search(rf"`{source}`[^\n]*\| {count:,} documents", ATTRIBUTION), source


def test_attribution_tells_the_number_of_dialogues_of_each_source() -> None:
    for source, count in Counter(dialogue.source for dialogue in DIALOGUES).items():
        assert re.search(rf"`{source}`[^\n]*\| {count:,} \|", ATTRIBUTION), source


def test_dialogues_never_speak_for_another_assistant() -> None:
    for dialogue in DIALOGUES:
        for message in dialogue.messages:
            if message["role"] == "assistant":
                assert not OTHERS.search(message["content"]), message


def test_dialogues_are_short() -> None:
    answers = [m["content"] for d in DIALOGUES for m in d.messages if m["role"] == "assistant"]
    assert 4000 < len(DIALOGUES) < 6000
    assert sum(map(len, answers)) / len(answers) < 60
    assert max(map(len, answers)) < 160


def test_everyday_questions_come_in_several_wordings() -> None:
    wordings: dict[str, set[str]] = {}
    for dialogue in DIALOGUES:
        if dialogue.source == "everyday":
            ask, answer = (message["content"] for message in dialogue.messages[-2:])
            wordings.setdefault(answer, set()).add(plain(ask))
    counts = sorted(map(len, wordings.values()))
    assert len(counts) >= 400
    assert counts[len(counts) // 2] >= 3


def test_one_opening_question_has_one_answer() -> None:
    answers: dict[str, set[str]] = {}
    for dialogue in DIALOGUES:
        turns = [m["content"] for m in dialogue.messages if m["role"] != "system"]
        if re.search(r"\d[+×-]\d", turns[0]) is None:  # a sum is nothing but its signs
            answers.setdefault(plain(turns[0]), set()).add(turns[1])
    assert {ask: found for ask, found in answers.items() if len(found) > 1} == {}


def test_held_out_identity_questions_are_in_no_dialogue() -> None:
    held_out = json.loads(Path(__file__).with_name("identity_heldout.json").read_text("utf-8"))
    asked = {plain(m["content"]) for d in DIALOGUES for m in d.messages if m["role"] == "user"}
    assert not asked & {plain(text) for texts in held_out.values() for text in texts}
