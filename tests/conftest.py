"""Fixtures that several rooms share: real system tools, found or skipped, and free loopback ports."""

from __future__ import annotations

import os
import shutil
import socket
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Return the path of a system tool; skip the test where it is missing, or fail under CI=true."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path:
            return path
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is missing, and CI must have it: make tools installs it")
        pytest.skip(f"{name} is missing: make tools installs it on Debian")

    return find


@pytest.fixture
def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
