"""README.md of a variant: the model card, written from the record alone.

Front matter as the hub reads it (https://huggingface.co/docs/hub/model-cards), with the keys that Red Hat's catalog
reads besides. Every number comes from gemma-pack.json, so writing the card again after a validation changes
nothing but what was measured. Its snippets are whole programs, in the interfaces of transformers 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import yaml

from gemma_pack.checkpoint import read_json
from gemma_pack.disk import write_atomic
from gemma_pack.errors import CheckpointError
from gemma_pack.record import require_record
from gemma_pack.reports import benchmarks, wording
from gemma_pack.reports.templating import template

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.record import Record

CARD_NAME: Final = "README.md"
CHAT_PROMPT: Final = "Write me a poem about Machine Learning."
"""The prompt of the Gemma model card."""
TEXT_PROMPT: Final = "The sky is blue because"
INFERENCE_SERVER_IMAGE: Final = "registry.redhat.io/rhaii/vllm-cuda-rhel9:3.4.0"
VLLM_IMAGE: Final = "docker.io/vllm/vllm-openai:v0.30.0"
"""The servers that `deploy` runs too."""
_TERMS: Final = "https://ai.google.dev/gemma/terms"
SEEING: Final = frozenset({"gemma3", "gemma4", "gemma4_unified"})
"""Model types of config.json that take images."""
HUB_LICENSES: Final = frozenset({
    "gemma", "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0", "openrail", "unlicense", "unknown",
})  # fmt: skip
"""Of those that the hub takes by name (https://huggingface.co/docs/hub/repositories-licenses), what Gemmas come under.
It refuses a card with another name; that goes under `other`, with a `license_name`."""
_LANGUAGES: Final = {"gemma2": "en"}
"""Gemma 2's report names English as its language; later members are multilingual."""


def write_card(directory: Path) -> Path:
    """Write README.md into the variant `directory`, replacing it in one step, and return its path.

    Raises:
        CheckpointError: the directory has no record, or one without a quantization.
    """
    path = directory / CARD_NAME
    write_atomic(path, render_card(directory))
    return path


def render_card(directory: Path) -> str:
    """Return the text of the card of the variant in `directory`."""
    record = require_record(directory)
    if record.quantization is None:
        raise CheckpointError(
            f"{directory} is no variant: its record has no quantization", hint="run gemma-pack quantize first"
        )
    source, validation = record.source, record.validation
    model = _Model.read(directory)
    matter = yaml.safe_dump(front_matter(record, model.model_type), sort_keys=False, allow_unicode=True, width=1000)
    return template("card.md.j2").render(
        front_matter=matter,
        name=variant_name(record),
        record=record,
        source=source,
        quantization=record.quantization,
        validation=validation,
        base_link=f"[{source.model_id}](https://huggingface.co/{source.model_id})"
        if _is_on_hub(record)
        else source.model_id,
        rows=benchmarks.benchmark_rows(validation.metrics) if validation else [],
        header=benchmarks.benchmark_header(validation.confidence or 0.95) if validation else (),
        verdict_words=wording.VERDICT_WORDS,
        model=model,
        chat_prompt=CHAT_PROMPT,
        text_prompt=TEXT_PROMPT,
        inference_server_image=INFERENCE_SERVER_IMAGE,
        vllm_image=VLLM_IMAGE,
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """What the checkpoint says of itself."""

    model_type: str
    chat: bool
    """Whether it has a chat template, and so answers turns."""

    @property
    def sees(self) -> bool:
        return self.model_type in SEEING

    @classmethod
    def read(cls, directory: Path) -> _Model:
        model_type = str(read_json(directory / "config.json").get("model_type", "gemma"))
        return cls(model_type, has_chat_template(directory))


def front_matter(record: Record, model_type: str) -> dict[str, Any]:
    """Return the card's metadata.

    `validated_on` holds what the recorded validation ran on and nothing else, and is left out where there is none.
    """
    source, quantization, validation = record.source, record.quantization, record.validation
    scheme = quantization.scheme if quantization else "bf16"
    sees = model_type in SEEING
    matter: dict[str, Any] = {
        "language": [_LANGUAGES.get(model_type, "multilingual")],
        "license": source.license if source.license in HUB_LICENSES else "other",
    }
    if source.license == "gemma":
        matter |= {"license_name": "gemma", "license_link": _TERMS}
    elif matter["license"] == "other":
        matter["license_name"] = re.sub(r"[^a-z0-9.]+", "-", source.license.lower()).strip("-")
    if _is_on_hub(record):
        matter |= {"base_model": source.model_id, "base_model_relation": "quantized"}
    matter |= {
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "library_name": "transformers",
        "name": variant_name(record),
        "description": f"{source.model_id}, quantized to {scheme}",
        "readme": CARD_NAME,
        "tasks": ["image-text-to-text" if sees else "text-to-text"],
        "provider": "Google",
    }
    if validation:
        matter["validated_on"] = [validation.engine]
    return matter | {"tags": _tags(record, model_type)}


def variant_name(record: Record) -> str:
    """Return the name that the variant goes by wherever it lies: the base's short name and the recipe."""
    recipe = record.quantization.recipe if record.quantization else "bf16"
    return f"{record.source.model_id.rsplit('/', 1)[-1].lower()}-quantized.{recipe}"


def has_chat_template(directory: Path) -> bool:
    """Say whether the tokenizer in `directory` has a chat template, in a file of its own or in its config."""
    config = directory / "tokenizer_config.json"
    return (directory / "chat_template.jinja").is_file() or (
        config.is_file() and bool(read_json(config).get("chat_template"))
    )


def _is_on_hub(record: Record) -> bool:
    return record.source.kind != "directory" or "/" in record.source.model_id


def _tags(record: Record, model_type: str) -> list[str]:
    quantization = record.quantization
    family = "gemma" + "".join(character for character in model_type if character.isdigit())[:1]
    tags = ["gemma", family, "gemma-pack"]
    if quantization:
        if quantization.format == "compressed-tensors":
            tags.insert(2, "vllm")
        tags += [quantization.recipe, quantization.format, quantization.algorithm, quantization.scheme.split()[0]]
    return list(dict.fromkeys(tags))
