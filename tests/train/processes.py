"""Two processes that train together, as torchrun starts them.

They are forked of a server that has imported everything once.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

# For the server.
import transformers.models.llama.modeling_llama  # noqa: F401

import vllm_eagle3.train.trainer  # noqa: F401
from vllm_eagle3 import cli

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


class Pair:
    """``vllm-eagle3 train --device cpu ARGUMENTS`` in a world of two."""

    def __init__(self, arguments: list[str], outputs: Path) -> None:
        self._outputs = [outputs / f"rank{rank}.txt" for rank in (0, 1)]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._processes = [
            _FORKS.Process(target=_train, args=(rank, port, arguments, str(output)))
            for rank, output in enumerate(self._outputs)
        ]
        for process in self._processes:
            process.start()

    @property
    def alive(self) -> bool:
        """Whether both of them run."""
        return all(process.is_alive() for process in self._processes)

    def interrupt(self) -> None:
        """What a Ctrl-C sends."""
        for process in self._processes:
            os.kill(process.pid, signal.SIGINT)

    def end(self, code: int = 0, other: int | None = None) -> None:
        """Wait for both, and for this exit code; ``other``: where that of rank 1 differs."""
        for process in self._processes:
            process.join(120)
        codes = [process.exitcode for process in self._processes]
        assert codes == [code, code if other is None else other], [
            path.read_text()[-2000:] for path in self._outputs
        ]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def pair(arguments: list[str], outputs: Path) -> Iterator[Pair]:
    """The two, until the end of the context."""
    outputs.mkdir(parents=True, exist_ok=True)
    both = Pair(arguments, outputs)
    try:
        yield both
    finally:
        both.kill()


def _train(rank: int, port: int, arguments: list[str], output: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (
        open(output, "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        code = cli.main(["train", "--device", "cpu", *arguments])
    sys.exit(code)
