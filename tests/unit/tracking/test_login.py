"""Whether a user is logged in to wandb."""

from pathlib import Path

import pytest

from orchestrator.tracking.login import is_logged_in


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_nobody_is_by_default() -> None:
    assert not is_logged_in()


def test_a_key_in_the_environment_is_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert is_logged_in()


def test_so_is_what_wandb_login_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123\n", encoding="utf-8")
    (tmp_path / ".netrc").chmod(0o600)
    assert is_logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not is_logged_in()


def test_a_file_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine\n", encoding="utf-8")
    assert not is_logged_in()
