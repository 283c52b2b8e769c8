"""What the GPU benchmark does around the engines; the engines need a GPU."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from benchmarks.gpu import mps
from benchmarks.gpu.run import batches_of


def test_the_service_runs_for_as_long_as_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = tmp_path / "heard"
    program = tmp_path / mps.CONTROL
    program.write_text(f'#!/bin/sh\nif [ "$1" = -d ]; then echo start; else cat; fi >> {heard}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with mps.service() as env:
        assert heard.read_text() == "start\n"
        assert mps.part(2) == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50"}
        assert Path(env["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
    assert heard.read_text() == "start\nquit\n"
    assert not Path(env["CUDA_MPS_PIPE_DIRECTORY"]).exists()


def test_a_shape_s_batch_is_given_by_name() -> None:
    assert batches_of(("debate=3", "trading=1")) == (("debate", 3), ("trading", 1))
    for wrong in ("debate", "debate=x", "nothing=3"):
        with pytest.raises(click.BadParameter):
            batches_of((wrong,))
