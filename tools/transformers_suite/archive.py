"""Make a folder with the tests that the source archive of transformers on PyPI carries.

The archive has the common model tests but not all that they import. What is missing is written
here: two empty classes, one table of config values, and starting processes for the distributed
tests. Tests of `generate` are not in the archive; ours are in `tests/models`.
"""

import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path

WANTED = (
    "test_configuration_common.py",
    "test_expert_parallel_mixin.py",
    "test_fsdp_mixin.py",
    "test_memory_cleanup_mixin.py",
    "test_modeling_common.py",
    "test_tensor_parallel_mixin.py",
    "test_training_mixin.py",
)

WRITTEN = {
    "conftest.py": "from transformers_suite.markers import pytest_configure\n",
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": """\
config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
""",
    "tests/distributed_testing_utils.py": "from transformers_suite.processes import *\n",
}


def prepare(cache: Path) -> Path:
    """Return a folder below `cache` whose `tests` package fits the installed transformers."""
    version = importlib.metadata.version("transformers")
    folder = cache / f"transformers-{version}"
    if not all((folder / "tests" / name).is_file() for name in WANTED):
        _unpack(_download(version, cache), folder / "tests")
    for name, text in WRITTEN.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def _download(version: str, cache: Path) -> Path:
    archive = cache / f"transformers-{version}.tar.gz"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"downloading the source archive of transformers {version} (11 MB) …", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-binary", "transformers"]
        done = subprocess.run(
            [*command, "--dest", str(cache), f"transformers=={version}"],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(
                f"error: pip cannot download transformers {version}: "
                f"{(done.stderr.strip().splitlines() or ['no reason given'])[-1]}\n"
                f"hint: put transformers-{version}.tar.gz from PyPI into {cache}"
            )
    return archive


def _unpack(archive: Path, target: Path) -> None:
    """Take the wanted files out of the archive; whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    found = set()
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and parts[2] in WANTED:
                content = tar.extractfile(member)
                assert content is not None
                part = target / f"{parts[2]}.part"
                part.write_bytes(content.read())
                part.replace(target / parts[2])
                found.add(parts[2])
    if missing := sorted(set(WANTED) - found):
        sys.exit(f"error: {archive} has no tests/{missing[0]}: transformers has moved it")
