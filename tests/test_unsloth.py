"""--backend unsloth, as far as a machine without a GPU can tell.

Proved here: what is refused and how it is said; that unsloth is imported before transformers and
peft; and, with the stand-in of unsloth_double.py, that our tag rows, our loss, validation, and the
saved adapter are right beside the liberties that unsloth takes with a model. Not proved: unsloth's
kernels, its decoding routine, and that the stand-in takes all of the liberties (it was written by
reading unsloth 2026.10.7); the first run on a GPU has to.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import unsloth_double
from conftest import DEMO_DATA, ROOT, make_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

import train_confidence_lora as confidence
from train_confidence_lora import (
    Collator,
    confidence_ids,
    initialize_model_with_tokens,
    label_loss,
    main,
    score_batch,
)

SCRIPT = str(ROOT / "train_confidence_lora.py")


@pytest.fixture
def unsloth(monkeypatch):
    unsloth_double.calls.clear()
    monkeypatch.setattr(confidence, "unsloth", unsloth_double, raising=False)
    return unsloth_double


@pytest.fixture
def records():
    return confidence.read_records(DEMO_DATA)[:12]


def both_models(folder, **options):
    """The same adapter, its LoRA no longer zero, around a model of transformers and of unsloth."""
    models = []
    for backend in ("hf", "unsloth"):
        model, tokenizer = initialize_model_with_tokens(folder, backend=backend, **options)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                if "lora_" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape))
                elif "trainable_tokens" in name:  # they start alike
                    weight.add_(0.05 * torch.randn(weight.shape))
        models.append(model)
    return models, tokenizer


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--backend unsloth needs a GPU, and none is here: leave it out"),
        ("--adapter activated", "--adapter activated and --backend unsloth exclude each other"),
        ("--load_in_8bit", "--load_in_8bit and --backend unsloth exclude each other"),
        ("--attn_implementation eager", "--attn_implementation eager and --backend unsloth"),
    ],
)
def test_F4_unsloth_is_refused_in_one_sentence_before_anything_is_loaded(line, message, train_file):
    command = [sys.executable, SCRIPT, "--train_data", train_file, "--model_name", "nowhere"]
    command += ["--backend", "unsloth", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_package_and_a_late_flag_are_named(monkeypatch, train_file, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, message in [(None, "pip install unsloth"), (True, "on the command line")]:
        monkeypatch.setattr(confidence, "find_spec", lambda name, found=found: found)
        with pytest.raises(SystemExit) as exit_info:
            main(["--train_data", train_file, "--backend", "unsloth"])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--backend", "unsloth"], ["--backend=unsloth"], []])
def test_unsloth_is_imported_first_and_only_when_asked_for(flag, tmp_path):
    if flag:  # a GPU that torch believes in until it is used
        (tmp_path / "sitecustomize.py").write_text(
            "import torch\ntorch.cuda.is_available = lambda: True\n", encoding="utf-8"
        )
    (tmp_path / "unsloth.py").write_text(
        'import sys\nsys.exit(f\'unsloth after {sorted({"transformers", "peft"} & '
        "set(sys.modules))}')\n",
        encoding="utf-8",
    )
    command = [sys.executable, SCRIPT, *flag, "--train_data", "nowhere"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ("unsloth after []" in done.stderr) == bool(flag)
    assert ("--train_data nowhere does not exist" in done.stderr) == (not flag)


@pytest.mark.parametrize("kind", ["qwen", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare_rows", [0, 40])
def test_F4_loss_and_every_gradient_are_those_of_peft(
    unsloth, tmp_path, records, kind, tied, spare_rows
):
    folder = make_model(tmp_path / "model", kind, tied, spare_rows)
    models, tokenizer = both_models(folder)
    rows = list(confidence.encode_records(tokenizer, records, "lora", 256))
    batch = Collator(tokenizer.pad_token_id)(rows)
    losses, gradients = [], []
    for model in models:
        loss, _ = label_loss(model.train(), batch, confidence_ids(tokenizer))
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert sum("trainable_tokens_delta" in name for name in gradients[1]) == (1 if tied else 2)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5])  # unsloth goes round the head for a single record
@pytest.mark.parametrize("max_new_tokens", [None, 8])
def test_scores_are_those_of_peft(unsloth, tmp_path, records, count, max_new_tokens):
    models, tokenizer = both_models(make_model(tmp_path / "model"))
    hf, ours = (
        score_batch(model.eval(), tokenizer, records[:count], max_new_tokens) for model in models
    )
    assert [row[1:] for row in hf] == [row[1:] for row in ours]
    assert [row[0] for row in hf] == pytest.approx([row[0] for row in ours], abs=1e-5)
    assert ("generate" in unsloth.calls) == (max_new_tokens is not None)


def test_other_architectures_are_refused(unsloth, tmp_path):
    folder = tmp_path / "model"
    make_model(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    with pytest.raises(confidence.InputError, match="takes llama, mistral, qwen2, qwen3, not gemm"):
        confidence.load_base_model(str(folder), backend="unsloth")


def test_F4_a_whole_run_leaves_an_adapter_that_plain_peft_loads(unsloth, tmp_path, monkeypatch):
    monkeypatch.setattr(confidence, "check_unsloth", lambda values: None)  # there is no GPU
    states = []
    step = confidence.LabelTrainer.training_step

    def watched(self, model, *args, **kwargs):
        states.append({m.gradient_checkpointing for m in model.modules() if hasattr(m, "mlp")})
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(confidence.LabelTrainer, "training_step", watched)
    folder, output = make_model(tmp_path / "model"), tmp_path / "out"
    summary = main(
        f"--model_name {folder} --train_data {DEMO_DATA} --output_dir {output} --backend unsloth "
        f"--max_steps 3 --batch_size 4 --eval_steps 2 --save_steps 2 --val_samples 6 "
        f"--max_seq_length 128 --max_new_tokens 4 --val_data demo={DEMO_DATA} "
        f"--validation_answers generate --gradient_checkpointing".split()
    )
    assert summary["status"] == "completed"
    assert states == [{True}] * len(states)  # although each validation's generate() turned it off
    assert {"from_pretrained", "get_peft_model", "generate", "head"} <= set(unsloth.calls)
    assert "backend: unsloth" in (output / "settings.yaml").read_text(encoding="utf-8")

    tokenizer = confidence.load_tokenizer(str(output / "final"))
    base = AutoModelForCausalLM.from_pretrained(folder)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = PeftModel.from_pretrained(base, output / "final")
    assert model.peft_config["default"].base_model_name_or_path == folder
    sample = confidence.read_records(DEMO_DATA)[:4]
    assert len(score_batch(model.eval(), tokenizer, sample, None)) == 4
