"""Everything that gemma-pack refuses or fails at, with the exit code a CI job sees.

    GemmaPackError             1   an operation failed
    ├── InvalidUsageError      2   an option, an argument or an output path is wrong
    │   └── RecipeError        2   a recipe is wrong, at a line
    ├── CheckpointError        1   a checkpoint is damaged, incomplete or not a Gemma
    ├── TextError              1   a calibration or evaluation text cannot be used
    ├── SourceError            1   weights could not be fetched or assembled
    ├── QuantizationError      1   a proof or a numeric step failed
    ├── RegistryError          1   a registry or an OCI layout did not do what it must
    ├── EngineError            1   an inference server did not do what it must
    ├── GateFailedError       10   the variant is worse than its gate allows
    ├── GateUndecidedError    11   the evidence is too small for a verdict
    ├── MachineError          12   this machine cannot: GPU, memory, disk, a missing tool
    ├── AccessError           13   gated, or not authenticated
    ├── OfflineError          14   not available without the network
    └── UnusableImageError    15   an image is whole, and no consumer could use it

A message is one sentence that says what failed and why. A hint says what to do about it.
A crash never reads as a verdict: only the gate raises 10 and 11.
"""

from __future__ import annotations

import errno


class GemmaPackError(Exception):
    """An operation failed for a reason that the user can act on."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Keep the sentence for the user and the remedy, if there is one."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidUsageError(GemmaPackError):
    """An option, an argument or an output path is wrong."""

    exit_code = 2


class RecipeError(InvalidUsageError):
    """A recipe is wrong; the message names the file and the line."""


class CheckpointError(GemmaPackError):
    """A checkpoint is damaged, incomplete or not a Gemma."""


class TextError(GemmaPackError):
    """A calibration or evaluation text cannot be used."""


class SourceError(GemmaPackError):
    """Weights could not be fetched or assembled."""


class QuantizationError(GemmaPackError):
    """A proof or a numeric step of quantization failed."""


class RegistryError(GemmaPackError):
    """A registry or an OCI layout did not do what it must."""


class EngineError(GemmaPackError):
    """An inference server did not do what it must."""


class GateFailedError(GemmaPackError):
    """The variant is worse than its gate allows."""

    exit_code = 10


class GateUndecidedError(GemmaPackError):
    """The evidence is too small for a verdict."""

    exit_code = 11


class MachineError(GemmaPackError):
    """This machine cannot do it: GPU, memory, disk or a missing tool."""

    exit_code = 12


class AccessError(GemmaPackError):
    """The weights or the registry want a login or an accepted licence."""

    exit_code = 13


class OfflineError(GemmaPackError):
    """Something is needed that is not available without the network."""

    exit_code = 14


class UnusableImageError(GemmaPackError):
    """An image is whole, and no consumer could use it."""

    exit_code = 15


def known_error(error: BaseException) -> GemmaPackError | None:
    """Return the error of this tree that `error` is or stands for; None for one that only a fault of ours explains."""
    if isinstance(error, GemmaPackError):
        return error
    if isinstance(error, MemoryError):
        return MachineError("this machine has too little memory", hint="close other programs, or use a larger machine")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return MachineError("the GPU has too little memory", hint="use a larger GPU, or --device cpu")
    if not isinstance(error, OSError):
        return None
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return MachineError(
            f"no space left on the disk{where}", hint="free some space, or choose another place with -o"
        )
    return GemmaPackError(f"{error.strerror or error}{where}", hint="GEMMA_PACK_DEBUG=1 shows where it happened")
