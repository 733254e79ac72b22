"""What the rows of a tree would corrupt is refused."""

import json
import shutil
from importlib.metadata import EntryPoint

import pytest

from tests.engine import tiny
from tests.engine.engines import tree
from tests.engine.test_activation import configure
from vllm_eagle3.engine import activation, support


def test_what_the_rows_of_a_tree_would_corrupt_is_refused(pair, monkeypatch):
    from vllm import envs

    config = configure(pair, tree(pair, 12, depth=3, top_k=4))
    shape = activation.tree_config(config)
    support.check(config, shape)
    with monkeypatch.context() as patch:
        patch.setattr(config.aux_output_config, "enable_return_routed_experts", True)
        with pytest.raises(ValueError, match="enable_return_routed_experts: turn it off"):
            support.check(config, shape)
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        envs.disable_envs_cache()
        with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT: unset it"):
            support.check(config, shape)
    envs.disable_envs_cache()
    installed = EntryPoint("twist", "package:Twist", "vllm.logits_processors")
    monkeypatch.setattr(support, "entry_points", lambda group: [installed])
    with pytest.raises(ValueError, match=r"twist.*uninstall"):
        support.check(config, shape)


def test_a_head_of_one_hidden_state_is_refused(pair, tmp_path):
    """vLLM would leave out the fusion and hand the speculator no captured states."""
    shutil.copytree(pair.head, tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    changed = {"eagle_config": {"use_aux_hidden_state": False}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match="use_aux_hidden_state is false"):
        configure(pair, tree(tiny.Pair(pair.target, path.parent), 12, depth=3, top_k=4))
