"""What a learner refuses before anything is trained."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train import small
from vllm_eagle3.corpus import Document
from vllm_eagle3.train.distributed import World
from vllm_eagle3.train.learner import Learner
from vllm_eagle3.train.settings import TrainConfig

CPU = torch.device("cpu")


def test_held_out_documents_of_another_target_are_refused(tmp_path: Path) -> None:
    small.llama().save_pretrained(tmp_path)
    config, documents = TrainConfig(draft_vocab_size=80), small.documents(4)
    tokens = np.array([3, 4, small.VOCABULARY, 5])
    foreign = [Document(tokens, tokens > 3)]
    with pytest.raises(ValueError, match="written for another target"):
        Learner(tmp_path, documents, config, CPU, World(), foreign)
    assert Learner(tmp_path, documents, config, CPU, World(), small.documents(2)).coverage > 0
