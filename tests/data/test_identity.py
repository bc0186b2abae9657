"""Identity dialogues: always the right name, in the right language, in many words."""

import json
import re
from pathlib import Path

import pytest

from minillm.data.chat import check_messages
from minillm.data.identity import all_questions, identity_dialogues
from minillm.data.surface import Frame, join
from minillm.errors import ConfigError
from minillm.settings import IdentityConfig

HELD_OUT = json.loads(Path(__file__).with_name("identity_heldout.json").read_text("utf-8"))
PERSONA = IdentityConfig(assistant_name="Nova", author="the Lab", author_zh="实验室")


def plain(text: str) -> str:
    """Without case, spaces and punctuation."""
    return re.sub(r"[\W_]", "", text.lower())


def answers_of_templates() -> list[tuple[str, str]]:
    """(question, answer) of all single-turn dialogues."""
    return [
        (item["messages"][-2]["content"], item["messages"][-1]["content"])
        for item in identity_dialogues(PERSONA)
        if sum(message["role"] == "user" for message in item["messages"]) == 1
    ]


def test_every_answer_about_itself_holds_the_name() -> None:
    assert all("Nova" in answer for _, answer in answers_of_templates())


def test_chinese_questions_get_chinese_answers_and_english_ones_english() -> None:
    for question, answer in answers_of_templates():
        is_chinese = re.search("[一-鿿]", question) is not None
        assert is_chinese == (re.search("[一-鿿]", answer) is not None), question


def test_both_authors_are_named_each_in_its_language() -> None:
    answers = " ".join(answer for _, answer in answers_of_templates())
    assert "made by the Lab" in answers
    assert "由实验室训练" in answers
    assert "{" not in answers


def test_latin_names_stand_apart_from_chinese_text() -> None:
    persona = IdentityConfig(assistant_name="小新", author="Ann", author_zh="")
    answers = {item["messages"][-1]["content"] for item in identity_dialogues(persona)}
    assert "我是小新，由 Ann 训练的小语言模型。" in answers
    assert any("我是 Nova，" in answer for _, answer in answers_of_templates())


@pytest.mark.parametrize("language", ["zh", "en"])
def test_name_questions_have_many_ways_to_be_asked(language: str) -> None:
    wanted = {
        "zh": "我是 Nova，由实验室训练的小语言模型。",
        "en": "I am Nova, a small language model",
    }
    asked = {plain(q) for q, a in answers_of_templates() if a.startswith(wanted[language])}
    assert len(asked) >= 100


def test_repeats_are_worded_differently() -> None:
    once, more = (
        identity_dialogues(IdentityConfig(identity_repeat=count, assistant_name="Nova"))
        for count in (1, 6)
    )
    assert len(more) == 6 * len(once)
    first_six = [item["messages"][-2]["content"] for item in more[:6]]
    assert len(set(first_six)) == 6
    assert {plain(text).endswith("你是谁") or "你是谁" in text for text in first_six} == {True}


def test_the_seed_decides_the_wording() -> None:
    assert identity_dialogues(PERSONA, 1) == identity_dialogues(PERSONA, 1)
    assert identity_dialogues(PERSONA, 1) != identity_dialogues(PERSONA, 2)


def test_no_identity_means_no_dialogues() -> None:
    assert identity_dialogues(IdentityConfig(identity=False)) == []


def test_all_are_dialogues_that_training_accepts() -> None:
    for item in identity_dialogues(PERSONA):
        check_messages(item["messages"], "identity")


def test_every_sampled_question_is_listed_among_all() -> None:
    listed = set(all_questions())
    asked = {q for q, _ in answers_of_templates()}
    assert asked <= listed


@pytest.mark.parametrize("language", ["zh", "en"])
def test_held_out_questions_are_never_trained_on(language: str) -> None:
    held_out = {plain(text) for text in HELD_OUT[language]}
    assert len(held_out) >= 20
    assert not held_out & {plain(text) for text in all_questions()}


def test_a_model_must_have_a_name() -> None:
    with pytest.raises(ConfigError, match="needs a name"):
        IdentityConfig(assistant_name=" ")


def test_english_questions_lose_their_capital_in_mid_sentence() -> None:
    assert join("Hi, ", "Who are you", "?") == "Hi, who are you?"
    assert join("Hello! ", "Who are you", "?") == "Hello! Who are you?"
    assert join("Well, ", "I'm new", ".") == "Well, I'm new."


def test_a_frame_samples_the_plain_form_first() -> None:
    import random

    frame = Frame(before=("", "请问"), after=("？", ""))
    forms = frame.sample("你是谁", 4, random.Random(0))
    assert forms[0] == "你是谁？"
    assert set(forms) == {"你是谁？", "你是谁", "请问你是谁？", "请问你是谁"}
