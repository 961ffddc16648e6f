"""Push a directory with oci-modelcar, which knows only repositories of a model hub; run by an interpreter that has it.

    python oci_modelcar_directory.py DIRECTORY HOST REPOSITORY TAG SPOOL

Its own pipeline runs unchanged. The files stand where it would have downloaded them, so that no download is timed: it
takes a file of the right size in its spool for one that it fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path

from oci_modelcar.config import Config
from oci_modelcar.download import HfDownloader, HfFile
from oci_modelcar.logging import PipelineLogger
from oci_modelcar.pipeline import Pipeline
from oci_modelcar.registry import OciClient

WORKERS = 2
"""Its default is one; more than there are cores are no faster."""


class Local(HfDownloader):
    """Answers from a directory what the hub would."""

    def resolve_revision(self, *_: object) -> str:
        """Return what looks like a commit."""
        return "0" * 40

    def list_files(self, *_: object) -> list[HfFile]:
        """Return every file that stands in the spool."""
        files = sorted((self.spool_dir / "sources").iterdir())
        return [HfFile(path.name, path.stat().st_size, None) for path in files]


def main() -> None:
    """Push."""
    directory, spool = Path(sys.argv[1]), Path(sys.argv[5])
    (spool / "sources").mkdir(parents=True)
    for path in directory.iterdir():
        (spool / "sources" / path.name).symlink_to(path.resolve())
    config = Config(
        hf_repo="bench/model", registry=sys.argv[2], target_repo=sys.argv[3], target_tag=sys.argv[4],
        spool_dir=spool, workers=WORKERS,
    )  # fmt: skip
    client = OciClient(registry_host=sys.argv[2], target_repo=sys.argv[3])
    Pipeline(config, PipelineLogger(log_style="text", quiet=True), Local(None, None, spool, None), client).run()


if __name__ == "__main__":
    main()
