"""SIGKILL and SIGTERM at random moments: the resumed run ends with the same bytes."""

import os
import random
import signal
import time

import pytest
from conftest import adapter
from harness import command_line, launch

from train_confidence_lora import checkpoints, damage

pytestmark = pytest.mark.chaos


def test_twenty_kills_at_random_moments_change_no_byte(tiny_models, tmp_path):
    """Of all processes and their launcher, saving included."""
    steps = ["--max_steps", "2400"]
    line = command_line(tiny_models["untied"], tmp_path, tmp_path / "whole", *steps)
    whole = launch(2, line)
    assert whole.finish() == 0, whole.said
    out, moments, while_saving = tmp_path / "killed", random.Random(5), 0
    line = command_line(tiny_models["untied"], tmp_path, out, *steps)
    for _ in range(20):
        run = launch(2, line)
        assert run.wait_for("^step |^resuming from"), run.said
        time.sleep(moments.uniform(0, 1.5))
        run.kill()
        assert not (out / "summary.json").exists(), "it was over before it was killed"
        while_saving += any(path.name.endswith((".new", ".old")) for path in out.iterdir())
        assert damage(checkpoints(out)[-1]) is None
    last = launch(2, line)
    assert last.finish() == 0, last.said
    print(f"\n{while_saving} of 20 kills came while saving")
    assert adapter(out) == adapter(tmp_path / "whole")
    assert (out / "validation.jsonl").read_text().count('"step"') == 49


def test_ten_sigterms_save_the_step_in_progress(tiny_models, tmp_path):
    """Now the launcher is told, now one of the two processes."""
    steps = ["--max_steps", "800", "--save_steps", "800"]
    line = command_line(tiny_models["untied"], tmp_path, tmp_path / "whole", *steps)
    whole = launch(2, line)
    assert whole.finish() == 0, whole.said
    out, moments = tmp_path / "stopped", random.Random(6)
    line = command_line(tiny_models["untied"], tmp_path, out, *steps)
    for number in range(10):
        before = [path.name for path in checkpoints(out)] if out.exists() else []
        run = launch(2, line)
        assert run.wait_for("^step "), run.said
        time.sleep(moments.uniform(0, 1.2))
        if number % 2:
            run.signal(signal.SIGTERM)
        else:
            os.kill(run.workers()[number // 2 % 2], signal.SIGTERM)
        assert run.finish() != 0
        newest = checkpoints(out)[-1]
        assert newest.name not in before, run.said
        assert f"SIGTERM: {newest} is saved" in run.said
        assert damage(newest) is None
    last = launch(2, line)
    assert last.finish() == 0, last.said
    assert adapter(out) == adapter(tmp_path / "whole")
