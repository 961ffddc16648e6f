"""README.md of a variant: the model card, written from the record alone.

Front matter as the hub reads it (https://huggingface.co/docs/hub/model-cards). Every number comes from
gemma-pack.json, so writing the card again after a validation changes nothing but what was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gemma_pack.checkpoint import read_json
from gemma_pack.disk import write_atomic
from gemma_pack.errors import CheckpointError
from gemma_pack.record import require_record
from gemma_pack.reports import wording
from gemma_pack.reports.templating import template

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_pack.record import Record

CARD_NAME: Final = "README.md"
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
    model_type = str(read_json(directory / "config.json").get("model_type", "gemma"))
    source, validation = record.source, record.validation
    base_on_hub = source.kind != "directory" or "/" in source.model_id
    return template("card.md.j2").render(
        name=variant_name(record),
        record=record,
        source=source,
        quantization=record.quantization,
        validation=validation,
        language=_LANGUAGES.get(model_type, "multilingual"),
        tags=_tags(record, model_type),
        base_on_hub=base_on_hub,
        base_link=f"[{source.model_id}](https://huggingface.co/{source.model_id})" if base_on_hub else source.model_id,
        metric_rows=wording.rows(validation.metrics) if validation else [],
        header=wording.HEADER,
        verdict_words=wording.VERDICT_WORDS,
        chat=has_chat_template(directory),
    )


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


def _tags(record: Record, model_type: str) -> list[str]:
    quantization = record.quantization
    family = "gemma" + "".join(character for character in model_type if character.isdigit())[:1]
    tags = ["gemma", family, "vllm", "gemma-pack"]
    if quantization:
        tags += [quantization.recipe, quantization.format, quantization.algorithm, quantization.scheme.split()[0]]
    return list(dict.fromkeys(tags))
