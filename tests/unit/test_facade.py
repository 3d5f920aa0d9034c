"""The root of the package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

import reliable_tasks


def test_the_version_is_the_installed_one() -> None:
    """It is looked up when somebody asks."""
    try:
        installed = version("reliable-tasks")
    except PackageNotFoundError:
        # Run from a checkout that is not installed.
        with pytest.raises(PackageNotFoundError):
            _ = reliable_tasks.__version__
    else:
        assert reliable_tasks.__version__ == installed


def test_what_does_not_exist_is_named() -> None:
    """As Python does it."""
    with pytest.raises(AttributeError, match="'reliable_tasks' has no attribute 'twice'"):
        _ = reliable_tasks.twice
