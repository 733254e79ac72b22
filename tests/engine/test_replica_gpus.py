"""Replicas are spread over the GPUs that their run may use."""

import json
import os
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_eagle3.engine import replica, replica_gpus, replica_processes
from vllm_eagle3.engine.replica import Replica
from vllm_eagle3.engine.replica_config import ReplicaConfig
from vllm_eagle3.engine.replica_gpus import place, visible_gpus


@pytest.mark.parametrize(
    ("replicas", "gpus", "each", "expected"),
    [
        (2, "0", 1, [("0", 2), ("0", 2)]),
        (5, "0 1", 1, [("0", 3), ("1", 2), ("0", 3), ("1", 2), ("0", 3)]),
        (2, "4 5 6", 1, [("4", 1), ("5", 1)]),
        (3, "0 1 2 3 4", 2, [("0 1", 2), ("2 3", 1), ("0 1", 2)]),
        (2, "", 1, [("", 2), ("", 2)]),
    ],
)
def test_gpus_are_dealt_out_in_turn(
    replicas: int, gpus: str, each: int, expected: list[tuple[str, int]]
) -> None:
    placed = [(" ".join(names), sharing) for names, sharing in place(replicas, gpus.split(), each)]
    assert placed == expected


def test_an_engine_of_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="to have 2 GPUs, and there are 1"):
        place(2, ["0"], 2)
    assert ReplicaConfig(engine_args={"tensor_parallel_size": 2}).gpus_each == 2


@pytest.mark.parametrize(
    ("listed", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3, 1", 2, ["3", "1"]), ("0,9", 1, ["0"]), ("", 0, [])],
)
def test_the_gpus_are_those_that_the_run_may_use(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int, expected: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert visible_gpus() == expected


class Witness:
    """A replica that writes down where it runs; ``seen``: when its process imported this."""

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    sharing = 1

    def __init__(self, path: Path) -> None:
        self._path = path

    def run(self) -> None:
        self._path.write_text(json.dumps([self.seen, self.sharing]))


def test_a_replica_sees_its_gpu_from_the_start_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    makers = [partial(Witness, tmp_path / f"{index}.json") for index in range(3)]
    progress = SimpleNamespace(update=lambda: None, close=lambda: None)
    assert replica_processes.run_replicas(makers, progress, None) == []
    written = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(3)]
    assert written == [["6", 2], ["7", 1], ["6", 2]]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"


@pytest.mark.parametrize(
    ("gpu", "sharing", "share"),
    [(True, 1, None), (True, 2, 0.425), (False, 1, 0.5), (False, 2, 0.25)],
)
def test_memory_is_shared_with_the_replicas_on_the_same_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, sharing: int, share: float | None
) -> None:
    given = {}

    def engine(target: str, **arguments: object) -> SimpleNamespace:
        given.update(arguments)
        return SimpleNamespace(llm_engine=None)

    monkeypatch.setattr("vllm.LLM", engine)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(replica, "_kv_cache_bytes", lambda replicas: 1)
    started = SimpleNamespace(
        config=ReplicaConfig(replicas=4), sharing=sharing, target="target", rng=random.Random(0)
    )
    Replica._start_engine(started)
    assert given.get("gpu_memory_utilization") == share
    assert ("kv_cache_memory_bytes" in given) is (sharing > 1)


def test_the_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with replica_gpus.seeing(["1"]):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
