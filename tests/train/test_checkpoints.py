"""States to resume from: what an interruption leaves, and what is refused."""

import errno
from pathlib import Path

import pytest
import torch

from tests.train import small
from vllm_eagle3 import files
from vllm_eagle3.train import checkpoints
from vllm_eagle3.train.checkpoints import Progress
from vllm_eagle3.train.settings import TrainConfig

CPU = torch.device("cpu")
CONFIG = TrainConfig(draft_vocab_size=64)
INPUTS = {"data": "60 documents", "target": "a hash"}


class Run:
    """A head and its optimiser after some steps."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        _, self.head = small.pair(torch.float32)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=1e-2)

    def save(self, step: int) -> None:
        for weight in self.head.parameters():
            weight.grad = torch.randn_like(weight)
        self.optimizer.step()
        states = [checkpoints.random_state(CPU)]
        progress = Progress(step, 10 * step, 1.5 * step)
        trained = self.head, self.optimizer
        checkpoints.save(self.out_dir, CONFIG, *trained, progress, states, INPUTS)

    def load(self, config: TrainConfig = CONFIG, processes: int = 1) -> tuple[Progress, list]:
        return checkpoints.load(self.out_dir, config, self.head, self.optimizer, INPUTS, processes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_head_optimiser_progress_and_random_numbers_come_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    first, second = Run(tmp_path), Run(tmp_path)
    first.save(3)
    drawn = torch.rand(4)
    progress, states = second.load()
    assert progress == Progress(3, 30, 4.5)
    checkpoints.restore_random_state(states[0], CPU)
    assert torch.equal(torch.rand(4), drawn)
    for name, weight in first.head.state_dict().items():
        assert torch.equal(weight, second.head.state_dict()[name])
    states = [run.optimizer.state_dict()["state"] for run in (first, second)]
    for number, moments in states[0].items():
        for name, moment in moments.items():
            assert torch.equal(moment, states[1][number][name]), name


def test_the_last_two_states_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.save(step)
    assert names(tmp_path) == ["training_state.previous.pt", "training_state.pt"]
    assert run.load()[0].step == 3


def test_a_damaged_state_gives_way_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.save(2)
    path = tmp_path / "training_state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert run.load()[0].step == 1
    assert "training_state.pt cannot be read" in capsys.readouterr().err
    (tmp_path / "training_state.previous.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read: start anew in another --out"):
        run.load()


def test_a_full_disk_leaves_the_states_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.save(2)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(
            ValueError, match=r"training_state\.pt could not be written.*No space left.*of step 3"
        ):
            run.save(3)
    assert names(tmp_path) == ["training_state.previous.pt", "training_state.pt"]
    assert run.load()[0].step == 2


def test_a_process_killed_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.save(1)
    replace, calls = files.os.replace, []

    def killed_at_the_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run.save(2)
    assert run.load()[0].step == 1
    run.save(3)
    assert run.load()[0].step == 3


@pytest.mark.parametrize(
    ("config", "processes", "message"),
    [
        (TrainConfig(draft_vocab_size=64, seed=1), 1, "another seed"),
        (TrainConfig(draft_vocab_size=64, accumulate=2), 1, "give --accumulate 1"),
        (CONFIG, 2, "use 1 processes with --accumulate 1"),
    ],
)
def test_a_state_of_another_run_is_refused(
    tmp_path: Path, config: TrainConfig, processes: int, message: str
) -> None:
    run = Run(tmp_path)
    run.save(1)
    with pytest.raises(ValueError, match=message):
        run.load(config, processes)


def test_what_a_remedy_changes_is_accepted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    lower = TrainConfig(draft_vocab_size=64, learning_rate=1e-5, clip=0.1, save_every=7)
    assert run.load(lower)[0].step == 1


def test_other_processes_may_go_on_if_they_read_a_step_in_as_many_parts(tmp_path: Path) -> None:
    run = Run(tmp_path)
    checkpoints.save(
        tmp_path,
        TrainConfig(draft_vocab_size=64, accumulate=2),
        *(run.head, run.optimizer, Progress(5, 50, 1.0)),
        [checkpoints.random_state(CPU)] * 2,
        INPUTS,
    )
    for processes, accumulate in ((1, 4), (2, 2), (4, 1)):
        config = TrainConfig(draft_vocab_size=64, accumulate=accumulate)
        progress, states = run.load(config, processes)
        assert (progress.step, len(states)) == (5, 2)
    with pytest.raises(ValueError, match=r"2 processes with accumulate=2.*give --accumulate 4"):
        run.load(CONFIG, 1)


def test_no_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start without resume"):
        Run(tmp_path).load()
