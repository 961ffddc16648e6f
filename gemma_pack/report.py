"""report.json: what a validation measured, how sure it is, and the verdict that follows.

Evaluation fills it and reports render it, so it lives below both. It holds nothing that differs between two
identical runs (no dates or durations): the record in the variant names it by its sha256. Logarithms are natural.
`reports/report.schema.json` is its JSON Schema. A report of an older version is read, and written again byte for byte.
The formulas are llama.cpp's (`tools/perplexity`) unless said otherwise, with base first:
nll = -ln p(x_t | x_<t), d = nll_variant - nll_base, KL = Σ_v p_base(v) (ln p_base(v) - ln p_variant(v)).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gemma_pack import __version__
from gemma_pack.audit_results import WeightAudit  # noqa: TC001 - pydantic needs it at run time
from gemma_pack.errors import GemmaPackError
from gemma_pack.record import FileDigest, Metric, TextRecord, ValidationRecord
from gemma_pack.task_results import TaskReport  # noqa: TC001 - pydantic needs it at run time

if TYPE_CHECKING:
    from pathlib import Path

REPORT_NAME: Final = "report.json"
MINIMUM_WINDOWS: Final = 32
"""With fewer the bootstrap's bounds are not trusted enough to let a variant pass."""
Verdict = Literal["pass", "fail", "undecided"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Subject(_Part):
    """The variant that was judged."""

    recipe: str
    recipe_sha256: str
    scheme: str
    size_bytes: int
    """Of its tensors."""
    files: tuple[FileDigest, ...]
    """Its safetensors files."""


class Base(_Part):
    """The bf16 model that it was judged against."""

    kind: str
    model_id: str
    revision: str | None = None
    note: str | None = None
    parameters: int
    size_bytes: int
    weights_sha256: str | None = None
    """Over a line "sha256 name" for each safetensors file, sorted by name; None in reports from before it was kept."""


class Spilled(_Part):
    """What was kept on disk of the base, when it had to make room for the variant: its last hidden states, in bf16.

    With the base's output head, which stays, they give its log-probabilities again. The error is what was measured
    between those and the base's own, on the first windows.
    """

    size_bytes: int
    kl_nats: float
    nll_nats: float
    """The largest difference of a token's -ln p."""


class Engine(_Part):
    """What computed the probabilities."""

    name: str
    versions: dict[str, str]
    device: str
    attention: str
    dtype: str = "bfloat16"
    base: str | None = None
    """What computed those of the base, where it was another engine."""
    spilled: Spilled | None = None
    """None where both models were in memory together."""


class BosCheck(_Part):
    """Perplexity of the base on the same tokens with <bos> in front and without."""

    with_bos: float
    without_bos: float


class Protocol(_Part):
    """Which tokens were scored, and how: disjoint windows, <bos> before each, every real token scored once."""

    name: Literal["windows-bos"] = "windows-bos"
    profile: str
    text: TextRecord
    tokens: int
    """Scored tokens; <bos> is not scored."""
    text_bytes: int
    bos_check: BosCheck
    first_look_windows: int | None = None
    """How many windows had left it undecided, before more were taken; None where these were the first."""


class Method(_Part):
    """How bounds were drawn: windows are resampled whole, base and variant together."""

    name: Literal["paired block bootstrap over windows, BCa"] = "paired block bootstrap over windows, BCa"
    confidence: float
    """One-sided. Where a second look was allowed, each has half of the 5 % (Bonferroni)."""
    draws: int
    seed: int


class Estimate(_Part):
    """A mean over scored tokens, its one-sided bounds and how they came about."""

    value: float
    lower: float
    upper: float
    standard_error: float
    """Of the bootstrap, which keeps tokens of a window together."""
    iid_standard_error: float
    """As if tokens were independent."""

    @property
    def design_effect(self) -> float | None:
        """How many times more tokens are needed because tokens of a window go together; None without spread."""
        return (self.standard_error / self.iid_standard_error) ** 2 if self.iid_standard_error else None


class KernelNoise(_Part):
    """The base against itself with another attention kernel."""

    attention: str
    kl_nats: float
    same_top1: float
    ln_ratio: float


class NoiseFloor(_Part):
    """The base against itself in batches of another size: what bf16 arithmetic alone costs on this machine.

    A variant's divergence below this says nothing about quantization.
    """

    windows: int
    batch: int
    """Windows at once; 1 or 2, whichever scoring does not use."""
    kl_nats: float
    same_top1: float
    ln_ratio: float
    kernel: KernelNoise | None = None
    """None where the family has one attention kernel."""


class Likelihood(_Part):
    """Perplexity of both and what lies between them."""

    ppl_base: float
    ppl_variant: float
    ppl_base_standard_error: float
    ppl_variant_standard_error: float
    """By the delta method from the bootstrap's error of the mean nll."""
    ln_ratio: Estimate
    """Mean d = ln(PPL_variant / PPL_base)."""
    bits_per_byte_base: float
    bits_per_byte_variant: float


class OtherProtocol(_Part):
    """Perplexity by a protocol that others publish figures of; it is not judged."""

    name: Literal["wikitext2-gptq"]
    text: TextRecord
    tokens: int
    ppl_base: float
    ppl_variant: float
    ln_ratio: Estimate


class GateUsed(_Part):
    """The margins that judged, and where they come from."""

    recipe: str
    margins: dict[str, float]
    overridden: tuple[str, ...] = ()
    """Those that --gate gave instead of the recipe."""


class PositionBin(_Part):
    """Mean KL of the tokens at places [begin, end) of their windows; place 1 is the first after <bos>."""

    begin: int
    end: int
    kl_nats: float


class KindMean(_Part):
    """Mean KL of the tokens of one kind, such as digits."""

    kind: str
    tokens: int
    kl_nats: float


class HistogramBin(_Part):
    """Number of tokens with KL in [begin, end) nats; the first bin begins at 0."""

    begin: float
    end: float
    tokens: int


class TokenSpot(_Part):
    """One of the tokens with the largest KL: what came before, what was read, what each model expected."""

    context: str
    token: str
    kl_nats: float
    base_top1: str
    variant_top1: str


class TopK(_Part):
    """What a server lets one see of a distribution: its k most likely tokens.

    Then the percentiles, places, kinds and worst tokens of the divergence are of the lower bound, while its mean has
    the rest in it, as the text samples it.
    """

    k: int
    kl_lower_bound_nats: float
    """Mean KL with all tokens outside both top k taken for one: never more than the KL."""
    share_outside: float
    """Mean share, 0 to 1, of the base's probability that lies outside."""


class Divergence(_Part):
    """How far the variant's distribution is from the base's, token by token."""

    kl_nats: Estimate
    top_k: TopK | None = None
    """None where the whole distribution was seen."""
    kl_percentiles: dict[str, float]
    """Keys: min, 0.1, 1, 5, 10, 50, 90, 95, 99, 99.9, max."""
    same_top1: Estimate
    """Share, 0 to 1, of tokens where both rank the same token first."""
    delta_p_rms: float
    """Root mean square of Δp = p_variant(x_t) - p_base(x_t)."""
    delta_p_percentiles: dict[str, float]
    by_position: tuple[PositionBin, ...]
    by_kind: tuple[KindMean, ...]
    histogram: tuple[HistogramBin, ...]
    worst: tuple[TokenSpot, ...]


class WindowSums(_Part):
    """Sums over the scored tokens of one window; all estimates can be computed again from these."""

    tokens: int
    nll_base: float
    nll_variant: float
    kl_nats: float
    same_top1: int


class PromptParity(_Part):
    """Greedy answers of both to one prompt."""

    prompt: str
    templated: bool
    """Whether the chat template was applied."""
    base: str
    variant: str
    tokens: int
    """Tokens of the base's answer, its end token included."""
    first_divergent: int | None = None
    """Index in the answer of the first token that differs; None when both are the same."""
    near_tie: bool
    """At that token each side's choice is in the other's top 5 and the base was within 0.5 nats of undecided
    (vLLM's `check_logprobs_close`, with a margin added)."""
    divergent_share: float
    """Share of positions where the variant, fed the base's own answer, would have chosen another token."""
    variant_repeats: float
    """Share of the variant's 4-grams that it had used before."""
    base_ended: bool
    variant_ended: bool
    """Whether the answer ended by itself before the limit."""
    variant_empty: bool
    """Nothing but white space, where the base had an answer: the gate fails."""


class Parity(_Part):
    """Greedy generation side by side."""

    limit: int
    """Most tokens an answer may have."""
    identical_share: float
    divergent_share: float
    """Over all positions of all the base's answers, teacher-forced (SDT of arXiv 2311.01544)."""
    prompts: tuple[PromptParity, ...]


class Report(_Part):
    """All of report.json."""

    schema_version: Literal[1, 2] = 2
    """2 added gate, other_protocols, the kernel of noise_floor, spilled and first_look_windows, all None in a 1."""
    gemma_pack_version: str = __version__
    verdict: Verdict
    windows_needed: int | None = None
    """How many windows would likely decide an undecided verdict; None where no affordable number would."""
    subject: Subject
    base: Base
    engine: Engine
    protocol: Protocol
    method: Method
    gate: GateUsed | None = None
    metrics: tuple[Metric, ...]
    noise_floor: NoiseFloor
    likelihood: Likelihood
    divergence: Divergence
    parity: Parity
    other_protocols: tuple[OtherProtocol, ...] | None = None
    audit: WeightAudit | None = None
    """None for a variant whose layers are not quantized, and in reports from before there was an audit."""
    tasks: TaskReport | None = None
    """None where no tasks were asked for."""
    windows: tuple[WindowSums, ...]

    def encode(self) -> bytes:
        """Return the bytes of report.json."""
        return (self.model_dump_json(indent=2, exclude_none=True) + "\n").encode()

    def digest(self) -> str:
        """Return the sha256 of report.json."""
        return hashlib.sha256(self.encode()).hexdigest()

    def summary(self) -> ValidationRecord:
        """Return what the variant's record keeps of this report."""
        return ValidationRecord(
            verdict=self.verdict,
            report_sha256=self.digest(),
            engine=f"{self.engine.name} {self.engine.versions.get(self.engine.name, '')}".strip(),
            profile=self.protocol.profile,
            evaluation=self.protocol.text,
            confidence=self.method.confidence,
            metrics=self.metrics,
        )


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of report.json as it is written now."""
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def read_report(path: Path) -> Report:
    """Return the report in the file `path`, or in the directory `path`.

    Raises:
        GemmaPackError: it is missing, broken, or of a version that this gemma-pack does not know.
    """
    again = "run gemma-pack validate again"
    path = path / REPORT_NAME if path.is_dir() else path
    try:
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise GemmaPackError(f"there is no {path}", hint="gemma-pack validate writes one") from error
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("schema_version",):
            again = "a later gemma-pack wrote it: upgrade this one"
        place = ".".join(map(str, first["loc"])) or "top level"
        raise GemmaPackError(f"{path} is no valid report: {place}: {first['msg']}", hint=again) from error


def report_directory(variant: Path) -> Path:
    """Return where the report on a variant lies unless told: beside its directory or the layout packed from it."""
    named = variant if variant.name not in {"", ".."} else variant.resolve()
    stem = named.name.removesuffix(".oci").removesuffix(".artifact") if named.suffix == ".oci" else named.name
    return named.with_name(f"{stem}.report")
