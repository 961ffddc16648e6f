"""A pull that is killed at a chosen moment, and the same command again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

KILLING = """
import os, signal, sys
{victim}
right, calls = getattr(place, name), [0]
def deadly(*arguments, **named):
    calls[0] += 1
    if calls[0] == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*arguments, **named)
setattr(place, name, deadly)
from gemma_pack.commands import run
sys.exit(run(sys.argv[1:]))
"""


def finish_killed_pull(victim: str, reference: str, target: Path) -> dict[str, Any]:
    """Kill a pull and let the same command finish it; return what that printed.

    `victim` is Python that sets `place`, `name` and `count`: the function `place.name` kills its process when it is
    called for the `count`-th time.
    """
    arguments = ["pull", reference, "-o", str(target)]
    command = [sys.executable, "-c", KILLING.format(victim=victim), *arguments]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == -signal.SIGKILL
    assert not target.exists()
    command = [sys.executable, "-m", "gemma_pack", *arguments, "--format", "json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return found
