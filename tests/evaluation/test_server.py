"""A server as a reader: it says what the model says, its faults are told apart, and each prompt has one <bos>."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gemma_pack.errors import AccessError, EngineError, InvalidUsageError, QuantizationError
from gemma_pack.evaluation.engines import server
from gemma_pack.evaluation.engines.server import GREEDY, ServerReader
from tests.evaluation.fake_vllm import FakeVllm, fake_vllm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gemma_pack.texts import Windows

BOS = 2
Connect = Callable[..., ServerReader]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PAUSE_S", 0.001)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def fake(trained: Path) -> Iterator[FakeVllm]:
    with fake_vllm(trained) as running:
        yield running


@pytest.fixture
def connect(fake: FakeVllm) -> Iterator[Callable[..., ServerReader]]:
    """Return a function that connects to the fake; its connections are closed at the end."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(ServerReader(fake.address, "variant", **options)))


def test_what_it_reads_and_answers_is_what_the_model_does(
    fake: FakeVllm, connect: Connect, evaluation_windows: Windows
) -> None:
    rows = evaluation_windows.ids[:3].tolist()
    reader = connect()
    seen: list[int] = []
    found = reader.read(rows, 4, lambda place, _: seen.append(place))
    expected = fake.reader.read(rows, 4)
    assert sorted(seen) == [0, 1, 2]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.ids == theirs.ids).all()
        assert (ours.top_ids == theirs.top_ids).all()
        assert ours.nll == pytest.approx(theirs.nll, abs=1e-5)
        assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-5)
    assert reader.answers([rows[0][:9]], 5) == fake.reader.answers([rows[0][:9]], 5)
    assert "127.0.0.1" in reader.describe().device
    assert reader.describe().versions == {"vllm": "0.32.0"}


def test_every_request_has_one_bos_and_leaves_nothing_to_the_servers_defaults(
    fake: FakeVllm, connect: Connect, evaluation_windows: Windows
) -> None:
    rows = evaluation_windows.ids[:2].tolist()
    reader = connect()
    reader.read(rows, 3)
    reader.answers([rows[0][:5]], 3)
    assert len(fake.asked) == 3
    for body in fake.asked:
        assert body["prompt"].count(BOS) == 1
        assert body["prompt"][0] == BOS
        assert body.items() >= GREEDY.items()


def test_a_moment_of_failure_is_waited_for(fake: FakeVllm, connect: Connect, evaluation_windows: Windows) -> None:
    fake.fail = 2
    assert len(connect().read(evaluation_windows.ids[:1].tolist(), 1)) == 1


def test_a_server_that_stays_down_is_an_error_that_says_what_it_said(
    fake: FakeVllm, connect: Connect, evaluation_windows: Windows
) -> None:
    reader = connect()
    fake.fail = 1000
    with pytest.raises(EngineError, match=r"/v1/completions after \d attempts: 503 the engine is busy$"):
        reader.read(evaluation_windows.ids[:4].tolist(), 1)
    assert len(fake.asked) <= 4 * server.ATTEMPTS
    fake.fail, fake.die_after = 0, 0
    with pytest.raises(EngineError, match="RemoteProtocolError") as caught:
        reader.read(evaluation_windows.ids[:1].tolist(), 1)
    assert caught.value.exit_code == 1


def test_nobody_there(free_port: int) -> None:
    with pytest.raises(EngineError, match="ConnectError"):
        ServerReader(f"http://127.0.0.1:{free_port}", "variant")


@pytest.mark.parametrize("url", ["vllm", "ftp://there", "http://", "localhost:8000"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidUsageError, match="no address of a server"):
        ServerReader(url, "variant")


@pytest.mark.parametrize("url", ["http://localhost:80a0", "http://[::1"])
def test_what_cannot_be_read_as_an_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidUsageError, match="the address of the variant's server is none"):
        ServerReader(url, "variant")


def test_no_login_stands_in_an_address(fake: FakeVllm) -> None:
    with pytest.raises(InvalidUsageError, match="holds a login, which the report would show") as caught:
        ServerReader(fake.address.replace("http://", "http://user:sesame@"), "variant")
    assert "sesame" not in f"{caught.value} {caught.value.hint}"


def test_a_key_from_a_file_may_end_its_line(fake: FakeVllm, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "sesame"
    monkeypatch.setenv("VLLM_API_KEY", "sesame\n")
    assert connect().served.model == "gemma"
    monkeypatch.setenv("VLLM_API_KEY", "sésame")
    with pytest.raises(InvalidUsageError, match="VLLM_API_KEY holds characters that no header can") as caught:
        connect()
    assert "same" not in str(caught.value).replace("VLLM_API_KEY", "")


def test_of_several_names_of_one_model_the_first_answers(
    fake: FakeVllm, connect: Connect, evaluation_windows: Windows
) -> None:
    fake.names = ["first", "second"]
    reader = connect(model="second")
    assert len(reader.read(evaluation_windows.ids[:1].tolist(), 1)) == 1


def test_an_address_may_end_in_v1(fake: FakeVllm) -> None:
    with closing(ServerReader(fake.address + "/v1/", "variant")) as reader:
        assert reader.url == fake.address


def test_of_several_models_one_must_be_named(fake: FakeVllm, connect: Connect) -> None:
    fake.names = ["base", "variant"]
    with pytest.raises(InvalidUsageError, match="serves base, variant"):
        connect()
    with pytest.raises(InvalidUsageError, match="serves base, variant, not other"):
        connect(model="other")
    assert connect(model="base").served.model == "base"


def test_a_key_is_asked_for_and_sent(fake: FakeVllm, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "sesame"
    with pytest.raises(AccessError, match="wants a key"):
        connect()
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert connect().served.model == "gemma"


def test_a_window_longer_than_the_server_reads_is_refused(
    fake: FakeVllm, connect: Connect, evaluation_windows: Windows
) -> None:
    fake.max_model_len = 64
    with pytest.raises(InvalidUsageError, match="reads 63 tokens at most, and a window has 64"):
        connect().read(evaluation_windows.ids[:1].tolist(), 1)


def test_the_server_answers_for_another_model(fake: FakeVllm, connect: Connect, evaluation_windows: Windows) -> None:
    reader = connect()
    fake.names = ["other"]
    with pytest.raises(EngineError, match=r"refuses /v1/completions: 404 The model `gemma` does not exist\.$"):
        reader.read(evaluation_windows.ids[:1].tolist(), 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"prompt_logprobs": None}, "no log-probabilities of the prompt"),
        ({"prompt_logprobs": [None]}, "no log-probabilities of the prompt"),
        ({"prompt_logprobs": [None] + 63 * [{}]}, "not vLLM's"),
        ({"prompt_logprobs": [None] + 63 * [["a"]]}, "not vLLM's"),
        ({"prompt_token_ids": [BOS, BOS]}, "read other tokens"),
    ],
)
def test_what_is_not_vllm_is_named(
    fake: FakeVllm, connect: Connect, evaluation_windows: Windows, spoil: dict[str, Any], words: str
) -> None:
    fake.spoil = spoil
    with pytest.raises(EngineError, match=words):
        connect().read(evaluation_windows.ids[:1].tolist(), 1)


def test_answers_without_token_ids_are_no_use(fake: FakeVllm, connect: Connect) -> None:
    fake.spoil = {"token_ids": None}
    with pytest.raises(EngineError, match="does not return token ids"):
        connect().answers([[BOS, 300]], 2)


def test_nan_is_the_models_fault(fake: FakeVllm, connect: Connect, evaluation_windows: Windows) -> None:
    row = evaluation_windows.ids[0].tolist()
    fake.spoil = {"prompt_logprobs": [None, *({str(token): {"logprob": np.nan}} for token in row[1:])]}
    with pytest.raises(QuantizationError, match="computes NaN"):
        connect().read([row], 1)
