import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from minillm.data.binfile import TokenFile
from minillm.data.documents import read_file
from minillm.data.recipes import PUBLISHED, parse_template
from minillm.data.tokenize import tokenize
from minillm.errors import ConfigError, InputError
from minillm.settings import TokenizeConfig

DIALOGUES = [
    {"instruction": " 翻译：\n", "input": "你好", "output": "hello ", "history": [["a", "b"]]},
    {"instruction": "写一首诗", "input": "", "output": "春眠不觉晓"},
    {"instruction": "只有问题", "output": None},
    {"instruction": " ", "input": None, "output": ""},
]
JOINED = ["翻译：你好hello", "写一首诗春眠不觉晓", "只有问题"]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row if name != "history")
        columns = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
        pq.write_table(pa.table(columns), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(file: Path, recipe) -> list[str]:
    return [text for batch in read_file(file, recipe) for text in batch.texts]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_deepctrl_joins_what_there_is_without_anything_between(tmp_path: Path, name: str) -> None:
    assert texts(write(tmp_path / name, DIALOGUES), PUBLISHED["deepctrl"]) == JOINED


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_template_puts_columns_between_words(tmp_path: Path, name: str) -> None:
    recipe = parse_template(r"问：{instruction}\n答：{output}\\{{}}")
    file = write(tmp_path / name, [*DIALOGUES[1:2], {"instruction": " ", "output": None}])
    assert texts(file, recipe) == ["问：写一首诗\n答：春眠不觉晓\\{}"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_column_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, [{"question": "a", "answer": "b"}])
    with pytest.raises(InputError, match="no `reply`, only `question`, `answer`"):
        texts(file, parse_template("{question} {reply}"))
    with pytest.raises(InputError, match="no `instruction`, only `question`, `answer`"):
        texts(file, PUBLISHED["deepctrl"])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("text", "names no column"),
        ("{", "single '{'"),
        ("a } b", "single '}'"),
        ("{}", "a name in braces"),
        ("{text!r}", "a name in braces"),
        ("{text:>5}", "a name in braces"),
    ],
)
def test_a_template_that_is_none_is_a_config_error(template: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        parse_template(template)
    assert "--template" in str(caught.value.hint)


def test_only_one_setting_says_what_a_document_is() -> None:
    for settings in ({"text_column": "a"}, {"recipe": "deepctrl"}):
        with pytest.raises(ConfigError, match="each say what a document is"):
            TokenizeConfig(template="{a}", **settings)


def test_a_published_set_becomes_the_token_file_of_its_name(
    tmp_path: Path, bundled: PreTrainedTokenizerFast
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    write(raw / "sft_data_zh.jsonl", DIALOGUES)
    cfg = TokenizeConfig(data=raw, out=out, tokenizer=Path("bundled"), recipe="deepctrl", workers=1)
    (report,) = tokenize(cfg)
    assert report.path == out / "deepctrl.bin"
    # as its publisher made it: `tokenizer.encode(text + eos)`, document after document
    eos = str(bundled.eos_token)
    published = [i for text in JOINED for i in bundled.encode(text + eos)]
    assert TokenFile.open(report.path).tokens.tolist() == published
    (again,) = tokenize(cfg)
    assert not again.is_new
