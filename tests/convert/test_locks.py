"""Locks of folders that several machines share."""

import json
import os
import time
from pathlib import Path

import pytest

from headshare_jax.convert import leases, locks
from headshare_jax.errors import TryAgain


def test_a_lock_of_another_machine_is_void_when_its_holder_touches_it_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / locks.NAME
    lock.write_text(json.dumps(leases.me() | {"host": "elsewhere"}))
    with pytest.raises(TryAgain, match="try again 120 seconds after that"), locks.held(tmp_path):
        pass
    os.utime(lock, (0, time.time() - leases.SECONDS - 1))
    with locks.held(tmp_path):
        assert "was left by process" in caplog.text
    assert not lock.exists()


def test_a_lock_that_nobody_would_touch_stands(tmp_path: Path) -> None:
    lock = tmp_path / locks.NAME
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "before"}))
    os.utime(lock, (0, 0))
    with pytest.raises(TryAgain, match="delete"), locks.held(tmp_path):
        pass


def test_a_holder_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWED", 0.01)
    with locks.held(tmp_path):
        os.utime(tmp_path / locks.NAME, (0, 0))
        for _ in range(200):
            if (tmp_path / locks.NAME).stat().st_mtime:
                return
            time.sleep(0.01)
        pytest.fail("it was not touched")
