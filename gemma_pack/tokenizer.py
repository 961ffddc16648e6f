"""The tokenizer of a checkpoint, from its tokenizer.json alone: no code of a model's, no transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gemma_pack.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

BOS: Final = "<bos>"


def load_tokenizer(directory: Path) -> tuple[Tokenizer, int]:
    """Return the tokenizer of the checkpoint in `directory`, without truncation or padding, and the id of <bos>.

    Raises:
        CheckpointError: there is no tokenizer.json, it is broken, or it has no <bos>.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no tokenizer.json", hint="copy the model's tokenizer files into it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself on a broken file
        raise CheckpointError(f"{path} is no valid tokenizer: {error}", hint="fetch the file again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos = tokenizer.token_to_id(BOS)
    if bos is None:
        raise CheckpointError(
            f"{path} has no {BOS}: it is not Gemma's tokenizer", hint="copy the model's own tokenizer files"
        )
    return tokenizer, bos
