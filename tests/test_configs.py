"""Every file of configs/runs/ is run, as plan_training.py would launch it, with as many processes
as it asks for. Only model, data and number of steps are other than the file says."""

import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
import yaml
from conftest import LONG, ROOT, make_model, tagged_records, write_jsonl
from test_cluster import free_port
from test_language_model import make_chats, make_texts

import train_confidence_lora
import train_language_model
from plan_training import main

FILES = sorted((ROOT / "configs" / "runs").iterdir())
TINY_SHAPE = "--hidden_size 64 --num_heads 4 --num_layers 2 --vocab_size 400 --max_seq_length 128"


def command_of(file, tmp_path, capsys):
    """The environment and the words that `launch` would run."""
    name = file.name
    model = [] if "scratch" in name else ["--model_name", make_model(tmp_path / "model")]
    texts = write_jsonl(tmp_path / "texts.jsonl", make_texts(40))
    chats = write_jsonl(tmp_path / "chats.jsonl", make_chats(20))
    tagged = write_jsonl(tmp_path / "tagged.jsonl", tagged_records(64))
    text = file.read_text()
    data = tagged if "confidence" in name else texts if "task_mode: cpt" in text else chats
    words = ["launch", str(file), "--dry_run", "--dataset", data, *model]
    words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    words += ["--val_data", texts if "dapt" in name else chats] if "val_path" in text else []
    words += ["--chat_data", chats] if "chat_path" in text else []
    words += TINY_SHAPE.split() if "scratch" in name else []
    assert main(words) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    first = next(i for i, word in enumerate(shlex.split(line)) if "=" not in word)
    settings = dict(word.split("=", 1) for word in shlex.split(line)[:first])
    return settings, shlex.split(line)[first:]


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=LONG if "8gpu" in file.stem else ()) for file in FILES],
    ids=[file.stem for file in FILES],
)
def test_Y5_a_job_of_each_example_is_built_finishes_and_its_settings_are_the_files(
    file, tmp_path, capsys
):
    settings, command = command_of(file, tmp_path, capsys)
    launched, folder = list(command), tmp_path / "observed"
    if "accelerate.commands.launch" in command:  # what keeps strategies off a CPU is lifted there
        script = next(i for i, word in enumerate(command) if word.startswith("train_"))
        folder.mkdir()
        run = {"name": "run", "argv": command[script:], "port": free_port(), "die_at": None}
        (folder / "runs.json").write_text(json.dumps([run]))
        launched[script:] = [str(ROOT / "tests" / "strategy_runs.py"), str(folder)]
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launched, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=290
    )
    logs = [path.read_text()[-2000:] for path in folder.glob("run.*.log")]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
    assert (tmp_path / "run" / "summary.json").is_file(), "\n".join(logs)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    saved = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    given = dict(pairwise(command))  # {flag: value}
    assert summary["status"] == "completed"
    assert summary["steps"] == 2
    assert summary["num_processes"] == int(given.get("--num_processes", 1))
    if "--global_batch_size" in given:
        assert summary["global_batch_size"] == int(given["--global_batch_size"])
    for name in "learning_rate max_seq_length task tuning lora_r bf16".split():
        if f"--{name}" in given:
            assert str(saved[name]) == str(yaml.safe_load(given[f"--{name}"]))
    assert (tmp_path / "run" / "final" / "tokenizer.json").is_file()


def test_P2_settings_of_a_finished_run_are_a_configuration_that_runs_again(tmp_path, capsys):
    """The same file, launched into another folder, ends with the same weights."""
    chats = write_jsonl(tmp_path / "chats.jsonl", make_chats(20))
    words = f"--task sft --model_name {make_model(tmp_path / 'model')} --train_data {chats} "
    words += "--max_steps 2 --batch_size 4 --evaluation off --no_bf16 --learning_rate 1e-3"
    runs = [tmp_path / "first", tmp_path / "again"]
    train_confidence_lora.main(
        [*words.split(), "--output_dir", str(runs[0])], train_language_model.run
    )
    launched = [sys.executable, "plan_training.py", "launch", str(runs[0] / "settings.yaml")]
    subprocess.run([*launched, "--output_dir", str(runs[1])], cwd=ROOT, check=True)
    first, again = ((run / "final" / "adapter_model.safetensors").read_bytes() for run in runs)
    assert first == again
