"""A build file, and all stages for each of its recipes: quantize, validate, package, push, pull back, attach.

Every stage finds what an earlier run left and does not do it again: a variant made from the same inputs, a report on
the same windows, an image of the same files, blobs that the registry has. So an interrupted build goes on when the
same command is run again, and loses at most the running stage. A variant that fails its gate does not stop the others.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gemma_pack.errors import RegistryError
from gemma_pack.report import Report  # noqa: TC001 - pydantic reads the annotation
from gemma_pack.yaml_file import parse_yaml, read_text

if TYPE_CHECKING:
    from gemma_pack.console import Reporter
    from gemma_pack.oci.signing import SigningKey
    from gemma_pack.record import Record


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationPart(_Part):
    """What replaces the recipes' own calibration text; what is left out stays theirs."""

    text: str | None = None
    samples: Annotated[int, Field(ge=1, strict=True)] | None = None
    sequence_length: Annotated[int, Field(ge=16, strict=True)] | None = None
    seed: Annotated[int, Field(ge=0, strict=True)] | None = None


class ValidationPart(_Part):
    """How each variant is judged."""

    text: str = "builtin"
    profile: Literal["smoke", "quick", "full"] = "quick"
    seed: Annotated[int, Field(ge=0, strict=True)] = 0


class PackagePart(_Part):
    """What lies under the weights, and for which platforms."""

    base: str = "embedded"
    platforms: tuple[str, ...] = ()


class BuildFile(_Part):
    """What to build from which model by which recipes."""

    model: str
    revision: str | None = None
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    output: str = "."
    """Directory for all that is made, below the working directory."""
    calibration: CalibrationPart = CalibrationPart()
    validation: ValidationPart = ValidationPart()
    package: PackagePart = PackagePart()
    push: str | None = None
    """`registry/name` to push to; the tag of each variant is its recipe's name."""


class BuiltVariant(_Part):
    """One line of the table at the end."""

    recipe: str
    directory: Path
    base_size_bytes: int
    size_bytes: int
    report: Report
    layout: Path
    digest: str
    pinned: str | None
    """`registry/name@digest` where it was pushed."""


def load_build_file(path: Path) -> BuildFile:
    """Read and check a build file.

    Raises:
        InvalidUsageError: it cannot be read, or a line is wrong.
    """
    hint = "examples/demo.yaml is an example"
    return parse_yaml(BuildFile, read_text(path, hint=hint), origin=str(path), hint=hint)


def build_variant(
    plan: BuildFile,
    recipe_name: str,
    *,
    device: str = "auto",
    offline: bool = False,
    plain_http: bool = False,
    key: SigningKey | None = None,
    reporter: Reporter,
) -> BuiltVariant:
    """Take one recipe of the build file through all stages; its verdict is in the report, not raised.

    `key` signs what is attached to the image where it is pushed.
    """
    from gemma_pack.build import CalibrationChoice, default_stem, quantize_model
    from gemma_pack.oci.evidence import attach_evidence
    from gemma_pack.oci.manifest import Platform
    from gemma_pack.oci.package import package
    from gemma_pack.recipe import load_recipe

    recipe = load_recipe(recipe_name)
    output = Path(plan.output)
    directory = output / f"{default_stem(plan.model)}-quantized.{recipe.name}"
    said = plan.calibration
    variant = quantize_model(
        plan.model,
        recipe_name,
        directory,
        CalibrationChoice(said.text, said.samples, said.sequence_length, said.seed),
        revision=plan.revision,
        device=device,
        offline=offline,
        reporter=reporter,
    )
    report = _report(plan, directory, variant.record, device=device, offline=offline, reporter=reporter)
    layout = directory.with_name(f"{directory.name}.oci")
    _discard_stale(layout, directory)
    image = package(
        directory,
        layout,
        base=plan.package.base,
        platforms=[Platform.parse(text) for text in plan.package.platforms],
        reporter=reporter,
    )
    pinned = None
    if plan.push:
        pinned = _push(layout, f"{plan.push}:{recipe.name}", directory, plain_http=plain_http, reporter=reporter)
        attach_evidence(pinned, layout, report=report, key=key, plain_http=plain_http, reporter=reporter)
    quantization = variant.record.quantization
    if quantization is None:
        raise AssertionError("quantize left no record of what it did")
    return BuiltVariant(
        recipe=recipe.name,
        directory=directory,
        base_size_bytes=quantization.base_size_bytes,
        size_bytes=quantization.size_bytes,
        report=report,
        layout=layout,
        digest=image.digest,
        pinned=pinned,
    )


def _report(
    plan: BuildFile, directory: Path, record: Record, *, device: str, offline: bool, reporter: Reporter
) -> Report:
    """Return the report on the variant: the one of an earlier run where it answers the same question."""
    from gemma_pack.build import validate_variant
    from gemma_pack.report import REPORT_NAME, read_report, report_directory

    target = report_directory(directory)
    wanted = plan.validation
    if record.validation and (target / REPORT_NAME).is_file():
        found = read_report(target / REPORT_NAME)
        asked = found.protocol.profile == wanted.profile and found.protocol.text.seed == wanted.seed
        same_text = Path(wanted.text).name == Path(found.protocol.text.spec).name
        if asked and same_text and found.digest() == record.validation.report_sha256:
            reporter.status(f"{target} is there already, on the same windows")
            return found
    return validate_variant(
        directory,
        target,
        against=plan.model if Path(plan.model).is_dir() else None,
        profile_name=wanted.profile,
        text=wanted.text,
        seed=wanted.seed,
        device=device,
        offline=offline,
        reporter=reporter,
    )


def _discard_stale(layout: Path, directory: Path) -> None:
    """Remove an image that an earlier build packed from a variant or report that has changed since."""
    from gemma_pack.checkpoint import RECORD_NAME

    if (layout / "oci-layout").is_file():
        packed = (layout / "index.json").stat().st_mtime_ns
        if (directory / RECORD_NAME).stat().st_mtime_ns > packed:
            shutil.rmtree(layout)


def _push(layout: Path, reference: str, directory: Path, *, plain_http: bool, reporter: Reporter) -> str:
    """Push the image, pull it back and compare every file; return the reference pinned by digest."""
    from gemma_pack.checkpoint import file_sha256
    from gemma_pack.oci.pull import pull
    from gemma_pack.oci.push import push

    pushed = push(layout, reference, plain_http=plain_http, reporter=reporter)
    with tempfile.TemporaryDirectory(prefix=".pulled-", dir=directory.parent) as name:
        copy = Path(name) / directory.name
        pull(pushed.pinned, copy, plain_http=plain_http, reporter=reporter)
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            twin = copy / path.relative_to(directory)
            if not twin.is_file() or file_sha256(twin) != file_sha256(path):
                raise RegistryError(
                    f"{path.name} came back from {reference} with other bytes",
                    hint="push again; the registry lost some",
                )
    return pushed.pinned
