"""Push the files of a directory as an artifact with oras-py; run by an interpreter that has it.

python oras_directory.py DIRECTORY REFERENCE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from oras.client import OrasClient


def main() -> None:
    """Push."""
    os.chdir(sys.argv[1])
    files = [path.name for path in sorted(Path().iterdir())]
    OrasClient(insecure=True).push(target=sys.argv[2], files=files, quiet=True)


if __name__ == "__main__":
    main()
