"""A disk that fills while a checkpoint is saved, and bytes that change on it."""

import random
import subprocess

import pytest
from conftest import adapter
from harness import command_line, launch

from train_confidence_lora import checkpoints, damage, main

pytestmark = pytest.mark.chaos


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_fills_while_saving_leaves_the_checkpoint_before(
    processes, small_disk, tiny_models, tmp_path
):
    out = small_disk / "run"
    line = command_line(tiny_models["untied"], tmp_path, out, "--save_total_limit", "9")
    run = launch(processes, line)
    assert run.finish() == 1, run.said
    assert f"the disk of {out} is full" in run.said
    assert run.said.count("; training goes on") == 2
    assert "that was 3 in a row, and the run ends" in run.said
    assert 'train_confidence_lora.py", line' not in run.said  # the launcher has a traceback always
    kept = checkpoints(out)
    assert kept
    assert [damage(path) for path in kept] == [None] * len(kept)
    # with room again the same command completes it, as if nothing had been
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run = launch(processes, line)
    assert run.finish() == 0, run.said
    assert f"resuming from {kept[-1]}" in run.said
    whole = launch(processes, command_line(tiny_models["untied"], tmp_path, tmp_path / "whole"))
    assert whole.finish() == 0, whole.said
    assert adapter(out) == adapter(tmp_path / "whole")


def test_two_hundred_flipped_bytes_are_found_and_none_is_loaded(tiny_models, tmp_path, capsys):
    out = tmp_path / "run"
    line = command_line(tiny_models["untied"], tmp_path, out, "--max_steps", "4")
    main(line)
    good, checkpoint = checkpoints(out)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes, draw = [path.stat().st_size for path in files], random.Random(7)
    for _ in range(200):
        [path] = draw.choices(files, sizes)
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert path.name in damage(checkpoint) or path.name == "SHA256SUMS"
        path.write_bytes(content)
    assert damage(checkpoint) is None
    for path in files:  # and each file's damage keeps the checkpoint from being loaded
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        (out / "summary.json").unlink()
        capsys.readouterr()
        main(line)
        assert f"resuming from {good}" in capsys.readouterr().out
        good, checkpoint = checkpoints(out)
