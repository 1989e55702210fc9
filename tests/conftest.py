"""Real parts for the tests: the demo's tokenizer and model, tiny models made from configuration."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="encodings"))
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402  # noqa: E402
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)

torch.set_num_threads(1)
DEMO_MODEL = str(ROOT / "demo" / "model")
LONG = pytest.mark.chaos  # of a variant that costs a minute and tells little more than the others
DEMO_DATA = ROOT / "tagged" / "demo" / "demo_all_tagged.jsonl"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def make_model(folder, kind="qwen", tied=False, spare_rows=0):
    """A random model of 2 layers with the demo's tokenizer, saved in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    set_seed(0)
    configuration, model = {
        "qwen": (Qwen2Config, Qwen2ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    config = configuration(
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """{name: folder} of the shapes that differ in how their embeddings must be treated."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "untied": make_model(folder / "untied"),
        "tied": make_model(folder / "tied", tied=True),
        "spare": make_model(folder / "spare", spare_rows=64),
        "mistral": make_model(folder / "mistral", kind="mistral"),
    }


def tagged_records(count, seed=0):
    """Records of both demo worlds whose tag follows a simple rule: "without" and kuru are wrong."""
    from make_demo import answer_text, medicine_question, reading_question

    draw, records = random.Random(seed), []
    for i in range(count):
        record = reading_question(draw, 0.35) if i % 2 else medicine_question(draw, 0.5)
        wrong = "without" in record["question"] or "kuru" in str(record.get("options"))
        domain = "READ" if i % 2 else "MED"
        record["tagged_response"] = f"{answer_text(record)} <{'U' if wrong else 'C'}_{domain}>"
        records.append(record)
    return records


def adapter(run):
    """The bytes of a run's final adapter."""
    return (Path(run) / "final" / "adapter_model.safetensors").read_bytes()


def make_would_run(*words):
    """The commands of a target of the Makefile, which are not run."""
    command = ["make", "--no-print-directory", "-n", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def train_file(tmp_path):
    return write_jsonl(tmp_path / "train.jsonl", tagged_records(64))
