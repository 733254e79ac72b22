"""`vllm serve` for real: the plugin through its entry point, two chats at once, the metrics."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.engine import tiny
from tests.engine.engines import Engines, chain, sampling

pytestmark = pytest.mark.slow

START_SECONDS = 240
CHATS = ["Tell me about the sea.", "What is a draft tree, and who needs it?"]
NUM_TOKENS = 40
# Wide enough that even a random head is right now and then.
TREE = {"num_drafts": 60, "tree": {"depth": 2, "top_k": 30}}


class Server:
    """An API server in processes of its own."""

    def __init__(self, pair: tiny.Pair, folder: Path, speculative: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = folder / "server.log"
        command = [sys.executable, "-m", "vllm_eagle3.engine.interpreter", "serve"]
        command += [str(pair.target), "--served-model-name", "tiny"]
        command += ["--speculative-config", json.dumps(speculative)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4"]
        command += ["--block-size", "32", "--kv-cache-memory-bytes", str(1 << 27)]
        with self.log.open("w") as log:
            # In an empty folder: what it imports is what is installed.
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def counter(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        values = [line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"vllm:{name}_total")]
        assert values, f"no metric vllm:{name}_total"
        return sum(map(float, values))

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)


@pytest.fixture(scope="module")
def server(pair: tiny.Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    speculative = {**chain(pair, TREE["num_drafts"]), "tree": TREE["tree"]}
    running = Server(pair, tmp_path_factory.mktemp("server"), speculative)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


async def chat(client: AsyncOpenAI, question: str) -> tuple[str, list[float]]:
    """The answer, and when its pieces came."""
    stream = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": question}],
        max_tokens=NUM_TOKENS,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces, times = [], []
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
            times.append(time.monotonic())
    return "".join(pieces), times


def test_two_streams_and_the_metrics(server: Server, engines: Engines):
    async def ask_all() -> list[tuple[str, list[float]]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
            return await asyncio.gather(*(chat(client, question) for question in CHATS))

    (first, first_times), (second, second_times) = asyncio.run(ask_all())
    assert first_times[0] < second_times[-1]
    assert second_times[0] < first_times[-1]

    plain = engines.get(skip_tokenizer_init=False, max_num_seqs=12)
    messages = [[{"role": "user", "content": question}] for question in CHATS]
    params = sampling(NUM_TOKENS, detokenize=True)
    outputs = plain.llm.chat(messages, params, use_tqdm=False)
    assert [first, second] == [output.outputs[0].text for output in outputs]

    accepted = server.counter("spec_decode_num_accepted_tokens")
    forwards = server.counter("spec_decode_num_drafts")
    assert accepted > 0
    # Accepted drafts save forwards: each of them emits one token and what it accepts.
    assert forwards <= 2 * NUM_TOKENS - accepted
    assert "Drafting dynamic trees: 60 nodes" in server.log.read_text()


def test_a_bad_tree_ends_the_server_with_its_reason(pair: tiny.Pair, tmp_path: Path):
    speculative = {**chain(pair, 12), "tree": {"depth": 3, "topk": 4}}
    server = Server(pair, tmp_path, speculative)
    try:
        assert server.process.wait(START_SECONDS) != 0
    finally:
        if server.process.poll() is None:
            server.stop()
    assert "unknown key 'topk' in tree: use depth, top_k, verify_budget" in server.log.read_text()
