"""What cannot be compared is refused, and the difference named."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from gemma_pack.errors import CheckpointError
from gemma_pack.evaluation.comparable import require_same_base, require_same_language
from gemma_pack.record import FileDigest, SourceRecord

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def pair(raw_checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    base = raw_checkpoint("base")
    shutil.copytree(base, tmp_path / "variant")
    return tmp_path / "variant", base


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_copies_are_comparable(pair: tuple[Path, Path]) -> None:
    require_same_language(*pair)


def test_the_order_of_keys_does_not_count(pair: tuple[Path, Path]) -> None:
    (pair[0] / "tokenizer.json").write_text('{"model":  {"vocab": {"▁a": 1, "<bos>": 0}}}')
    require_same_language(*pair)


def test_another_size_of_vocabulary_is_named(pair: tuple[Path, Path]) -> None:
    change(pair[0] / "config.json", vocab_size=262208)
    change(pair[1] / "config.json", vocab_size=262144)
    with pytest.raises(CheckpointError, match="the variant's vocabulary has 262208 tokens, the base's 262144"):
        require_same_language(*pair)


def test_another_architecture_is_named(pair: tuple[Path, Path]) -> None:
    change(pair[0] / "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match="model_type 'llama', the base's 'gemma3_text'"):
        require_same_language(*pair)


@pytest.mark.parametrize(
    ("vocabulary", "sentence"),
    [
        ({"<bos>": 0, "▁b": 1}, "'▁a' is missing in the variant's, 1 in the base's"),
        ({"<bos>": 1, "▁a": 0}, "'▁a' is 0 in the variant's, 1 in the base's"),
        ({"<bos>": 0, "▁a": 1, "▁c": 2}, "'▁c' is 2 in the variant's, missing in the base's"),
    ],
)
def test_the_first_token_that_differs_is_named(
    pair: tuple[Path, Path], vocabulary: dict[str, int], sentence: str
) -> None:
    change(pair[0] / "tokenizer.json", model={"vocab": vocabulary})
    with pytest.raises(CheckpointError, match=sentence) as caught:
        require_same_language(*pair)
    assert caught.value.hint


def test_another_normalizer_is_named(pair: tuple[Path, Path]) -> None:
    change(pair[0] / "tokenizer.json", normalizer={"type": "NFKC"})
    with pytest.raises(CheckpointError, match=r"'normalizer' of tokenizer\.json"):
        require_same_language(*pair)


def test_another_chat_template_is_named_with_its_line(pair: tuple[Path, Path]) -> None:
    for directory, text in zip(pair, ("a\n<bos>{{ m }}", "a\n{{ bos_token }}{{ m }}"), strict=True):
        (directory / "chat_template.jinja").write_text(text)
    with pytest.raises(CheckpointError, match=r"line 2 is '<bos>\{\{ m \}\}' in the variant's, '\{\{ bos_token \}\}"):
        require_same_language(*pair)


def test_a_missing_chat_template_is_named(pair: tuple[Path, Path]) -> None:
    (pair[0] / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="chat templates differ: the variant has none"):
        require_same_language(*pair)


def test_a_template_in_the_config_is_the_same_as_one_in_a_file(pair: tuple[Path, Path]) -> None:
    template = (pair[0] / "chat_template.jinja").read_text()
    (pair[0] / "chat_template.jinja").unlink()
    change(pair[0] / "tokenizer_config.json", chat_template=template)
    require_same_language(*pair)


def source(**digests: str) -> SourceRecord:
    files = [FileDigest(path=f"{name}.safetensors", sha256=sha * 64, size_bytes=1) for name, sha in digests.items()]
    other = FileDigest(path="README.md", sha256=next(iter(digests.values())) * 64, size_bytes=1)
    return SourceRecord(kind="hub", model_id="google/gemma-2-9b-it", revision="c" * 40, files=(*files, other))


def test_the_same_weights_are_the_same_base_whatever_lies_beside_them() -> None:
    require_same_base(source(a="1", b="2"), source(b="2", a="1"))


@pytest.mark.parametrize("other", [source(a="1", b="3"), source(a="1"), source(a="1", b="2", c="3")])
def test_other_weights_are_another_base(other: SourceRecord) -> None:
    with pytest.raises(CheckpointError, match="a variant of another base: it was made from google/gemma-2-9b-it at c"):
        require_same_base(source(a="1", b="2"), other)
