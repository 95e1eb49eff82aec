"""A small API server for each test, and a user's kubeconfig for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes.api_server import ApiServer, api_server
from tests.unit.rayjob.manifests import crd


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server(crd()) as found:
        yield found


@pytest.fixture
def kubeconfig(server: ApiServer, tmp_path: Path) -> Path:
    return server.kubeconfig(tmp_path / "kubeconfig")
