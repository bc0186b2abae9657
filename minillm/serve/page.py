"""The web chat: one HTML file, sent with a policy that forbids everything it does not need."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("static") / "index.html"
SCRIPTS = ("words.js", "store.js", "markdown.js", "net.js", "panel.js", "chat.js")
"""In this order; `chat.js` starts the page."""


def load_page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers; scripts and styles are allowed by their hashes only."""
    html = PAGE.read_text(encoding="utf-8")
    scripts = (PAGE.with_name(name).read_text(encoding="utf-8") for name in SCRIPTS)
    html = html.replace("/* scripts */", "\n".join(scripts))
    policy = (
        "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; script-src {_hashes(html, 'script')}; "
        f"style-src {_hashes(html, 'style')}"
    )
    return html, {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _hashes(html: str, tag: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
