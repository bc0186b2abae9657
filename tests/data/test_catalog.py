"""The catalog: numbers, names and what they bring."""

import pytest

from minillm.data.catalog import CATALOG, TOKENIZER, find_sets
from minillm.errors import ConfigError


def test_numbers_and_names_are_unique() -> None:
    assert [item.number for item in CATALOG] == list(range(1, len(CATALOG) + 1))
    assert len({item.name for item in CATALOG}) == len(CATALOG)


def test_sets_are_found_by_number_name_and_list() -> None:
    assert [item.name for item in find_sets(["1", "dpo", "10,11"])] == [
        "tokenizer-5pct",
        "dpo",
        "grpo",
    ]


@pytest.mark.parametrize("number", ["4", "5", "8", "9"])
def test_a_tokenized_set_comes_after_its_tokenizer(number: str) -> None:
    assert [item.number for item in find_sets([number])] == [TOKENIZER.number, int(number)]


@pytest.mark.parametrize(
    ("word", "hint"), [("fineweb-20", "did you mean `fineweb-20pct`?"), ("99", "lists the sets")]
)
def test_an_unknown_set_gets_a_suggestion(word: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"no published set is called `{word}`") as caught:
        find_sets([word])
    assert hint in str(caught.value.hint)


def test_an_archive_has_a_folder_to_itself_for_it_is_replaced_whole() -> None:
    for item in CATALOG:
        others = [other.folder for other in CATALOG if other is not item]
        assert not (item.is_archive and item.folder in others)
