"""The chat page as it is sent."""

import base64
import hashlib
import re

from minillm.serve.page import load_page


def test_the_page_is_whole_small_and_allows_only_its_own_script() -> None:
    html, headers = load_page()
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert "function renderMarkdown(" in script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in headers["content-security-policy"]
    assert len(html.encode()) < 60_000
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", html)


def test_both_languages_have_every_word_that_the_page_uses() -> None:
    html, _ = load_page()
    english, chinese = re.findall(
        r"^  (?:en|zh): \{(.*?)^  \},", html, flags=re.DOTALL | re.MULTILINE
    )
    words = [re.findall(r'(\w+): "[^"]+"', text) for text in (english, chinese)]
    assert words[0] == words[1]
    used = set(re.findall(r'data-(?:t|label|hint)="(\w+)"|\bt\.(\w+)', html))
    assert {left or right for left, right in used} <= set(words[0])


def test_nothing_is_loaded_from_elsewhere() -> None:
    html, _ = load_page()
    assert not re.search(r"<script src|<link rel=\"stylesheet|@import|url\(", html)
    addresses = set(re.findall(r"https?://[\w.]+[\w/]*", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name space, never fetched
