"""A small API server for each test, and a user's kubeconfig for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes.api_server import ApiServer, api_server
from tests.unit.rayjob.manifests import crd


@pytest.fixture
def bare_server() -> Iterator[ApiServer]:
    """With no object in it."""
    with api_server(crd()) as found:
        yield found


@pytest.fixture
def server(bare_server: ApiServer) -> ApiServer:
    """With the namespace that jobs go to."""
    bare_server.add_namespace()
    return bare_server


@pytest.fixture
def kubeconfig(bare_server: ApiServer, tmp_path: Path) -> Path:
    return bare_server.kubeconfig(tmp_path / "kubeconfig")
