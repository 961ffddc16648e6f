"""vLLM's own server loads what we make, answers, and agrees with what `deploy` plans for it."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING

import httpx
import pytest

from gemma_pack.gemma import kv_cache_bytes
from tests.real.conftest import MAX_MODEL_LEN
from tests.real.vllm_server import KV_CACHE_BYTES, MAX_BATCHED_TOKENS, START_SECONDS, server_environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.real.vllm_server import AskedServer

pytestmark = pytest.mark.real

PROMPT = "The capital of France is"


def test_the_greedy_answer_is_not_empty_and_always_the_same(vllm_server: AskedServer) -> None:
    first, second = (vllm_server.complete(PROMPT)["choices"][0] for _ in range(2))
    assert first["text"].strip()
    assert first["text"] == second["text"]
    assert first["finish_reason"] == "length"


def test_the_answer_streams_and_is_the_same(vllm_server: AskedServer) -> None:
    body = {"model": vllm_server.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 16, "stream": True}
    with httpx.stream("POST", f"{vllm_server.base_url}/v1/completions", json=body, timeout=120) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["text"] for event in events]
    assert len(pieces) > 4
    assert "".join(pieces) == vllm_server.complete(PROMPT)["choices"][0]["text"]


def test_the_model_understands_the_prompt(vllm_server: AskedServer) -> None:
    answer = vllm_server.complete(PROMPT, max_tokens=1, logprobs=5)["choices"][0]["logprobs"]
    likely = {token.strip() for token in answer["top_logprobs"][0]}
    assert likely & {"the", "a", "Paris", "located", "in"}


def test_the_prompt_begins_with_one_bos(vllm_server: AskedServer) -> None:
    asked = {"model": vllm_server.model, "prompt": PROMPT}
    tokens = httpx.post(f"{vllm_server.base_url}/tokenize", json=asked, timeout=30).json()["tokens"]
    assert tokens.count(2) == 1
    assert tokens[0] == 2


def test_the_server_offers_the_model_under_its_name_and_context(vllm_server: AskedServer) -> None:
    [model] = httpx.get(f"{vllm_server.base_url}/v1/models", timeout=30).json()["data"]
    assert model["id"] == "gemma"
    assert model["max_model_len"] == MAX_MODEL_LEN


def test_the_kv_cache_is_what_we_count(vllm_server: AskedServer, served_directory: Path) -> None:
    # The server says how many requests of full length fit its cache. It rounds sliding layers up to blocks of 128
    # tokens, which we do not, and on a CPU it schedules no batch ahead.
    log = vllm_server.log.read_text("utf-8", errors="replace")
    [fitting] = re.findall(rf"Maximum concurrency for {MAX_MODEL_LEN:,} tokens per request: ([\d.]+)x", log)
    config = json.loads((served_directory / "config.json").read_text("utf-8"))
    ours = KV_CACHE_BYTES / kv_cache_bytes(config, MAX_MODEL_LEN, in_flight_tokens=MAX_BATCHED_TOKENS)
    assert float(fitting) == pytest.approx(ours, rel=0.03)
    naive = KV_CACHE_BYTES / kv_cache_bytes(config, MAX_MODEL_LEN)
    assert naive > 1.2 * float(fitting)  # what a count of windows alone would promise


def test_the_script_of_the_deployment_asks_in_process(
    deployed: dict[str, str], served_directory: Path, vllm_python: Path, tmp_path: Path
) -> None:
    (tmp_path / "generate.py").write_text(deployed["generate.py"], "utf-8")
    eager = {"VLLM_USE_AOT_COMPILE": "0", "TORCHDYNAMO_DISABLE": "1"}  # compiling would take minutes
    variables = {**server_environment(vllm_python), **eager, "MODEL_DIRECTORY": str(served_directory)}
    finished = subprocess.run(
        [vllm_python, "generate.py"],
        cwd=tmp_path,
        env=variables,
        check=False,
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    said = [line for line in finished.stdout.splitlines() if "INFO" not in line and "WARNING" not in line]
    assert "".join(said).strip()
