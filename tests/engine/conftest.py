"""One tiny pair of models and one plain engine for all tests of the engine."""

import logging
from collections.abc import Iterator

import pytest

from tests.engine import tiny
from tests.engine.engines import Engine, Engines, close_all


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An engine that ends takes the process groups of all others with it: such tests are last."""
    items.sort(key=lambda item: item.get_closest_marker("ends_engines") is not None)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Hundreds of lines of vLLM's log hide a failure's own message."""
    logging.getLogger("vllm").setLevel(logging.ERROR)


@pytest.fixture(scope="session", autouse=True)
def _close() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tiny.Pair:
    return tiny.write_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def engines(pair: tiny.Pair) -> Engines:
    return Engines(pair)


@pytest.fixture(scope="session")
def plain(engines: Engines) -> Engine:
    """vLLM without drafts: what every other engine must agree with."""
    return engines.get(max_num_seqs=20)
