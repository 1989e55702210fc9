"""Pipeline parallelism: one model over two processes is the model of one process (row G4)."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_jsonl
from safetensors.torch import load_file
from test_language_model import SMALL, make_chats, make_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from train_confidence_lora import InputError, main
from train_language_model import (
    TEXTS,
    LanguageEvaluation,
    LanguageSettings,
    keep_stage,
    run,
)

SCRIPT = "train_language_model.py"


def launch(*arguments):
    """The script in a pipeline of two processes, as users start it; returns what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(ROOT / "configs" / "strategies" / "ddp.yaml"), "--num_processes", "2",
               "--main_process_port", "0", str(ROOT / SCRIPT), "--pipeline_parallel_size", "2",
               *arguments]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def logged(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [(row["loss"], row["grad_norm"]) for row in state["log_history"] if "loss" in row]


@pytest.mark.parametrize("name", ["untied", "mistral", "llama"])
def test_the_stages_one_after_the_other_are_the_model(name, tiny_models):
    """Three of them: the middle one has neither embedding nor head."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip

    def load():
        torch.manual_seed(0)
        if name == "llama":
            return LlamaForCausalLM(config).eval()
        model = AutoModelForCausalLM.from_pretrained(tiny_models[name])
        model.model.layers.append(model.model.layers[0])
        model.config.num_hidden_layers = 3
        if hasattr(model.config, "layer_types"):
            model.config.layer_types = ["full_attention"] * 3
        return model.eval()

    whole, stages = load(), [keep_stage(load(), i, 3) for i in range(3)]
    names = [set(stage.state_dict()) for stage in stages]
    assert sum(map(len, names)) == len(set().union(*names))
    assert set().union(*names) == set(whole.state_dict())
    assert all(any("layers" in name for name in held) for held in names)
    tokens = torch.randint(0, 96, (2, 12))
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])  # two documents in the first
    hidden = tokens
    with torch.no_grad():
        for stage in stages:
            hidden = stage(input_ids=hidden, position_ids=positions, use_cache=False).logits
        assert torch.equal(hidden, whole(tokens, position_ids=positions, use_cache=False).logits)


def test_two_processes_train_as_one_and_each_holds_its_layers_only(tiny_models, tmp_path):
    """Chats of unlike lengths, three batches in an update but one of a single chat in the last, a
    norm that clips: losses, norms, weights and evaluation are those of one process."""
    data = write_jsonl(tmp_path / "chats.jsonl", [*make_chats(20), *make_chats(5)])
    val = write_jsonl(tmp_path / "val.jsonl", make_chats())
    arguments = (
        f"--task sft --tuning full --model_name {tiny_models['untied']} --train_data {data} "
        f"--val_data {val} --max_seq_length 128 --batch_size 2 --gradient_accumulation_steps 3 "
        "--num_epochs 1 --learning_rate 3e-3 --max_grad_norm 0.5 --logging_steps 1 --no_bf16"
    ).split()
    one, two = tmp_path / "one", tmp_path / "two"
    expected = main([*arguments, "--output_dir", str(one)], run, SCRIPT)
    said = launch(*arguments, "--output_dir", str(two))
    found = json.loads((two / "summary.json").read_text())
    assert "(2 x 3 accumulation x 1 replicas)" in said
    checkpoint = "checkpoint-5"
    assert len(logged(two / checkpoint)) == 5
    assert logged(two / checkpoint) == [
        pytest.approx(row, abs=1e-5) for row in logged(one / checkpoint)
    ]
    weights, others = (load_file(folder / "final/model.safetensors") for folder in (one, two))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-5, rtol=0)
    for key in ("train_tokens", "global_batch_size", "steps"):
        assert found[key] == expected[key]
    assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
    for key in ("validation", "validation_before_training"):
        assert found[key]["chats"]["loss"] == pytest.approx(
            expected[key]["chats"]["loss"], abs=1e-5
        )

    for stage, parts in enumerate(
        (("embed_tokens", "layers.0."), ("layers.1.", ".norm", "lm_head"))
    ):
        file = two / checkpoint / f"optimizer_{stage}_of_2.pt"
        moments = torch.load(file, weights_only=True)["optimizer"]["state"].values()
        own = [tensor.numel() for name, tensor in weights.items() if any(p in name for p in parts)]
        assert sorted(state["exp_avg"].numel() for state in moments) == sorted(own)


def test_a_pipeline_from_scratch_resumes_to_the_same_bytes_and_its_model_reloads(tmp_path):
    data = write_jsonl(tmp_path / "texts.jsonl", make_texts())
    val = write_jsonl(tmp_path / "val.jsonl", make_texts(10, seed=1))
    line = (
        f"--task cpt {SMALL} --train_data {data} --val_data {val} --max_seq_length 128 --no_bf16 "
        "--max_steps 6 --save_steps 3 --batch_size 2 --gradient_accumulation_steps 2 "
        f"--learning_rate 3e-3 --gradient_checkpointing --output_dir {tmp_path / 'run'}"
    ).split()
    launch(*line)
    final = tmp_path / "run" / "final"
    whole = (final / "model.safetensors").read_bytes()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    after, before = (summary[key][TEXTS] for key in ("validation", "validation_before_training"))
    assert after["loss"] < before["loss"] - 0.5

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(final),
        AutoTokenizer.from_pretrained(final),
    )
    samples = {TEXTS: [{**row, "line": 1, "dataset": TEXTS} for row in make_texts(10, seed=1)]}
    settings = LanguageSettings(max_seq_length=128)
    evaluation = LanguageEvaluation(samples, tokenizer, settings, tmp_path, 16)
    assert evaluation._losses(model.eval(), TEXTS)["loss"] == pytest.approx(after["loss"], abs=1e-5)

    shutil.rmtree(final)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "summary.json").unlink()
    assert "resuming from" in launch(*line)
    assert (final / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("world_size", "line", "message"),
    [
        (4, "", "needs as many processes: accelerate launch"),
        (2, "--tuning lora", "is for --tuning full and scratch"),
        (2, "--evaluation generate", "take --evaluation loss"),
        (2, "--fp16", "and --fp16 exclude each other"),
    ],
)
def test_what_no_pipeline_can_do_is_refused_in_one_sentence(
    world_size, line, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    data = write_jsonl(tmp_path / "chats.jsonl", make_chats())
    common = f"--tuning full --pipeline_parallel_size 2 --train_data {data}"
    with pytest.raises(SystemExit) as stopped:
        main([*common.split(), *line.split()], run, SCRIPT)
    assert stopped.value.code == 2
    [said] = capsys.readouterr().err.splitlines()
    assert message in said
    assert os.environ.get("PIPELINE_PARALLEL_SIZE", "1") == "1"


def test_a_model_whose_first_and_last_stage_share_a_matrix_is_refused(tiny_models):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["tied"])
    with pytest.raises(InputError, match="whose output matrix is not their input embedding"):
        keep_stage(model, 0, 2)
    with pytest.raises(InputError, match="is more than the model's 2 layers"):
        keep_stage(AutoModelForCausalLM.from_pretrained(tiny_models["untied"]), 0, 3)
