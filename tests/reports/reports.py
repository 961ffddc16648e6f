"""A whole report that no run stands behind, for tests of its renderings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_pack.checkpoint import Checkpoint, file_sha256
from gemma_pack.record import FileDigest
from gemma_pack.report import (
    REPORT_NAME,
    Base,
    BosCheck,
    Divergence,
    Engine,
    Estimate,
    GateUsed,
    HistogramBin,
    KernelNoise,
    KindMean,
    Likelihood,
    Method,
    NoiseFloor,
    OtherProtocol,
    Parity,
    PositionBin,
    PromptParity,
    Protocol,
    Report,
    Spilled,
    Subject,
    TokenSpot,
    WindowSums,
    report_directory,
)
from tests.records import quantized_record, text_record, validation_record

if TYPE_CHECKING:
    from pathlib import Path

PERCENTILES = ("min", "0.1", "1", "5", "10", "50", "90", "95", "99", "99.9", "max")


def estimate(value: float, error: float) -> Estimate:
    return Estimate(
        value=value,
        lower=value - 1.7 * error,
        upper=value + 1.7 * error,
        standard_error=error,
        iid_standard_error=error / 2,
    )


def answer(prompt: str, base: str, variant: str, first: int | None, share: float) -> PromptParity:
    return PromptParity(
        prompt=prompt,
        templated=prompt.endswith("?"),
        base=base,
        variant=variant,
        tokens=32,
        first_divergent=first,
        near_tie=first == 3,
        divergent_share=share,
        variant_repeats=0.0,
        base_ended=False,
        variant_ended=False,
        variant_empty=not variant.strip(),
    )


def make_report(**changes: Any) -> Report:
    fields: dict[str, Any] = {
        "verdict": "pass",
        "subject": Subject(
            recipe="w4a16",
            recipe_sha256="b2" * 32,
            scheme="int4 weights in groups of 128",
            size_bytes=6_150_000_000,
            files=(FileDigest(path="model.safetensors", sha256="f0" * 32, size_bytes=6_150_000_900),),
        ),
        "base": Base(
            kind="hub",
            model_id="google/gemma-2-9b-it",
            revision="c" * 40,
            parameters=9_240_000_000,
            size_bytes=18_480_000_000,
        ),
        "engine": Engine(
            name="transformers", versions={"transformers": "5.17.0", "torch": "2.13.0"}, device="cpu", attention="eager"
        ),
        "protocol": Protocol(
            profile="quick",
            text=text_record(),
            tokens=16352,
            text_bytes=61000,
            bos_check=BosCheck(with_bos=11.5, without_bos=88.25),
        ),
        "method": Method(confidence=0.95, draws=10_000, seed=0),
        "metrics": validation_record().metrics,
        "noise_floor": NoiseFloor(windows=4, batch=1, kl_nats=0.0011, same_top1=0.98, ln_ratio=0.0002),
        "likelihood": Likelihood(
            ppl_base=11.25,
            ppl_variant=11.42,
            ppl_base_standard_error=0.31,
            ppl_variant_standard_error=0.32,
            ln_ratio=estimate(0.0149, 0.0022),
            bits_per_byte_base=0.8123,
            bits_per_byte_variant=0.8176,
        ),
        "divergence": Divergence(
            kl_nats=estimate(0.0312, 0.0013),
            kl_percentiles=dict(
                zip(PERCENTILES, (0, 1e-6, 1e-5, 1e-4, 5e-4, 0.01, 0.07, 0.12, 0.3, 0.9, 2.4), strict=True)
            ),
            same_top1=estimate(0.935, 0.0015),
            delta_p_rms=0.041,
            delta_p_percentiles=dict(
                zip(PERCENTILES, (-0.9, -0.4, -0.2, -0.05, -0.02, 0, 0.02, 0.05, 0.2, 0.4, 0.8), strict=True)
            ),
            by_position=tuple(
                PositionBin(begin=1 + 32 * i, end=33 + 32 * i, kl_nats=0.05 / (1 + i / 4)) for i in range(16)
            ),
            by_kind=(
                KindMean(kind="digits", tokens=300, kl_nats=0.09),
                KindMean(kind="start of a word", tokens=9000, kl_nats=0.03),
            ),
            histogram=tuple(
                HistogramBin(begin=10.0**i, end=10.0 ** (i + 1), tokens=4000 + 1000 * i) for i in range(-4, 1)
            ),
            worst=(
                TokenSpot(
                    context="a | pipe and\n<b>a break</b>",
                    token="`",
                    kl_nats=2.4,
                    base_top1=" the",
                    variant_top1="<script>alert(1)</script>",
                ),
            ),
        ),
        "parity": Parity(
            limit=32,
            identical_share=0.25,
            divergent_share=0.07,
            prompts=(
                answer("Why is the sky blue?", "Because of | scattering.", "Because of light.", 3, 0.04),
                answer("The capital of France is", " Paris.", " Paris.", None, 0.0),
                answer("Name three planets.", "Mars, Venus & Earth", "Mars, Mars, Mars", 2, 0.30),
                answer("1, 2, 4, 8, 16,", " 32, 64", " 33, 34", 1, 0.20),
            ),
        ),
        "windows": tuple(
            WindowSums(tokens=511, nll_base=1236.0 + i, nll_variant=1243.0 + i, kl_nats=15.9, same_top1=478)
            for i in range(32)
        ),
    }
    return Report.model_validate(fields | changes)


def full_report() -> Report:
    """Return a report that has all that version 2 added."""
    plain = make_report()
    kernel = KernelNoise(attention="eager", kl_nats=0.001, same_top1=0.98, ln_ratio=0.0)
    spilled = Spilled(size_bytes=1000, kl_nats=0.0, nll_nats=0.0)
    paper = OtherProtocol(
        name="wikitext2-gptq",
        text=text_record(),
        tokens=2047,
        ppl_base=70,
        ppl_variant=71,
        ln_ratio=estimate(0.01, 0.001),
    )
    return plain.model_copy(
        update={
            "noise_floor": plain.noise_floor.model_copy(update={"kernel": kernel}),
            "engine": plain.engine.model_copy(update={"spilled": spilled}),
            "gate": GateUsed(recipe="w4a16", margins={"kl_nats": 0.05}, overridden=("kl_nats",)),
            "other_protocols": (paper,),
        }
    )


def write_validation(directory: Path, **changes: Any) -> Report:
    """Write the record of a validated variant into a checkpoint's directory, and its report beside it."""
    checkpoint = Checkpoint.open(directory)
    record = quantized_record()
    assert record.quantization
    quantization = record.quantization.model_copy(update={"size_bytes": checkpoint.size_bytes})
    subject = Subject(
        recipe=quantization.recipe,
        recipe_sha256=quantization.recipe_sha256,
        scheme=quantization.scheme,
        size_bytes=checkpoint.size_bytes,
        files=tuple(
            FileDigest(path=path.name, sha256=file_sha256(path), size_bytes=path.stat().st_size)
            for path in checkpoint.shards
        ),
    )
    report = make_report(**{"subject": subject, **changes})
    record.model_copy(update={"quantization": quantization, "validation": report.summary()}).write(directory)
    report_directory(directory).mkdir(exist_ok=True)
    (report_directory(directory) / REPORT_NAME).write_bytes(report.encode())
    return report
