"""gemma-pack.json: what was done to a checkpoint, from which bytes, and how it was proved.

The record travels in the checkpoint and each stage adds its part. Model card, labels, SBOM and
provenance are generated from it, never typed. It holds nothing that differs between two identical runs
(no dates, durations or host names), so the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gemma_pack import __version__
from gemma_pack.checkpoint import RECORD_NAME
from gemma_pack.disk import write_atomic
from gemma_pack.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


class _Part(BaseModel):
    # a bound or a perplexity may be infinite, for which JSON has no number
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FileDigest(_Part):
    """One file: its path inside the checkpoint, sha256 in hex and size."""

    path: str
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0)]

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        """Refuse a path out of the checkpoint: a record may come from a stranger's image."""
        if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError("the path leads out of the checkpoint")
        return path


class SourceRecord(_Part):
    """Where the bf16 weights came from."""

    kind: Literal["hub", "directory", "demo"]
    model_id: str
    """The hub id; for a directory its name, or the hub id under which huggingface_hub's cache keeps it;
    for the demo model the hub id of the model it was converted from."""
    revision: str | None = None
    """The hub commit, 40 hex digits; None where there is none."""
    files: tuple[FileDigest, ...]
    license: str = "gemma"
    note: str | None = None
    """What a reader must know about the base, such as that it is a dequantized GGUF."""


class TextRecord(_Part):
    """The text that calibrated or judged a variant, and the windows cut from it."""

    spec: str
    """As given: `builtin`, a file's name, or a hub dataset."""
    sha256: Sha256
    """Of the token ids of all windows, little-endian int32."""
    windows: int
    sequence_length: int
    seed: int


class RefinementRecord(_Part):
    """What tuning the scales did to the windows of the calibration text that were held out."""

    text: TextRecord
    steps: int
    """The step whose scales were kept; 0 where none was better than the start."""
    held_out_kl_before_nats: float
    held_out_kl_after_nats: float


class EquivalenceProof(_Part):
    """Smoothing changed nothing before anything was rounded: float32, base beside smoothed model."""

    windows: int
    tokens_a_window: int
    kl_nats: float
    """Mean KL(base || smoothed) of the next token."""


class UntouchedProof(_Part):
    """The tensors that no recipe named are byte-identical to the source.

    `sha256` is over a line "name sha256" for each untouched tensor, sorted by name: the same before and after.
    """

    changed: tuple[str, ...]
    """Names, in the source, of the tensors that the recipe may change; they were replaced by packed forms,
    or dropped, as a copy of the tied embedding."""
    untouched: int
    sha256: Sha256


class LoaderProof(_Part):
    """The names, dtypes, shapes and ignore list of the variant are what vLLM and transformers expect of its family."""

    decoder_tensors: int
    """Tensors of the decoder, each compared."""
    quantized: int
    in_bf16: int
    """Linear layers of the decoder."""


class QuantizationRecord(_Part):
    """What was quantized, how, with what, and the proof about the rest."""

    recipe: str
    recipe_sha256: Sha256
    scheme: str
    """In a few words, for people: `int4 weights in groups of 128`."""
    algorithm: str
    format: Literal["compressed-tensors", "bitsandbytes"] = "compressed-tensors"
    calibration: TextRecord | None = None
    smoothing: EquivalenceProof | None = None
    """None where nothing was smoothed. Factors are the norm's gain in the base over that in the variant."""
    refinement: RefinementRecord | None = None
    device: str
    versions: dict[str, str]
    """Versions of the libraries that shaped the bytes."""
    untouched: UntouchedProof
    loader: LoaderProof | None = None
    """None in records of gemma-pack 0.1.0 and before."""
    base_size_bytes: int
    size_bytes: int
    """Tensor bytes of the base and of this variant."""


class Metric(_Part):
    """One judged number: its estimate, its bound (one-sided 95 %) and the margin that the gate allows."""

    name: str
    value: float
    bound: float | None = None
    opposite_bound: float | None = None
    """The bound on the good side, likewise one-sided: with bounds of 95 % each, both make an interval of 90 %."""
    margin: float | None = None
    verdict: Literal["pass", "fail", "undecided", "not judged"] = "not judged"
    unit: str = ""


class ValidationRecord(_Part):
    """The verdict, the numbers it rests on, and the digest of the whole report."""

    verdict: Literal["pass", "fail", "undecided"]
    report_sha256: Sha256
    engine: str
    profile: str
    evaluation: TextRecord
    confidence: float | None = None
    """Of each bound, one-sided; records from before there was a second look say nothing, and mean 0.95."""
    metrics: tuple[Metric, ...]


class Record(_Part):
    """All of gemma-pack.json."""

    schema_version: Literal[1] = 1
    gemma_pack_version: str = __version__
    source: SourceRecord
    quantization: QuantizationRecord | None = None
    validation: ValidationRecord | None = None

    def digest(self) -> str:
        """Return the sha256 of the record as it is written."""
        return hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        """Return the bytes of gemma-pack.json."""
        return (self.model_dump_json(indent=2, exclude_none=True) + "\n").encode()

    def write(self, directory: Path) -> None:
        """Write gemma-pack.json into `directory`, replacing it in one step."""
        write_atomic(directory / RECORD_NAME, self.encode())


def read_record(directory: Path) -> Record | None:
    """Return the record in `directory`, or None where there is none.

    Raises:
        CheckpointError: there is one, but it is broken or of a version this gemma-pack does not know.
    """
    path = directory / RECORD_NAME
    try:
        return Record.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("schema_version",):
            raise CheckpointError(
                f"{path} has schema_version {first['input']}, which gemma-pack {__version__} does not know",
                hint="use the gemma-pack version that wrote it, or a newer one",
            ) from error
        place = ".".join(map(str, first["loc"])) or "top level"
        raise CheckpointError(
            f"{path} is no valid record: {place}: {first['msg']}",
            hint="make the variant again, or use the gemma-pack version that wrote it",
        ) from error


def require_record(directory: Path) -> Record:
    """Return the record in `directory`; raise CheckpointError where there is none."""
    record = read_record(directory)
    if record is None:
        raise CheckpointError(
            f"{directory} has no {RECORD_NAME}", hint="pass a directory that gemma-pack quantize wrote"
        )
    return record
