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
