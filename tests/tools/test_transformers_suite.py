"""How a run of transformers' own tests is judged. The run itself is `make suite`."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "tools" / "transformers_suite"


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("suite_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["suite_run"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def write_report(folder: Path, *cases: str) -> Path:
    path = folder / "report.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


PASSED = '<testcase name="test_a" time="1"/>'
FAILED = '<testcase name="test_b"><failure message="AssertionError: 1 != 2&#10;more"/></testcase>'
HARMLESS = '<testcase name="test_c"><skipped message="test requires accelerator"/></testcase>'
FORBIDDEN = '<testcase name="test_d"><skipped message="X does not support SDPA"/></testcase>'


@pytest.mark.parametrize(
    ("cases", "is_good"),
    [
        ([PASSED, HARMLESS], True),
        ([PASSED, FAILED], False),
        ([PASSED, FORBIDDEN], False),
        ([HARMLESS], False),
        ([], False),
    ],
    ids=["passed", "failed", "forbidden_skip", "only_skips", "nothing"],
)
def test_only_a_run_without_failures_and_forbidden_skips_is_good(
    run: ModuleType, tmp_path: Path, cases: list[str], is_good: bool
) -> None:
    result = run.judge(write_report(tmp_path, *cases), run.read_forbidden())
    assert result.is_good == is_good


def test_subtests_count_as_one_test(run: ModuleType, tmp_path: Path) -> None:
    report = write_report(tmp_path, PASSED, PASSED, HARMLESS, FAILED, FAILED)
    result = run.judge(report, run.read_forbidden())
    assert (result.passed, len(result.failed), len(result.skipped)) == (1, 1, 1)
    assert result.failed["test_b"] == "AssertionError: 1 != 2"


def test_every_forbidden_reason_is_a_pattern_of_its_own(run: ModuleType) -> None:
    lines = (FOLDER / "forbidden_skips.txt").read_text(encoding="utf-8").splitlines()
    reasons = [line for line in lines if line and not line.startswith("#")]
    assert len(reasons) == len(set(reasons)) == 15
    for reason in reasons:
        example = f"MiniModel {reason} today".replace("doesn.t", "doesn't")
        assert re.search(reason, example)
        assert run.read_forbidden().search(example)
    assert not run.read_forbidden().search("test requires Flash Attention")
