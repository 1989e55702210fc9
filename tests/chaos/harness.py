"""Runs of the real script, in real processes, that can be killed."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from conftest import ROOT, tagged_records, write_jsonl


class Started:
    """A command in a process group of its own, whose lines are read as they come."""

    def __init__(self, command, **environment):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.lines, self.coming = [], queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.coming.put(line)
        self.coming.put(None)

    @property
    def said(self):
        return "".join(self.lines)

    def wait_for(self, pattern, seconds=120):
        """The first line that matches, or None if the command ended without it."""
        end = time.monotonic() + seconds
        while True:
            line = self.coming.get(timeout=max(0.01, end - time.monotonic()))
            if line is None:
                return None
            self.lines.append(line)
            if re.search(pattern, line):
                return line

    def finish(self, seconds=900):
        """The exit code, once every process that holds the output has ended."""
        self.wait_for(r"(?!)", seconds)
        return self.process.wait(seconds)

    def signal(self, number, group=False):
        (os.killpg if group else os.kill)(self.process.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL, group=True)
        self.finish()

    def workers(self):
        """Process ids of the training processes, by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            rank = child.environ().get("RANK")
            if rank is not None and "train_" in " ".join(child.cmdline()):
                found[int(rank)] = child.pid
        return found


def launch(processes, arguments, *launcher, script="train_confidence_lora.py", **environment):
    """The script as users start it: plain python, or several processes through accelerate."""
    if processes == 1:
        command = [sys.executable, str(ROOT / script)]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                   str(ROOT / "train_config_4gpu.yaml"), "--num_processes", str(processes),
                   "--main_process_port", "0", *launcher, str(ROOT / script)]  # fmt: skip
    return Started([*command, *arguments], **environment)


def command_line(model, folder, out, *more):
    """A run of 100 steps, each of 8 records of 96 with dropout, which saves at every second one.
    Flags in `more` win."""
    data = Path(folder) / "train.jsonl"
    if not data.exists():
        write_jsonl(data, tagged_records(96))
    return ["--model_name", model, "--train_data", str(data), "--output_dir", str(out),
            "--batch_size", "4", "--gradient_accumulation_steps", "auto", "--global_batch_size",
            "8", "--max_steps", "100", "--save_steps", "2", "--eval_steps", "50",
            "--logging_steps", "5", "--lora_dropout", "0.1", "--learning_rate", "1e-3",
            "--val_samples", "4", *more]  # fmt: skip
