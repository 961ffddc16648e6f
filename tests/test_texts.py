"""Windows of text: one <bos> each, disjoint, chosen by the seed, and every refusal a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_pack import wikitext2
from gemma_pack.errors import CheckpointError, OfflineError, TextError
from gemma_pack.text_sources import builtin_halves, require_text
from gemma_pack.texts import load_windows
from tests.dataset_hub import COMMIT, DatasetHub

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small tokenizer of Gemma's kind: BPE with byte fallback, `▁` for space, <bos> added by default."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *byte_tokens], show_progress=False)
    tok.train_from_iterator(builtin_halves()[0][:3], trainer)
    state = json.loads(tok.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tok = Tokenizer.from_str(json.dumps(state))
    tok.add_special_tokens([AddedToken(name, special=True) for name in special])
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    directory = tmp_path_factory.mktemp("tokenizer")
    tok.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


class Heard:
    """A reporter that remembers its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_builtin_windows_start_with_one_bos_and_are_reproducible(tokenizer: Path) -> None:
    first = load_windows("builtin", "calibration", tokenizer, samples=8, sequence_length=64, seed=1)
    again = load_windows("builtin", "calibration", tokenizer, samples=8, sequence_length=64, seed=1)
    other = load_windows("builtin", "calibration", tokenizer, samples=8, sequence_length=64, seed=2)
    assert first.ids.shape == (8, 64)
    assert first.ids.dtype == np.int32
    assert (first.ids[:, 0] == 2).all()
    assert (first.ids == 2).sum() == 8
    assert first.record == again.record
    assert first.record.sha256 != other.record.sha256
    assert first.record.windows == first.asked == 8


def test_fewer_windows_are_a_subset_of_more(tokenizer: Path) -> None:
    few = load_windows("builtin", "evaluation", tokenizer, samples=4, sequence_length=64, seed=5)
    more = load_windows("builtin", "evaluation", tokenizer, samples=9, sequence_length=64, seed=5)
    assert {tuple(row) for row in few.ids.tolist()} < {tuple(row) for row in more.ids.tolist()}


def test_the_two_halves_of_the_builtin_text_share_no_paragraph_and_are_of_one_size() -> None:
    calibration, evaluation = builtin_halves()
    paragraphs = [{p.strip() for text in half for p in text.split("\n\n")} for half in (calibration, evaluation)]
    assert not paragraphs[0] & paragraphs[1]
    sizes = [sum(map(len, half)) for half in (calibration, evaluation)]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sum(sizes)
    assert min(sizes) > 100_000


def test_no_window_of_one_half_is_in_the_other(tokenizer: Path) -> None:
    halves = [
        load_windows("builtin", purpose, tokenizer, samples=10_000, sequence_length=64, seed=0)
        for purpose in ("calibration", "evaluation")
    ]
    rows = [{tuple(row) for row in half.ids.tolist()} for half in halves]
    assert not rows[0] & rows[1], "a window of the calibration half is in the evaluation half"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(min_size=1).filter(str.strip))
def test_bytes_of_the_windows_are_the_bytes_of_the_text(tokenizer: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "prose.txt"
    path.write_bytes(text.encode("utf-8", "ignore") + b"\n\nand a tail that fills the window")
    written = path.read_text("utf-8")
    windows = load_windows(str(path), "evaluation", tokenizer, samples=10**6, sequence_length=2, seed=0)
    assert windows.text_bytes.sum() == len(written.encode())
    assert (windows.ids[:, 0] == 2).all()
    assert (windows.ids[:, 1] != 2).all()


def test_a_special_token_spelled_out_in_prose_is_plain_text(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text("Some say <bos> and mean it. <end_of_turn> too. " * 10)
    windows = load_windows(str(path), "evaluation", tokenizer, samples=4, sequence_length=16, seed=0)
    assert (windows.ids[:, 1:] == 2).sum() == 0
    assert (windows.ids == 5).sum() == 0


def test_lines_of_text_are_joined_by_blank_lines(tokenizer: Path, tmp_path: Path) -> None:
    lines, joined = tmp_path / "lines.jsonl", tmp_path / "joined.txt"
    pieces = [f"Piece {i} has a line separator \u2028 in it." for i in range(30)]
    lines.write_text("\n".join(json.dumps({"text": piece}, ensure_ascii=False) for piece in pieces), "utf-8")
    joined.write_text("\n\n".join(pieces), "utf-8")
    of_lines, of_text = (
        load_windows(str(path), "calibration", tokenizer, samples=5, sequence_length=32, seed=0)
        for path in (lines, joined)
    )
    assert of_lines.record.sha256 == of_text.record.sha256


def test_chats_are_rendered_by_the_template_and_have_one_bos(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turn = [{"role": "user", "content": "What is a generator?"}, {"role": "model", "content": "A function. <bos>"}]
    path.write_text("\n".join(json.dumps({"messages": turn}) for _ in range(20)))
    windows = load_windows(str(path), "calibration", tokenizer, samples=6, sequence_length=40, seed=0)
    assert windows.ids.shape == (6, 40)
    assert (windows.ids == 2).sum() == 6
    assert (windows.ids == 4).sum() >= 6  # <start_of_turn> stays a special token
    assert list(windows.ids[0, :2]) == [2, 4]


def test_a_chat_that_the_template_refuses_is_named(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "Be brief."}]}))
    with pytest.raises(TextError, match=r"conversation 1 of chats.jsonl .*System role") as caught:
        load_windows(str(path), "calibration", tokenizer, samples=1, sequence_length=16, seed=0)
    assert caught.value.hint


def test_fewer_windows_than_asked_are_a_warning_and_recorded(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Only a little text, but enough for a window or two. " * 4)
    heard = Heard()
    windows = load_windows(str(path), "evaluation", tokenizer, samples=512, sequence_length=32, seed=0, reporter=heard)  # type: ignore[arg-type]
    assert windows.asked == 512
    assert windows.record.windows == len(windows.ids) < 512
    assert str(len(windows.ids)) in heard.warnings[0]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", "", "empty.txt holds no text"),
        ("blank.txt", " \n\n ", "blank.txt holds no text"),
        ("empty.jsonl", "\n", "empty.jsonl holds no text"),
        ("tiny.txt", "Hi.", "too few for one window"),
        ("broken.jsonl", '{"text": "a"}\n{"text"', r"broken.jsonl:2: not JSON"),
        ("half.jsonl", '{"text": "a"}\n{"text": "cut \\ud83d"}', r"half.jsonl:2: '\\ud83d' is half of a character"),
        (
            "chat.jsonl",
            '{"messages": [{"role": "user", "content": "cut \\ud83d"}]}',
            r"chat.jsonl:1: '\\ud83d' is half of a character",
        ),
        ("odd.jsonl", '{"prompt": "a"}', r"odd.jsonl:1: neither a text nor a chat"),
        ("list.jsonl", '["a"]', r"list.jsonl:1: neither a text nor a chat"),
        ("chat.jsonl", '{"messages": [{"role": "user"}]}', r"chat.jsonl:1: neither a text nor a chat"),
        ("mixed.jsonl", '{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}', "mixes"),
        ("table.csv", "a,b", "neither a .txt nor a .jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    tokenizer: Path, tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=sentence):
        load_windows(str(tmp_path / name), "calibration", tokenizer, samples=1, sequence_length=16, seed=0)


def test_a_missing_file_is_no_hub_dataset(tokenizer: Path) -> None:
    with pytest.raises(TextError, match="there is no file"):
        load_windows("corpora/missing.txt", "calibration", tokenizer, samples=1, sequence_length=16, seed=0)


def test_latin_1_is_refused_with_the_place(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(TextError, match="not UTF-8: byte 3 is 0xe9"):
        load_windows(str(tmp_path / "old.txt"), "calibration", tokenizer, samples=1, sequence_length=16, seed=0)


def test_an_unknown_name_lists_what_a_text_can_be(tokenizer: Path) -> None:
    with pytest.raises(TextError, match="no text named wikitext") as caught:
        load_windows("wikitext", "evaluation", tokenizer, samples=1, sequence_length=16, seed=0)
    assert "builtin" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("purpose", "remedy"), [("calibration", "--calibration builtin"), ("evaluation", "--text builtin")]
)
def test_a_dataset_out_of_reach_names_the_remedy_and_is_not_swapped(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, purpose: str, remedy: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(OfflineError, match="out of reach") as caught:
        load_windows(
            "nobody/nothing", purpose, tokenizer, samples=1, sequence_length=16, seed=0, offline=True  # type: ignore[arg-type]
        )  # fmt: skip
    assert remedy in (caught.value.hint or "")
    assert caught.value.exit_code == 14


LOADING = """
import sys
from pathlib import Path
from gemma_pack.errors import GemmaPackError
from gemma_pack.texts import load_windows
try:
    windows = load_windows(sys.argv[2], "evaluation", Path(sys.argv[1]), samples=4, sequence_length=64, seed=0,
                           split="test", offline=sys.argv[3] == "offline")
    print(windows.record.model_dump_json())
except GemmaPackError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def load(tokenizer: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that loads a dataset in a process of its own, whose hub is at `url`: it reads that once."""

    def run(url: str, spec: str, network: str = "online") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        environment.pop("HF_HUB_OFFLINE", None)
        return subprocess.run(
            [sys.executable, "-c", LOADING, str(tokenizer), spec, network],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_a_dataset_is_pinned_to_the_hubs_commit_and_found_again_offline(
    load: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    rows = "\n".join(json.dumps({"text": f"Line {i} of a text that the hub has."}) for i in range(100))
    with DatasetHub("someone/corpus", {"test.jsonl": rows.encode(), "README.md": b"# A corpus\n"}) as url:
        fetched = load(url, "someone/corpus")
    assert fetched.returncode == 0, fetched.stderr
    assert json.loads(fetched.stdout)["spec"] == f"someone/corpus@{COMMIT}"
    assert load(url, "someone/corpus", "offline").stdout == fetched.stdout
    assert load(url, f"someone/corpus@{COMMIT}", "offline").stdout == fetched.stdout
    other = load(url, f"someone/corpus@{'e' * 40}", "offline")
    assert other.returncode == 14
    assert f"the cache has someone/corpus at {COMMIT}" in other.stdout


WIKITEXT2 = """
import sys
from pathlib import Path
from gemma_pack import texts, wikitext2
from gemma_pack.errors import GemmaPackError
wikitext2.SHA256, offline = sys.argv[2], sys.argv[3] == "offline"
texts.GPTQ_TOKENS = 64
try:
    tokenizer = Path(sys.argv[1])
    shape = {"samples": 9, "sequence_length": 64, "seed": 0}
    ours = texts.load_windows("wikitext2", "evaluation", tokenizer, **shape, offline=offline)
    papers = texts.load_gptq_windows(tokenizer, offline=offline)
    print(ours.record.spec)
    print(*ours.ids.ravel())
    print(*papers.ids.ravel())
    print(*papers.text_bytes)
except GemmaPackError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_wikitext2_is_pinned_and_cut_by_both_protocols(tokenizer: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet
    from tokenizers import Tokenizer

    lines = ["", " = A title = \n", "", *(f" Line {number} of the text , with words . \n" for number in range(40))]
    parquet.write_table(pa.table({"text": lines}), tmp_path / "test.parquet")
    content = (tmp_path / "test.parquet").read_bytes()
    digest = hashlib.sha256(content).hexdigest()

    def run(url: str, digest: str, network: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-c", WIKITEXT2, str(tokenizer), digest, network]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    with DatasetHub(wikitext2.REPOSITORY, {wikitext2.FILE: content}, commit=wikitext2.COMMIT) as url:
        missing = run(url, digest, "offline")
        assert missing.returncode == 14
        assert "WikiText-2 is out of reach and not in the cache" in missing.stdout
        found = run(url, digest, "online")
        assert found.returncode == 0, found.stderr
        assert run(url, digest, "offline").stdout == found.stdout
        other = run(url, "0" * 64, "offline")
        assert other.returncode == 1
        assert f"sha256 {digest[:16]}…, not 0000000000000000…" in other.stdout
    spec, ours, papers, text_bytes = found.stdout.splitlines()
    assert spec == wikitext2.ORIGIN
    tok = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    bos = tok.token_to_id("<bos>")
    stream = tok.encode("\n\n".join(lines), add_special_tokens=False).ids
    read = [int(token) for token in papers.split()]
    assert read == [bos, *stream][: len(read)]
    assert len(read) == (len(stream) + 1) // 64 * 64
    firsts = {int(token) for token in ours.split()[::64]}
    assert firsts == {bos}
    assert ours.split().count(str(bos)) == 9
    assert sum(map(int, text_bytes.split())) <= len("\n\n".join(lines))


def test_a_dataset_with_other_columns_is_refused(load: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with DatasetHub("someone/table", {"test.jsonl": b'{"a": 1, "b": 2}'}) as url:
        refused = load(url, "someone/table")
    assert refused.returncode == 1
    assert "neither a text nor a messages column; it has a, b" in refused.stdout


def test_a_gated_dataset_exits_13(load: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with DatasetHub("someone/secret", {}, gated=True) as url:
        refused = load(url, "someone/secret")
    assert refused.returncode == 13, refused.stderr
    assert "is gated" in refused.stdout


@pytest.mark.parametrize(
    ("spec", "answer", "code", "message"),
    [
        ("someone/corpus@v9", (404, {"X-Error-Code": "RevisionNotFound"}), 1, "has no revision v9"),
        ("someone/corpus", (401, {"X-Error-Message": "Invalid credentials in Authorization header"}), 13, "(401)"),
        ("someone/corpus", (403, {}), 13, "refused access to the dataset someone/corpus (403)"),
        ("someone/corpus", (418, {}), 1, "the hub answered 418 for the dataset someone/corpus"),
        ("someone/cor..pus", None, 1, "someone/cor..pus is no name that the hub gives a dataset"),
        ("someone/corpus.git", None, 1, "someone/corpus.git is no name that the hub gives a dataset"),
    ],
)
def test_a_dataset_that_the_hub_refuses_is_not_taken_for_a_hub_out_of_reach(
    load: Callable[..., subprocess.CompletedProcess[str]],
    spec: str,
    answer: tuple[int, dict[str, str]] | None,
    code: int,
    message: str,
) -> None:
    with DatasetHub("someone/corpus", {}, refusal=answer) as url:
        refused = load(url, spec)
    assert refused.returncode == code, refused.stderr
    assert message in refused.stdout
    assert len(refused.stdout.splitlines()) == 1


def test_a_hub_that_does_not_answer_exits_14(load: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with DatasetHub("someone/corpus", {}) as url:
        pass
    assert load(url, "someone/corpus").returncode == 14


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_windows("builtin", "calibration", tmp_path, samples=1, sequence_length=16, seed=0)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no valid tokenizer"):
        load_windows("builtin", "calibration", tmp_path, samples=1, sequence_length=16, seed=0)


def test_plain_text_needs_no_torch(tokenizer: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gemma_pack.texts import load_windows\n"
        f"load_windows('builtin', 'calibration', Path({str(tokenizer)!r}), samples=2, sequence_length=16, seed=0)\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False)
    assert result.returncode == 0


@pytest.mark.parametrize("spec", ["nowhere.txt", "nowhere.jsonl", "no such text"])
def test_a_text_that_cannot_be_is_refused_before_anything_is_fetched(spec: str) -> None:
    with pytest.raises(TextError, match="there is no"):
        require_text(spec)


def test_texts_that_may_be_are_not_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for spec in ("builtin", str(tmp_path / "a.txt"), "owner/name", "owner/name:config"):
        require_text(spec)
