"""Make the bundled samples: `minillm/data/samples/corpus/corpus.parquet` and `dialogues.jsonl`.

    python tools/make_samples.py SOURCE_FOLDER

SOURCE_FOLDER holds `corpus-free.parquet` (columns text, source) and `dialogues-free.parquet`
(columns messages, source), the texts listed in `minillm/data/samples/ATTRIBUTION.md`. The result
depends on those files, on `tools/everyday/*.txt` (how to read them: tools/everyday.py) and on
nothing else.

A demonstration model of a few million parameters has room for few characters and little verse, so
the corpus is mostly modern prose in common characters, in short pieces that shuffle well.
"""

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from everyday import Dialogue, everyday_dialogues, plain

SAMPLES = Path(__file__).parents[1] / "minillm" / "data" / "samples"
SEED = 20240607

MAX_CHARS = 2000
"""Longest piece of the corpus, in characters."""

BUDGET_MB = {
    "law": 4.4,
    "austen": 3.4,
    "idiom": 2.0,
    "sanguo": 1.8,
    "dict": 1.7,
    "poem_tang": 0.7,
    "poem_song": 0.25,
    "poem_ci": 0.2,
}
"""Megabytes of UTF-8 text to keep of each source."""

COMMON = {"law": 5000, "sanguo": 6000, "idiom": 3000, "dict": 3000, "poem_ci": 3200}
"""Keep lines written in the N commonest characters (counted over law, dict, sanguo, idiom)."""
COMMON_DEFAULT = 2800

DIALOGUES = {"doorcore": 300, "idiom": 200, "poem": 80, "xiehouyu": 100, "law": 50}
"""How many question-answer pairs to keep of each source."""

GENERAL = (
    (46, 258),
    (336, 343),
    (419, 516),
    (1384, 1470),
    (1600, 1850),
    (2124, 2290),
    (2855, 3190),
)
"""Stretches of `doorcore` about everyday life and the world; the rest is software vocabulary."""

UNWANTED = re.compile(
    r"[A-Za-z]|补充|[你我您]|尸|鬼|党|药|治|屠杀|艾滋|香港|澳门|台湾|毒品|性病|大模型|豆包|机器人"
)
RUDE = re.compile(
    r"[屁尿屎妓嫖娼奸瞎聋哑瘸麻秃尼僧鬼死尸婆媳寡娘妇妻妾裤奶胎傻贼棺坟骂打杀]|和尚|太监|道士|跳井|上吊|舍命"
)
"""Never in what the model says: themes to leave out, and the coarse side of folk sayings."""

POETS = re.compile(
    "请背诵(李白|杜甫|白居易|王维|孟浩然|王昌龄|刘禹锡|杜牧|李商隐|王之涣|柳宗元|岑参|韦应物|张九龄|"
    "贺知章|孟郊|韩愈|贾岛|刘长卿|高适)的"
)

MAX_ANSWER = {"doorcore": 48, "idiom": 40, "poem": 36, "xiehouyu": 12, "law": 60}
"""Longest answer of each source, in characters."""

PUNCTUATION = set("，。：；、？！“”‘’（）《》〈〉·…—％℃\n ")


def read_texts(path: Path) -> dict[str, list[str]]:
    """Return the texts of each source, in file order, without exact duplicates."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for row in pq.read_table(path).to_pylist():
        found[row["source"]].setdefault(clean(row["text"], row["source"]))
    return {source: list(texts) for source, texts in found.items()}


def clean(text: str, source: str) -> str:
    """Mend the marks that the sources left behind."""
    text = text.replace("\u3000", " ").replace("﹑", "、").replace("﹐", "，").replace("﹔", "；")
    if source == "idiom":  # examples abbreviate the idiom itself; opening quotes were lost
        text = re.sub(r" 例句：.*", "", text).replace("”", "").replace("“", "")
        text = re.sub(r"([。！？）])? 出处：", lambda m: f"{m[1] or '。'}出自：", text)
    if source == "dict":
        text = re.sub(r"：1\.([^2]*)$", r"：\1", text, flags=re.M).replace("｜", "；")
    if source == "austen":
        text = re.sub(r"_([^_]+)_", r"\1", text)
    return text.strip()


def common_characters(texts: dict[str, list[str]]) -> list[str]:
    """Return the Chinese characters of the prose sources, commonest first."""
    counts = Counter(
        char
        for source in ("law", "dict", "sanguo", "idiom")
        for text in texts[source]
        for char in text
    )
    return [char for char, _ in counts.most_common() if "一" <= char <= "鿿"]


def pieces(text: str, source: str, allowed: set[str]) -> Iterator[str]:
    """Cut a document into pieces of at most MAX_CHARS, at line ends, else at sentence ends.

    Lines with other characters are left out; of a poem, which makes no sense without a line, the
    whole.
    """
    lines = text.split("\n")
    if source.startswith("poem"):
        if len(text) <= MAX_CHARS and set(text) <= allowed:
            yield text
        return
    piece = ""
    for line in lines:
        if not set(line) <= allowed or "{" in line:
            continue
        for part in sentences(line):
            joined = f"{piece}{part}" if part is not line else f"{piece}\n{part}"
            if len(joined) > MAX_CHARS and piece:
                yield piece.strip()
                piece = part
            else:
                piece = joined
    if piece.strip():
        yield piece.strip()


def sentences(line: str) -> list[str]:
    """Return the line, or its sentences when it is longer than a piece."""
    if len(line) <= MAX_CHARS:
        return [line]
    return re.findall(r".+?(?:[。！？]”?|[.!?]\"?\s|$)", line)


def make_corpus(texts: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return (text, source) pieces within the budget of each source."""
    ranked = common_characters(texts)
    rng = random.Random(SEED)
    ascii_ = {chr(code) for code in range(32, 127)} - set("{}<>[]|\\^`~*_")
    rows: list[tuple[str, str]] = []
    for source, budget in BUDGET_MB.items():
        allowed = set(ranked[: COMMON.get(source, COMMON_DEFAULT)]) | PUNCTUATION | ascii_
        found = dict.fromkeys(p for text in texts[source] for p in pieces(text, source, allowed))
        chosen = [piece for piece in found if len(piece) >= 16]
        rng.shuffle(chosen)
        size = 0.0
        for piece in chosen:
            if size >= budget * 1e6:
                break
            size += len(piece.encode())
            rows.append((piece, source))
    return rows


def chat_texts(dialogues: list[Dialogue]) -> list[tuple[str, str]]:
    """Return the dialogues as plain text, a dozen a document.

    The rest of the corpus is law, novels and verse: these few documents teach the tokenizer and
    the model the words of everyday talk.
    """
    texts = [
        "\n".join(m["content"] for m in dialogue["messages"] if m["role"] != "system")
        for dialogue in dialogues
        if dialogue["source"] in ("everyday", "doorcore")
    ]
    is_english = [text.isascii() for text in texts]
    groups = [[t for t, en in zip(texts, is_english, strict=True) if en == want] for want in (0, 1)]
    return [
        ("\n\n".join(group[i : i + 12]), "chat")
        for group in groups
        for i in range(0, len(group), 12)
    ]


def write_corpus(rows: list[tuple[str, str]], path: Path) -> None:
    """Write the corpus as one strongly compressed parquet, and print what it holds."""
    table = pa.table({"text": [t for t, _ in rows], "source": [s for _, s in rows]})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=["source"],
        data_page_size=1 << 26,
        write_statistics=False,
    )
    sizes: Counter[str] = Counter()
    for text, source in rows:
        sizes[source] += len(text.encode())
    for source, size in sizes.most_common():
        documents = sum(s == source for _, s in rows)
        print(f"{source:10} {documents:6} documents {size / 1e6:6.2f} MB")
    total, disk = sum(sizes.values()) / 1e6, path.stat().st_size / 1e6
    print(f"{total:.2f} MB of text, {disk:.2f} MB on disk")


def read_pairs(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the (question, answer) pairs of each source, in file order."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        question, answer = (message["content"] for message in row["messages"])
        found[row["source"]].append((question, answer))
    return found


def usable(source: str, index: int, question: str, answer: str, allowed: set[str]) -> bool:
    """Tell whether a pair is short, plain, and fit for a demonstration."""
    if len(answer) > MAX_ANSWER[source] or not set(question + answer) <= allowed:
        return False
    if source == "doorcore":
        inside = any(low <= index < high for low, high in GENERAL)
        return inside and len(answer) >= 12 and not UNWANTED.search(question + answer)
    if RUDE.search(question + answer):
        return False
    if source == "idiom":  # no glosses of single characters, no mere references
        return len(answer) >= 6 and not re.search(r"[①②◇；]|亦作|犹|同.{4,}[”。]$|^(.)\1", answer)
    return source != "poem" or bool(POETS.match(question))


def reword(source: str, question: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """Give the questions, all alike in their source, a few wordings; shorten the answers."""
    name = re.search(r"[“《](.+)[”》]", question)
    if source == "idiom" and name:
        forms = ("成语“{}”是什么意思？", "“{}”是什么意思？", "{}是什么意思？", "解释一下{}。")
        return rng.choice(forms).format(name[1]), answer.split("\n")[0]
    if source == "xiehouyu" and name:
        return question, f"{name[1]}——{answer}。"
    return question, answer.strip() + ("" if answer.strip()[-1] in "。！？" else "。")


def make_dialogues(pairs: dict[str, list[tuple[str, str]]], allowed: set[str]) -> list[Dialogue]:
    """Return the everyday dialogues and the chosen pairs, shuffled."""
    rng = random.Random(SEED)
    dialogues = everyday_dialogues(rng)
    taken = {plain(message["content"]) for d in dialogues for message in d["messages"]}
    for source, count in DIALOGUES.items():
        found = []
        for index, (question, answer) in enumerate(pairs[source]):
            question, answer = reword(source, question, clean(answer, source), rng)
            new = plain(question) not in taken
            if new and usable(source, index, question, answer, allowed):
                taken.add(plain(question))
                found.append((question, answer))
        for question, answer in rng.sample(found, min(count, len(found))):
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            dialogues.append({"messages": messages, "source": source})
    rng.shuffle(dialogues)
    return dialogues


def write_dialogues(dialogues: list[Dialogue], path: Path) -> None:
    """Write one dialogue a line, and print what there is."""
    lines = [json.dumps(d, ensure_ascii=False, separators=(",", ":")) + "\n" for d in dialogues]
    path.write_text("".join(lines), encoding="utf-8")
    counts = Counter(dialogue["source"] for dialogue in dialogues)
    for source, count in counts.most_common():
        print(f"{source:10} {count:6} dialogues")
    print(f"{len(dialogues)} dialogues, {path.stat().st_size / 1e6:.2f} MB on disk")


def main() -> None:
    """Read the arguments and write both samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="folder of corpus-free.parquet and dialogues-free.parquet"
    )
    folder = parser.parse_args().folder
    texts = read_texts(folder / "corpus-free.parquet")
    allowed = set(common_characters(texts)[:3500]) | PUNCTUATION | {chr(c) for c in range(32, 127)}
    pairs = read_pairs(folder / "dialogues-free.parquet")
    dialogues = make_dialogues(pairs, allowed)
    write_dialogues(dialogues, SAMPLES / "dialogues.jsonl")
    rows = make_corpus(texts) + chat_texts(dialogues)
    random.Random(SEED).shuffle(rows)
    write_corpus(rows, SAMPLES / "corpus" / "corpus.parquet")


if __name__ == "__main__":
    main()
