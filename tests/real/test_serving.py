"""vLLM's own server loads what we make, answers, and agrees with what `deploy` plans for it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from typing import TYPE_CHECKING

import httpx
import pytest
import yaml

from gemma_pack.chat.template import Language, Message
from gemma_pack.gemma import kv_cache_bytes
from gemma_pack.reports.card import render_card
from tests.real.conftest import MAX_MODEL_LEN
from tests.real.vllm_server import (
    KV_CACHE_GB,
    MAX_BATCHED_TOKENS,
    START_SECONDS,
    descendants,
    runs,
    server_environment,
)
from tests.reports.test_card_programs import blocks, lines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.real.vllm_server import AskedServer

pytestmark = pytest.mark.real

PROMPT = "The capital of France is"
CLIENT = """\
import json, sys
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none")
asked = {
    "model": sys.argv[2],
    "messages": [{"role": "user", "content": "Write a hello world program"}],
    "temperature": 0,
    "max_tokens": 12,
}
pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(stream=True, **asked)]
whole = client.chat.completions.create(**asked).choices[0].message.content
print(json.dumps({"pieces": pieces, "whole": whole}))
"""


def test_the_greedy_answer_is_not_empty_and_always_the_same(vllm_server: AskedServer) -> None:
    first, second = (vllm_server.complete(PROMPT)["choices"][0] for _ in range(2))
    assert first["text"].strip()
    assert first["text"] == second["text"]
    assert first["finish_reason"] == "length"


def test_openais_client_gets_a_chat_answer_streamed_and_whole(vllm_server: AskedServer, vllm_python: Path) -> None:
    ran = subprocess.run(
        [vllm_python, "-c", CLIENT, f"{vllm_server.base_url}/v1", vllm_server.model],
        env=server_environment(vllm_python), check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    pieces = [piece for piece in answer["pieces"] if piece]
    assert len(pieces) > 4
    assert "".join(pieces) == answer["whole"]


def test_the_printed_call_answers(vllm_server: AskedServer, tool: Callable[[str], str]) -> None:
    tool("curl")
    command = [*shlex.split(vllm_server.call), "--silent", "--fail-with-body", "--noproxy", "*"]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert json.loads(told)["choices"][0]["message"]["content"].strip()
    assert f"{vllm_server.base_url}/v1/chat/completions" in command


def test_the_model_understands_the_prompt(vllm_server: AskedServer) -> None:
    answer = vllm_server.complete(PROMPT, max_tokens=1, logprobs=5)["choices"][0]["logprobs"]
    likely = {token.strip() for token in answer["top_logprobs"][0]}
    assert likely & {"the", "a", "Paris", "located", "in"}


def test_prompt_and_turns_begin_with_one_bos(vllm_server: AskedServer, served_directory: Path) -> None:
    asked = {"model": vllm_server.model, "prompt": PROMPT}
    tokens = httpx.post(f"{vllm_server.base_url}/tokenize", json=asked, timeout=30).json()["tokens"]
    turn = {"model": vllm_server.model, "messages": [{"role": "user", "content": "Write a hello world program"}]}
    turns = httpx.post(f"{vllm_server.base_url}/tokenize", json=turn, timeout=30).json()["tokens"]
    for ids in (tokens, turns):
        assert ids.count(2) == 1
        assert ids[0] == 2
    assert turns == Language(served_directory).conversation([Message("user", "Write a hello world program")])


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
    ours = (KV_CACHE_GB << 30) / kv_cache_bytes(config, MAX_MODEL_LEN, in_flight_tokens=MAX_BATCHED_TOKENS)
    assert float(fitting) == pytest.approx(ours, rel=0.03)
    naive = (KV_CACHE_GB << 30) / kv_cache_bytes(config, MAX_MODEL_LEN)
    assert naive > 1.2 * float(fitting)  # what a count of windows alone would promise


def test_ctrl_c_ends_the_server_with_all_its_processes(vllm_server: AskedServer) -> None:
    started = descendants(vllm_server.process.pid)
    assert len(started) >= 2  # the API server and its engine
    assert vllm_server.interrupt() == 0
    assert not [pid for pid in started if runs(pid)]
    assert not vllm_server.log.exists()


def test_the_script_of_the_deployment_asks_in_process(
    deployed: dict[str, str], served_directory: Path, vllm_python: Path, tmp_path: Path
) -> None:
    (tmp_path / "generate.py").write_text(deployed["generate.py"], "utf-8")
    assert in_process(vllm_python, "generate.py", tmp_path, MODEL_DIRECTORY=str(served_directory)).strip()


def test_vllm_takes_the_lines_and_the_program_of_the_card(
    served_directory: Path, vllm_python: Path, tmp_path: Path
) -> None:
    """Its own parser reads every line that starts a server; its own engine runs the program."""
    card = render_card(served_directory)
    [program] = [block for block in blocks(card, "python") if "vllm" in block]
    [name] = re.findall(r'LLM\("([^"]+)"', program)
    (tmp_path / name).symlink_to(served_directory)
    shell = [words for words in lines(card) if words[0] in ("vllm", "podman") and "serve" in words]
    [manifests] = blocks(card, "yaml")
    runtime, service = yaml.safe_load_all(manifests)
    [container] = runtime["spec"]["containers"]
    served = [*container["command"], *container["args"], *service["spec"]["predictor"]["model"]["args"]]
    starts = [words[words.index("serve") + 1 :] for words in (*shell, served)]
    assert len(starts) == 3
    (tmp_path / "card.py").write_text(PARSER.format(starts=starts) + program, "utf-8")
    said = in_process(vllm_python, "card.py", tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert "parsed bfloat16 bfloat16 bfloat16\n" in said
    assert said.partition("bfloat16\n")[2].strip()


PARSER = """\
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parsed = [make_arg_parser(FlexibleArgumentParser()).parse_args(start) for start in {starts}]
assert {{tuple(one.served_model_name) for one in parsed}} == {{("gemma",)}}
print("parsed", *(one.dtype for one in parsed))

"""


def in_process(python: Path, program: str, directory: Path, **variables: str) -> str:
    """Run a program with vLLM and return what it prints beside vLLM's log."""
    eager = {"VLLM_USE_AOT_COMPILE": "0", "TORCHDYNAMO_DISABLE": "1"}  # compiling would take minutes
    finished = subprocess.run(
        [python, program], cwd=directory, env={**server_environment(python), **eager, **variables},
        check=False, capture_output=True, text=True, timeout=2 * START_SECONDS,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    said = [line for line in finished.stdout.splitlines() if "INFO" not in line and "WARNING" not in line]
    return "\n".join(said)
