"""One network, exported once with the slow exporter for all checks of runtimes."""

from __future__ import annotations

import pytest

from nni_prune_ext.runtimes.base import RunnableModel
from nni_prune_ext.testing import tiny_runnable


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunnableModel:
    return tiny_runnable(tmp_path_factory.mktemp("tiny"))
