"""A user's module passes a strict type checker, and a wrong one does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["api.py", "wrong.py"])
def test_a_users_module_is_checked(module: str, tmp_path: Path) -> None:
    """No error in what is right; in ``wrong.py`` an ignore that is not needed would be one."""
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path)]
    checked = subprocess.run(
        [*command, str(Path(__file__).with_name(module))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
