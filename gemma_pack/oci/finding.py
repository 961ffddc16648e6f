"""What a rule of `lint` finds, and whom it concerns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.oci.inspection import Inspection

Consumer = Literal["modelcar", "native", "fetch", "containerd", "ilab", "modelpack"]
"""KServe's three ways to mount `oci://`, a container runtime, `ilab model download`, readers of CNCF ModelPack."""
Severity = Literal["fails", "unknown", "warning"]
"""The consumer would not get a working model; it cannot be told without reading more; it works and should be better."""

EVERYONE: Final[tuple[Consumer, ...]] = get_args(Consumer)
RUNTIMES: Final[tuple[Consumer, ...]] = ("modelcar", "native", "containerd")
"""Who lays the layers over one another by a container runtime."""
TAR_READERS: Final[tuple[Consumer, ...]] = (*RUNTIMES, "fetch")
FILE_READERS: Final[tuple[Consumer, ...]] = ("ilab", "modelpack")


class Finding(BaseModel):
    """One thing that is not as it should be."""

    model_config = ConfigDict(frozen=True)

    rule: str = ""
    severity: Severity
    consumers: tuple[Consumer, ...] = EVERYONE
    """Whom it concerns; empty for what is no consumer, such as a scanner."""
    message: str
    remedy: str | None = None


def absent(inspection: Inspection) -> Severity:
    """Return how sure it is that what was not found is not there."""
    return "fails" if inspection.is_read else "unknown"


def listed(names: Sequence[str]) -> str:
    """Name up to three, safely for a terminal."""
    shown = ", ".join(ascii(name[:80])[1:-1] for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
