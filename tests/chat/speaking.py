"""`gemma-pack chat` with a speaker instead of a model: it echoes, counts without end, or overflows.

    python tests/chat/speaking.py DIRECTORY [OPTIONS]

DIRECTORY holds a tokenizer. An echo answers with the question; `count` counts until it is stopped.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_pack.chat.sampling import GREEDY
from gemma_pack.chat.template import Language
from gemma_pack.commands import main, speaking
from gemma_pack.errors import InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Echo:
    """Answers by what the last question says."""

    ends = frozenset({1})

    def __init__(self, language: Language) -> None:
        self.language = language

    def stream(self, ids: Sequence[int], sampling: object, limit: int) -> Iterator[int]:
        del sampling, limit
        text = self.language.tokenizer.decode(list(ids), skip_special_tokens=False)
        questions = text.split("<start_of_turn>user\n")[1:]
        last = questions[-1].split("<end_of_turn>")[0]
        if last == "overflow":
            raise InvalidUsageError("9 tokens do not fit into a context of 8", hint="begin a new session")
        if last == "count":
            for number in itertools.count(1):
                time.sleep(0.01)
                yield from self.language.tokenizer.encode(f"<{number}>", add_special_tokens=False).ids
        yield from self.language.tokenizer.encode(f"{len(questions)}:{last!r}", add_special_tokens=False).ids
        yield 1


if __name__ == "__main__":
    known = Language(Path(sys.argv[1]))
    speaking.open_checkpoint = lambda *_: speaking.Opened(None, None, known, GREEDY)  # type: ignore[arg-type, assignment]

    def load(*_: Any, **__: Any) -> Any:
        return Echo(known)

    speaking.load = load
    sys.argv = ["gemma-pack", "chat", *sys.argv[1:]]
    main()
