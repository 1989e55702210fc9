"""A process that dies among others."""

import os
import signal
import time

import psutil
import pytest
from harness import command_line, launch
from safetensors.torch import load_file

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("rank", [0, 2])
def test_when_one_of_four_ranks_dies_all_end_within_a_minute_and_it_is_named(
    rank, tiny_models, tmp_path
):
    line = command_line(tiny_models["untied"], tmp_path, tmp_path / "run", "--batch_size", "2")
    run = launch(4, [*line, "--max_steps", "5000"])
    assert run.wait_for("^step "), run.said
    workers = run.workers()
    start = time.monotonic()
    os.kill(workers[rank], signal.SIGKILL)
    assert run.finish() != 0
    seconds = time.monotonic() - start
    print(f"\nall ended {seconds:.1f} s after rank {rank}")
    assert seconds < 60
    assert not any(psutil.pid_exists(pid) for pid in workers.values())
    ours = [text for text in run.said.splitlines() if "train_confidence_lora.py: error" in text]
    assert len(ours) == 1, run.said
    assert f"process {rank} (pid {workers[rank]}) has ended" in ours[0]


def test_a_restart_that_is_allowed_completes_the_run(tiny_models, tmp_path):
    line = command_line(tiny_models["untied"], tmp_path, tmp_path / "whole", "--batch_size", "2")
    whole = launch(4, line)
    assert whole.finish() == 0, whole.said
    out = tmp_path / "restarted"
    line = command_line(tiny_models["untied"], tmp_path, out, "--batch_size", "2")
    run = launch(4, [*line, "--overwrite_output_dir"], "--max_restarts", "1")
    assert run.wait_for("^step 20/"), run.said
    os.kill(run.workers()[3], signal.SIGKILL)
    assert run.finish() == 0, run.said
    assert "resuming from" in run.said
    # Of more than two numbers DDP sums the last bits by how it arranged its buckets, which it does
    # anew after a restart
    expected = load_file(tmp_path / "whole" / "final" / "adapter_model.safetensors")
    actual = load_file(out / "final" / "adapter_model.safetensors")
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() < 1e-3, name


def test_with_fewer_processes_the_run_goes_on_in_the_same_updates(tiny_models, tmp_path):
    out = tmp_path / "run"
    line = command_line(tiny_models["untied"], tmp_path, out, "--max_steps", "400")
    run = launch(2, line)
    assert run.wait_for("^step 20/"), run.said
    run.kill()
    run = launch(1, line)
    assert run.finish() == 0, run.said
    assert "num_processes was 2, is 1" in run.said
    assert "400 steps of 8 records (4 x 2 accumulation x 1 processes)" in run.said


def test_an_error_on_one_process_ends_the_others(tiny_models, tmp_path):
    """As when one machine has no room, or another file."""
    line = command_line(tiny_models["untied"], tmp_path, tmp_path / "run", "--max_steps", "5000")
    run = launch(2, line)
    assert run.wait_for("^step "), run.said
    os.kill(run.workers()[1], signal.SIGABRT)
    start = time.monotonic()
    assert run.finish() != 0
    assert time.monotonic() - start < 60
    assert run.said.count("train_confidence_lora.py: error") == 1
