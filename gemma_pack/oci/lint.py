"""Would it work: every rule of every consumer, applied to what `inspection` found.

The rules are pure functions, each with its source in its docstring; a consumer works unless one of them says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict

from gemma_pack.oci import artifact_rules, checkpoint_rules, gemma_rules, image_rules
from gemma_pack.oci.finding import EVERYONE, Consumer, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gemma_pack.oci.inspection import Inspection

    Rule = Callable[[Inspection], Iterable[Finding]]

RULES: Final[tuple[Rule, ...]] = (
    image_rules.is_image,
    artifact_rules.titled_files,
    artifact_rules.model_pack,
    image_rules.models_directory,
    image_rules.known_layers,
    image_rules.shell,
    image_rules.readable_files,
    image_rules.links,
    image_rules.deletions,
    image_rules.diff_ids,
    image_rules.layer_count,
    image_rules.different_twins,
    image_rules.compressed_weights,
    image_rules.pax_sizes,
    checkpoint_rules.configuration,
    checkpoint_rules.tokenizer,
    checkpoint_rules.chat_template,
    checkpoint_rules.safetensors_headers,
    checkpoint_rules.index,
    checkpoint_rules.precision,
    checkpoint_rules.pickled_weights,
    gemma_rules.known_family,
    gemma_rules.shapes,
    gemma_rules.quantization,
    gemma_rules.fused_layers,
    gemma_rules.tied_embeddings,
)
NAMES: Final[dict[Consumer, str]] = {
    "modelcar": "KServe oci://",
    "native": "KServe oci+native://",
    "fetch": "KServe oci+fetch://",
    "containerd": "containerd, podman",
    "ilab": "ilab model download",
    "modelpack": "ModelPack readers",
}
Verdict = Literal["works", "fails", "unknown"]


class Judgement(BaseModel):
    """Whether one consumer would get a working model."""

    model_config = ConfigDict(frozen=True)

    consumer: Consumer
    verdict: Verdict
    reasons: tuple[str, ...]
    """Why not, or why it cannot be told."""


def lint(inspection: Inspection, rules: Sequence[Rule] = RULES) -> tuple[Finding, ...]:
    """Apply `rules`, and name each finding by the rule that made it."""
    return tuple(
        finding.model_copy(update={"rule": rule.__name__.replace("_", "-")})
        for rule in rules
        for finding in rule(inspection)
    )


def judge(findings: Sequence[Finding]) -> tuple[Judgement, ...]:
    """Say of each consumer whether the image would work: it fails by one finding, and is unknown by one."""
    return tuple(_judge(consumer, findings) for consumer in EVERYONE)


def _judge(consumer: Consumer, findings: Sequence[Finding]) -> Judgement:
    mine = [finding for finding in findings if consumer in finding.consumers]
    verdicts: tuple[Verdict, ...] = ("fails", "unknown")
    for verdict in verdicts:
        reasons = tuple(finding.message for finding in mine if finding.severity == verdict)
        if reasons:
            return Judgement(consumer=consumer, verdict=verdict, reasons=reasons)
    return Judgement(consumer=consumer, verdict="works", reasons=())
