"""Run transformers' own model tests against every architecture of minillm.

python tools/transformers_suite/run.py [ARCHITECTURE ...] [-- PYTEST ARGUMENTS]

Downloads the source archive of the installed transformers from PyPI once (11 MB), into
`~/.cache/minillm/transformers-suite` or `$MINILLM_SUITE_CACHE`. Exits with 1 when a test fails, or
is skipped for a reason that `forbidden_skips.txt` names.
"""

import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass
class Result:
    """What became of the tests of one architecture."""

    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    forbidden: dict[str, str] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Tests ran, none failed, and none was left out that must not be."""
        return bool(self.passed) and not self.failed and not self.forbidden


def read_forbidden(path: Path = HERE / "forbidden_skips.txt") -> re.Pattern[str]:
    """Return the pattern of reasons for which nothing may be skipped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return re.compile("|".join(line for line in lines if line and not line.startswith("#")))


def judge(report: Path, forbidden: re.Pattern[str]) -> Result:
    """Read a JUnit report. Subtests appear as several cases of one name and count once."""
    result, names = Result(), set()
    for case in ET.parse(report).getroot().iter("testcase"):
        name = case.get("name", "?")
        names.add(name)
        for trouble in (*case.findall("failure"), *case.findall("error")):
            result.failed[name] = _first_line(trouble.get("message"))
        for skip in case.findall("skipped"):
            reason = _first_line(skip.get("message"))
            result.skipped[name] = reason
            if forbidden.search(reason) and name not in _COMPOSITE_ONLY:
                result.forbidden[name] = reason
    for name in result.failed:
        result.skipped.pop(name, None)
    result.passed = len(names) - len(result.failed) - len(result.skipped)
    return result


_COMPOSITE_ONLY = {"test_sdpa_can_dispatch_composite_models"}
"""Skipped with a reason on the list, though it is about models made of several."""


def run(folder: Path, architecture: str, arguments: list[str]) -> Result:
    """Run the tests of one architecture in a process of their own and print what happened.

    `tests` has to mean transformers' package there, so the project's root is not on the path.
    """
    report = folder / f"{architecture}.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE.parent)]),
        "HF_HUB_OFFLINE": "1",
        "MINILLM_SUITE_ARCHITECTURES": architecture,
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("TRANSFORMERS_VERBOSITY", None)  # tests read what transformers logs
    command = [sys.executable, "-m", "pytest", str(HERE / "cases.py"), "-q", "--no-header"]
    command += ["-c", os.devnull, f"--rootdir={folder}", "-p", "conftest", "-p", "no:cacheprovider"]
    command.append(f"--junitxml={report}")
    start = time.monotonic()
    done = subprocess.run([*command, *arguments], cwd=folder, env=environment, check=False)
    if not report.is_file():
        sys.exit(f"error: pytest ended with {done.returncode} and wrote no report")
    result = judge(report, read_forbidden())
    print(
        f"{architecture}: {result.passed} passed, {len(result.failed)} failed, "
        f"{len(result.skipped)} skipped, {len(result.forbidden)} of them forbidden, "
        f"{time.monotonic() - start:.0f} s"
    )
    for title, cases in (("FAILED", result.failed), ("FORBIDDEN SKIP", result.forbidden)):
        for name, reason in sorted(cases.items()):
            print(f"  {title} {name}: {reason[:160]}")
    sys.stdout.flush()
    return result


def _first_line(text: str | None) -> str:
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "")


def main(arguments: list[str]) -> int:
    """Run what is asked for; return the exit code."""
    from minillm.models import registry
    from transformers_suite.archive import prepare

    split = arguments.index("--") if "--" in arguments else len(arguments)
    wanted = arguments[:split] or list(registry.ARCHITECTURES)
    if unknown := [name for name in wanted if name not in registry.ARCHITECTURES]:
        known = ", ".join(f"`{name}`" for name in registry.ARCHITECTURES)
        print(f"error: there is no architecture `{unknown[0]}`\nhint: choose from {known}")
        return 2
    default = Path.home() / ".cache" / "minillm" / "transformers-suite"
    folder = prepare(Path(os.environ.get("MINILLM_SUITE_CACHE", default)).absolute())
    results = [run(folder, name, arguments[split + 1 :]) for name in wanted]
    return 0 if all(result.is_good for result in results) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main(sys.argv[1:]))
