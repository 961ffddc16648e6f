"""Where a run's journal lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_pack.quantization import journal

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_another_version_does_not_go_on_with_an_earlier_ones_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = {"recipe": "0" * 64}
    ours = journal.journal_directory(tmp_path / "variant", identity)
    assert journal.journal_directory(tmp_path / "variant", identity) == ours
    monkeypatch.setattr(journal, "__version__", "99")
    assert journal.journal_directory(tmp_path / "variant", identity) != ours
