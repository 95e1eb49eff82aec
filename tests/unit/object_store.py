"""Object stores to test against: a folder behind a protocol of its own, and a real S3 server where one is installed."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

ROOT = Path(__file__).resolve().parents[2]
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCY"


class FolderStore(LocalFileSystem):
    """Keeps files as object stores do: one appears whole, and the folders of its name need not be made."""

    protocol = "folder"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(os.fspath(path).removeprefix("folder://"))

    def pipe_file(self, path: Any, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        target = Path(self._strip_protocol(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{uuid.uuid4().hex}")
        partial.write_bytes(value)
        try:
            if mode == "create":
                os.link(partial, target)
            else:
                os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def put_file(self, path1: Any, path2: Any, callback: object = None, **_: Any) -> None:
        self.pipe_file(path2, Path(path1).read_bytes())

    def get_file(self, path1: Any, path2: Any, callback: object = None, **_: Any) -> None:
        # fsspec's own would not copy from a pipe.
        with (
            Path(self._strip_protocol(path1)).open("rb", buffering=0) as source,
            Path(path2).open("wb", buffering=0) as target,
        ):
            while chunk := source.read(1 << 16):
                target.write(chunk)


fsspec.register_implementation("folder", FolderStore)


@dataclass(frozen=True)
class Bucket:
    """What an object store holds below a URL, seen past the code under test."""

    url: str

    def names(self) -> set[str]:
        filesystem, root = self._open()
        return {str(name).removeprefix(f"{root}/") for name in filesystem.find(root)}

    def read(self, path: str) -> bytes:
        filesystem, root = self._open()
        return filesystem.cat_file(f"{root}/{path}")

    def write(self, path: str, content: bytes) -> None:
        filesystem, root = self._open()
        filesystem.pipe_file(f"{root}/{path}", content)

    def delete(self, path: str) -> None:
        filesystem, root = self._open()
        filesystem.rm_file(f"{root}/{path}")

    def _open(self) -> tuple[Any, str]:
        return fsspec.core.url_to_fs(self.url, use_listings_cache=False)


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server of S3 on this machine, and the environment in which a user reaches it."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(
        port=0, verbose=False
    )
    server.start()
    # What was opened before remembers another server's address.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    host, port = server.get_host_and_port()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


def s3_bucket() -> Bucket:
    """A new bucket, on the server that the environment names."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return Bucket(f"s3://{name}/runs/one")
