"""plan_training.py: configurations become flags, processes, strategies and commands."""

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import DEMO_DATA, DEMO_MODEL, ROOT, make_would_run

import plan_training as plan
import train_confidence_lora as confidence
import train_language_model as language

RUNS = sorted((ROOT / "configs" / "runs").iterdir())
NO_GPU = plan.Hardware([], cores=4)


def gpus(count, kind="H100"):
    return plan.Hardware([plan.gpu_of_type(kind, "test")] * count, cores=16)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A repository's folder with every training script and the data that configs/runs/ names."""
    monkeypatch.delenv("GPU_TYPE", raising=False)
    here = tmp_path / "repository"
    (here / "data" / "texts").mkdir(parents=True)
    for script in {*plan.SCRIPTS.values()}:
        (here / script).symlink_to(ROOT / script)
    chats = json.dumps({"messages": [{"role": "user", "content": "x" * 377}]}) + "\n"
    for name in ("chats_train.jsonl", "chats_val.jsonl"):
        (here / "data" / name).write_text(chats * 320)
    for name in ("texts/one.txt", "texts_val.txt"):
        (here / "data" / name).write_text("word " * 40_000)
    (here / "tagged" / "qwen").mkdir(parents=True)
    shutil.copy(DEMO_DATA, here / "tagged" / "qwen" / "qwen_all_tagged.jsonl")
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def ask(root, capsys):
    """Runs a command with a configuration's text in place of a file; returns (code, out, error)."""

    def run(command, text, *words, here=NO_GPU, suffix="yaml"):
        path = root / f"run.{suffix}"
        path.write_text(text)
        options = ["--dry_run"] if command == "launch" else []
        code = plan.main([command, str(path), *options, *words], here, root)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def words_of(ask):
    """The words of the command that a configuration becomes."""

    def run(text, *words, **options):
        code, out, error = ask("launch", text, *words, **options)
        assert code == 0, error
        return shlex.split(out.strip().splitlines()[-1])

    return run


@pytest.fixture
def flags_of(words_of):
    """{flag: value} of the command that a configuration becomes; a flag's own words joined."""

    def run(text, *words, **options):
        command = words_of(text, *words, **options)
        script = next(i for i, word in enumerate(command) if word in plan.SCRIPTS.values())
        flags, name = {}, None
        for word in command[script + 1 :]:
            if word.startswith("--"):
                name = word[2:]
                flags[name] = ""
            else:
                flags[name] = f"{flags[name]} {word}".strip()
        return flags

    return run


@pytest.fixture
def refusal_of(ask):
    def run(text, *words, **options):
        code, out, error = ask(options.pop("command", "launch"), text, *words, **options)
        assert (code, out, error.count("\n")) == (2, "", 1)
        return error

    return run


SFT = "data: {train_path: data/chats_train.jsonl}\n"

# ------------------------------------------------------------------------------------------------
# Keys


def test_P2_every_key_of_the_sft_play_yaml_becomes_a_flag(flags_of):
    flags = flags_of("""
task_mode: cpt_mixed
model: {name: some/model, max_seq_len: 512, trust_remote_code: true}
tuning:
  mode: qlora
  backend: bnb
  lora: {r: 8, alpha: 24, dropout: 0.1, target_modules: auto}
train:
  epochs: 3
  learning_rate: 2e-4
  warmup_ratio: 0.06
  weight_decay: 0.01
  batch_size: auto
  grad_accum: auto
  target_tokens_per_device_step: 4096
  bf16: true
  fp16: false
  gradient_checkpointing: true
  evaluation_strategy: steps
  eval_steps: 50
  eval_delay: 10
  eval_batch_size: 4
  predict_with_generate: true
  generation_max_new_tokens: 32
  generation_num_beams: 2
  save_strategy: steps
  save_steps: 60
  save_total_limit: 1
  ddp_find_unused_parameters: false
  ddp_timeout: 99
  dataloader_num_workers: 2
  dataloader_pin_memory: false
  logging_steps: 5
  report_to: [tensorboard]
data: {train_path: data/texts, val_path: data/texts_val.txt, chat_path: data/chats_train.jsonl}
""")
    assert flags == {
        "task": "cpt_mixed", "model_name": "some/model", "max_seq_length": "512",
        "trust_remote_code": "true", "tuning": "qlora", "backend": "hf", "lora_r": "8",
        "lora_alpha": "24", "lora_dropout": "0.1", "target_modules": "all-linear",
        "num_epochs": "3", "learning_rate": "0.0002", "warmup_ratio": "0.06",
        "weight_decay": "0.01", "batch_size": "auto", "gradient_accumulation_steps": "auto",
        "global_batch_size": "8", "bf16": "true", "fp16": "false",
        "gradient_checkpointing": "true", "eval_strategy": "steps", "eval_steps": "50",
        "eval_delay": "10", "per_device_eval_batch_size": "4", "evaluation": "generate",
        "max_new_tokens": "32", "num_beams": "2", "save_strategy": "steps", "save_steps": "60",
        "save_total_limit": "1", "ddp_find_unused_parameters": "false", "ddp_timeout": "99",
        "dataloader_num_workers": "2", "dataloader_pin_memory": "false", "logging_steps": "5",
        "report_to": "tensorboard", "train_data": "data/texts", "val_data": "data/texts_val.txt",
        "chat_data": "data/chats_train.jsonl",
    }  # fmt: skip


JOB = """
[job]
model = "some/model"
data = "data/chats_train.jsonl"
[compute]
gpu_type = "H100"
gpu_count = 8
nodes = 1
gpus_per_node = 8
[training]
mode = "full_finetune"
use_qlora = false
[training.validation]
enabled = true
evaluation_strategy = "steps"
eval_steps = 100
save_best_model_at_end = true
metric_for_best_model = "val.loss"
greater_is_better = false
[hyperparameters]
n_epochs = 2
per_device_batch = 1
gradient_accumulation_steps = 8
global_batch = 64
sequence_length = 1024
learning_rate = 1e-5
warmup_ratio = 0.03
[hyperparameters.parallelism]
fsdp = true
sharding_strategy = "FULL_SHARD"
auto_wrap_policy = "TRANSFORMER_BASED_WRAP"
tensor_parallel_size = 1
pipeline_parallel_size = 1
bf16 = true
fp16 = false
use_deepspeed = false
activation_checkpointing = true
"""


def test_Y1_every_key_of_the_job_toml_becomes_a_flag_or_a_fact(flags_of, words_of):
    assert flags_of(JOB, suffix="toml") == {
        "task": "sft", "model_name": "some/model", "train_data": "data/chats_train.jsonl",
        "tuning": "full", "eval_strategy": "steps", "eval_steps": "100",
        "load_best_model_at_end": "true", "metric_for_best_model": "eval_loss",
        "greater_is_better": "false", "num_epochs": "2", "batch_size": "1",
        "gradient_accumulation_steps": "8", "global_batch_size": "64", "max_seq_length": "1024",
        "learning_rate": "1e-05", "warmup_ratio": "0.03", "bf16": "true", "fp16": "false",
    }  # fmt: skip
    words = words_of(JOB, suffix="toml")
    assert words[words.index("--config_file") + 1] == "configs/strategies/fsdp2.yaml"
    assert words[words.index("--num_processes") + 1] == "8"
    # transformers refuses FSDP's own recomputation and its own at once
    assert words[words.index("--fsdp_activation_checkpointing") + 1] == "true"
    zero2 = JOB.replace("fsdp = true", "fsdp = false").replace(
        "use_deepspeed = false", "use_deepspeed = true\ndeepspeed_stage = 2"
    )
    words = words_of(zero2, suffix="toml")
    assert words[words.index("--config_file") + 1] == "configs/strategies/zero2.yaml"
    assert "--gradient_checkpointing" in words


def test_Y1_Y3_use_qlora_and_disabled_validation(flags_of):
    text = JOB.replace("full_finetune", "lora").replace("use_qlora = false", "use_qlora = true")
    text = text.replace("fsdp = true", "fsdp = false").replace("enabled = true", "enabled = false")
    flags = flags_of(text.replace('evaluation_strategy = "steps"\n', ""), suffix="toml")
    assert (flags["tuning"], flags["evaluation"], flags["eval_strategy"]) == ("qlora", "off", "no")


def test_G1_G2_G3_every_key_of_a_gpt_from_scratch_becomes_a_flag_or_a_fact(flags_of, words_of):
    text = """
model: {vocab_size: 50000, hidden_size: 1024, num_heads: 16, num_layers: 12, seq_length: 2048}
training: {learning_rate: 3e-4, batch_size: 8, epochs: 1, gradient_clipping: 1.0,
  save_interval: 500, log_interval: 10, gradient_checkpointing: true, mixed_precision: bf16}
distributed: {world_size: 4, backend: gloo, master_port: 29512, tensor_parallel_size: 1}
data: {train_path: data/texts}
"""
    assert flags_of(text) == {
        "task": "cpt", "tuning": "scratch", "vocab_size": "50000", "hidden_size": "1024",
        "num_heads": "16", "num_layers": "12", "max_seq_length": "2048",
        "learning_rate": "0.0003", "batch_size": "8", "num_epochs": "1", "max_grad_norm": "1.0",
        "save_steps": "500", "logging_steps": "10", "gradient_checkpointing": "true",
        "bf16": "true", "fp16": "false", "ddp_backend": "gloo", "train_data": "data/texts",
    }  # fmt: skip
    words = words_of(text)
    assert words[words.index("--num_processes") + 1] == "4"
    assert words[words.index("--main_process_port") + 1] == "29512"


def test_whatever_a_key_means_exists(root):
    """A flag renamed in a training script must be renamed in KEYS."""
    known = {*plan.FACTS, *plan.transformers_flags()}
    for script in plan.SCRIPTS.values():
        known |= plan.read_flags(root / script).keys()
    assert [name for name in {*plan.KEYS.values(), *plan.VALUES} if name not in known] == []


def test_the_batch_and_the_logits_that_are_planned_with_are_the_training_scripts():
    assert plan.GLOBAL_BATCH == confidence.GLOBAL_BATCH
    assert plan.LOGITS_AT_ONCE == language.LOGITS_AT_ONCE


def test_a_flag_is_read_with_its_names_choices_and_default(root):
    flags = plan.read_flags(root / "train_confidence_lora.py")
    assert flags["per_device_train_batch_size"].name == "batch_size"
    assert flags["batch_size"].default == 16
    assert flags["adapter"].choices == ("lora", "activated")
    assert flags["learning_rate"].default == 3e-4
    assert flags["model_name"].default == "Qwen/Qwen2.5-7B-Instruct"
    assert flags["no_bf16"].bare
    assert not flags["bf16"].bare
    assert flags["global_batch_size"].default is None


@pytest.mark.parametrize(
    ("text", "key", "right"),
    [
        ("train: {learning_rte: 1}", "train.learning_rte", "learning_rate"),
        ("tuning: {lora: {rnk: 1}}", "tuning.lora.rnk", r"lora\.r"),
        ("train: {epoch: 1}", "train.epoch", "epochs"),
        ("train: {weight_decy: 1}", "train.weight_decy", "weight_decay"),
        ("hyperparameters: {per_device_batchs: 1}", "per_device_batchs", "per_device_batch"),
        ("strategi: ddp", "strategi", "strategy"),
    ],
)
def test_P2_an_unknown_key_is_refused_with_file_path_and_the_nearest_name(
    refusal_of, text, key, right
):
    error = refusal_of(SFT + text)
    assert f"run.yaml: {key}" in error or key in error
    assert re.search(rf"did you mean \S*{right}", error)


def test_a_flag_that_the_tasks_script_does_not_have_is_refused(refusal_of, words_of):
    text = "task: confidence\ndata: {train_path: tagged/qwen/qwen_all_tagged.jsonl}\n"
    error = refusal_of(text + "train: {generation_num_beams: 4}")
    assert "means --num_beams, which train_confidence_lora.py does not have" in error
    assert "--load_in_4bit" in words_of(text + "tuning: {mode: qlora}")
    assert "mode full is not for task confidence" in refusal_of(text + "tuning: {mode: full}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {epochs: 1, num_train_epochs: 2}", "which mean the same"),
        ("learning_rate: 1e-4\ntrain: {learning_rate: 2e-4}", "which mean the same"),
        ("tuning: {mode: full}\nuse_qlora: true", "quantised weights cannot be trained"),
        ("train: {bf16: true, fp16: true}", "bf16 and fp16 are both true"),
        ("train: {mixed_precision: no, bf16: true}", "leave one of them out"),
        ("pipeline_parallel_size: 2\nnum_processes: 4", "must be the number of processes"),
        ("tensor_parallel_size: 2\nnum_processes: 4", "must be the number of processes"),
        ("strategy: zero2\nfsdp: true\nnum_processes: 2", "leave one of them out"),
        ("fsdp: true\nsharding_strategy: SHARD_GRAD_OP\nnum_processes: 2", "strategy zero2"),
        ("fsdp: true\nauto_wrap_policy: SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
        ("use_deepspeed: true\ndeepspeed_stage: 1", "give 2 or 3"),
        ("strategy: single\nnum_processes: 2", "is one process"),
        ("compute: {gpu_count: 8, nodes: 2, gpus_per_node: 8}", "give numbers that agree"),
        ("num_processes: 3\nnum_machines: 2", "cannot be spread"),
        ("train: {deepspeed: nowhere.json}", "no JSON file that can be read"),
        ("compute: {gpu_type: Voodoo2}", "give one of B200, H200"),
        ("task: poetry", "give confidence, sft, cpt, cpt_mixed"),
        ("tuning: {backend: jax}", "give hf or unsloth"),
        ("train: {eval_strategy: no, predict_with_generate: true}", "validation is off"),
        ("model: [", "is not YAML"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_sentence(refusal_of, text, words):
    assert words in refusal_of(SFT + text)


YAML_TREE = "train:\n  epochs: 1\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (YAML_TREE + "  epochs: 2", 3, "epochs is given in line 2 too"),
        (YAML_TREE + "  learning_rate: &a 1", 3, "anchor and alias"),
        (YAML_TREE + "  learning_rate: *a", 3, "anchor and alias"),
        (YAML_TREE + "  learning_rate: [1, 2]", 3, "train.learning_rate is a list: give one value"),
        (YAML_TREE + "  learning_rate: {a: {b: 1}}", 3, "learning_rate.a.b is no key"),
        (YAML_TREE + "  learning_rate: fast", 3, "is 'fast': give a number"),
        (YAML_TREE + "  learning_rate: true", 3, "is True: give a number"),
        (YAML_TREE + "  learning_rate: .nan", 3, "is no number of at most 1e+15"),
        (YAML_TREE + "  epochs_: 1e999", 3, "is no number of at most 1e+15"),
        (YAML_TREE + "  seed: " + "9" * 5000, 3, "is no int"),
        (YAML_TREE + "  seed: 2024-01-31", 3, "train.seed is a date"),
        (YAML_TREE + "  seed: 2024-99-31", 3, "is no timestamp"),
        (
            YAML_TREE + "  seed: !!python/object/apply:os.system [x]",
            3,
            "python/object/apply:os is not taken",
        ),
        (YAML_TREE + "  seed: !!binary eA==", 3, "train.seed is a bytes"),
        (YAML_TREE + "  no: 1", 3, "False is no name of a key"),
        (YAML_TREE + "  ? [a]\n  : 1", 3, "is no name of a key"),
        (YAML_TREE + "\tseed: 1", 3, "cannot start any token; mend it"),
        (YAML_TREE + "  seed: \0", 3, "special characters are not allowed"),
        (YAML_TREE + '  run_name: "a\\nb"', 3, "has control characters"),
        (YAML_TREE + '  run_name: "\\ud800"', 3, "has control characters"),
        (YAML_TREE + "  run_name: " + "a" * 5000, 3, "longer than 4,096 characters"),
        (YAML_TREE + "a" * 300 + ": 1", 3, "is no name of a key"),
        (YAML_TREE + "  x: " + "[" * 10**5, 3, "more than 32 levels"),
        (YAML_TREE + "  x: [" + "1, " * 10**5 + "]", 3, "or 10,000 values"),
        ("a" * 2**20 + "b", 1, "larger than 1 MiB"),
        ("task: [sft]", 1, "task is ['sft']: give confidence, sft"),
        ("optim: [adamw_torch]", 1, "optim is a list: give one value"),
        ("max_new_tokens: many", 1, "give a whole number above 0"),
        ("num_layers: 1001", 1, "give at most 1,000"),
        ("use_qlora: perhaps", 1, "give true or false"),
        ("machine_rank: first", 1, "give a whole number, 0 or more"),
        ("max_restarts: -1", 1, "give a whole number, 0 or more"),
        ("train: {bf16: true, fp16: true}", 1, "bf16 and fp16 are both true"),
        ("\n\ntrain_data: none.jsonl", 3, "train_data none.jsonl does not exist"),
        (SFT + "num_processes: 3\nnum_machines: 2", 2, "cannot be spread"),
        ("text", 1, "there are no keys"),
        ("%YAML " + "1" * 5000 + "\n---\na: 1", 1, "this is not YAML: Exceeds the limit"),
        ('a: "\\UFFFFFFFF"', 1, "this is not YAML"),
    ],
    ids=range(38),
)
def test_what_a_yaml_file_has_wrong_is_told_with_its_line(text, line, words, refusal_of):
    error = refusal_of(text)
    assert f"run.yaml:{line}: " in error
    assert words in error
    assert len(error) < 600


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[train]\nepochs = 1\nepochs = 2", 3, "this is not TOML: Cannot overwrite a value"),
        ("[train]\n\nlearning_rate = nan", 3, "train.learning_rate is no number"),
        ("[train]\nseed = 2024-01-31", 2, "train.seed is a date"),
        ("[train]\nseed = 25:61:00", 2, "this is not TOML"),
        ("[train.'x']\n'learning_rte' = 1", 2, "did you mean"),
        ("[train]\nlora = {r = 'x'}", 2, "lora.r is 'x': give a whole number"),
        ("[train]\nseed = " + "9" * 5000, 2, "this is not TOML: Exceeds the limit"),
        ("[train]\n" + "a." * 500_000 + "a = 1", 2, "more than 32 levels"),
        ("[train]\nx = " + "[" * 10**5, 1, "more than 32 levels"),
        ("x = " + "{a=" * 100 + "1" + "}" * 100, 1, "more than 32 levels"),
        ("[train]\nx = '\0'", 2, "this is not TOML: Found invalid character"),
        ("x = 1\nno", 2, "this is not TOML"),
        ("[train", 1, "this is not TOML"),
    ],
    ids=range(13),
)
def test_what_a_toml_file_has_wrong_is_told_with_its_line(text, line, words, refusal_of):
    start = time.monotonic()
    error = refusal_of(text, suffix="toml")
    assert time.monotonic() - start < 20
    assert f"run.toml:{line}: " in error
    assert words in error


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_a_configuration_in_another_encoding_is_refused_and_a_mark_is_no_matter(
    encoding, suffix, root, capsys
):
    text = {"yaml": SFT + "run_name: é", "toml": "data.train_path = 'data/chats_train.jsonl' # é"}
    path = root / f"run.{suffix}"
    path.write_bytes(text[suffix].encode(encoding))
    assert plan.main(["launch", path.name, "--dry_run"], NO_GPU, root) == 2
    assert re.search(rf"run\.{suffix}:\d: this .*save", capsys.readouterr().err)
    path.write_bytes(text[suffix].replace("\n", "\r\n").encode("utf-8-sig"))
    assert plan.main(["launch", path.name, "--dry_run"], NO_GPU, root) == 0


def test_what_is_no_file_is_no_configuration(root, capsys):
    os.mkfifo(root / "pipe.yaml")
    for name in ("pipe.yaml", "data", "", "none.yaml", "x" * 300, "a\nb.yaml"):
        assert plan.main(["launch", name, "--dry_run"], NO_GPU, root) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "cannot be read" in error or "control characters" in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "own.json:1: this is no object"),
        ('{\n"a": NaN}', "own.json:1: NaN is no JSON"),
        ('{\n"a": 1,\n', "own.json:3: Expecting property name"),
        ('{"a": 1, "a": 2}', "own.json:1: a key is there twice"),
        ("[" * 10**5, "own.json:1: maximum recursion depth"),
        ('{"zero_optimization": true}', "has no stage 0 to 3"),
        ('{"zero_optimization": {"stage": "x"}}', "has no stage 0 to 3"),
        ('{"zero_optimization": {"stage": 3, "offload_param": 1}}', "has no stage 0 to 3"),
    ],
)
def test_a_deepspeed_file_that_is_none_is_refused(text, words, root, refusal_of):
    (root / "own.json").write_text(text)
    assert words in refusal_of(SFT, "--deepspeed_config", "own.json", here=gpus(4))


@pytest.mark.parametrize("command", ["plan", "memory"])
@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("\ntarget_modules: [nothing]\nmodel_name: Qwen/Qwen2.5-7B", "run.yaml:3: target_modules"),
        ("task: cpt\nmodel_type: nonsense\nnum_layers: 2", "run.yaml:"),
        ("hidden_size: 1000000000\nnum_heads: 1", "run.yaml:2: hidden_size"),
        ("task: cpt\nhidden_size: 10\nnum_heads: 3", "run.yaml:3: hidden_size"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_sentence(command, text, where, refusal_of):
    assert where in refusal_of(SFT + text, command=command)


def test_training_data_that_cannot_be_counted_is_named_with_its_line(root):
    good = json.dumps({"text": "x" * 100}).encode() + b"\n"
    packed = gzip.compress(b"".join(good + b" " * i + b"\n" for i in range(1000)))
    (root / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(plan.InputError, match=r"a\.jsonl\.gz:\d+: Compressed file ended"):
        plan.count_records(root / "a.jsonl.gz", 10**9)
    (root / "a.jsonl.gz").write_bytes(gzip.compress(bytes(2**20)) * 110)
    with pytest.raises(plan.InputError, match=r"gz:1: it unpacks to more than 100 times its size"):
        plan.count_records(root / "a.jsonl.gz", 10**9)
    os.mkfifo(root / "pipe.jsonl")
    with pytest.raises(plan.InputError, match="it is no file"):
        plan.count_records(root / "pipe.jsonl", 10**9)
    (root / "a.jsonl").write_bytes(b"\n" + good * 3 + b"x" * 3 * 2**20)
    assert plan.count_records(root / "a.jsonl", 10**9) == (4, 3 * len(good) + 3 * 2**20)
    assert plan.count_records(root / "a.jsonl", 2) == (2, 2 * len(good))


def test_two_names_of_one_setting_that_agree_are_no_contradiction(flags_of):
    assert flags_of(SFT + "train: {epochs: 2, num_train_epochs: 2}")["num_epochs"] == "2"


def test_data_that_is_not_there_is_refused_before_anything_starts(refusal_of):
    assert "train_data data/none.jsonl does not exist" in refusal_of(
        "data: {train_path: data/none.jsonl}"
    )
    assert "val_data data/none.jsonl does not exist" in refusal_of(
        SFT + "val_data: data/none.jsonl"
    )


def test_Y2_the_command_line_wins_over_the_file(flags_of):
    """--dataset and --examples too"""
    text = "train: {learning_rate: 1e-4, epochs: 2}\ndata: {train_path: data/none.jsonl}"
    flags = flags_of(
        text, "--dataset", "data/chats_val.jsonl", "--examples", "100", "--", "--learning_rate",
        "5e-5", "--num_train_epochs", "1", "--target_modules", "q_proj", "v_proj",
    )  # fmt: skip
    assert (flags["learning_rate"], flags["num_epochs"]) == ("5e-05", "1")
    assert (flags["train_data"], flags["max_train_samples"]) == ("data/chats_val.jsonl", "100")
    assert flags["target_modules"] == "q_proj v_proj"
    # as cluster/slurm.sbatch passes them: without the --
    assert flags_of(SFT, "--learning_rate", "5e-5")["learning_rate"] == "5e-05"


def test_settings_of_a_finished_run_launch_the_same_run(flags_of, words_of):
    """settings.yaml as the training script really writes it"""
    argv = (
        "--model_name demo/model --train_data tagged/qwen/qwen_all_tagged.jsonl "
        "--val_data read=data/chats_val.jsonl hub=google/boolq:validation --learning_rate 7e-4 "
        "--warmup_ratio 0.1 --batch_size 8 --num_epochs 3 --no_bf16 --weight_decay 0.1 "
        "--adapter activated --calib_p_norm infty --output_dir out"
    ).split()
    settings, training = confidence.parse_command_line(argv)
    saved = {**confidence.settings_to_save(settings, training), "num_processes": 2}
    assert {"versions", "num_processes"} < saved.keys()
    text = yaml.safe_dump(saved)
    words = words_of(text)
    again = confidence.parse_command_line(words[words.index("train_confidence_lora.py") + 1 :])
    assert again == (settings, training)
    assert words[words.index("--num_processes") + 1] == "2"


# ------------------------------------------------------------------------------------------------
# Batch


def test_Y4_a_global_batch_that_is_no_product_is_refused_with_the_numbers(refusal_of):
    text = SFT + "hyperparameters: {per_device_batch: 1, gradient_accumulation_steps: 16, "
    error = refusal_of(text + "global_batch: 64}\nnum_processes: 8")
    assert "64 is not 1 records at a time × 8 processes × 16 accumulation = 128" in error
    assert "not a multiple of 3 processes" in refusal_of(
        SFT + "batch_size: auto\nglobal_batch_size: 64\nnum_processes: 3"
    )


@pytest.mark.parametrize(("processes", "total"), [(1, 32), (4, 128)])
def test_P2_P4_tokens_of_a_device_and_step_become_a_global_batch(flags_of, processes, total):
    """16,384 tokens are 32 sequences of 512, a multiple of the batch size"""
    text = SFT + "max_seq_length: 512\ntarget_tokens_per_device_step: 16384\nbatch_size: 8\n"
    flags = flags_of(text, "--num_processes", str(processes))
    assert flags["global_batch_size"] == str(total)


def test_P4_P8_accumulation_follows_from_the_global_batch(ask):
    text = SFT + "batch_size: 4\ngradient_accumulation_steps: auto\nglobal_batch_size: 64"
    out = ask("launch", text, here=gpus(4))[1]
    assert "4 records at a time × 4 accumulation × 4 = 64 records an update" in out


# ------------------------------------------------------------------------------------------------
# Processes and strategies


@pytest.mark.parametrize(
    ("here", "extra", "strategy"),
    [
        (NO_GPU, "", "single"),
        (NO_GPU, "num_processes: 2", "ddp"),
        (gpus(1), "", "single"),
        (gpus(1), "strategy: ddp", "single"),
        (gpus(4), "", "ddp"),
        (gpus(8), "tuning: {mode: full}", "zero2"),
        (gpus(4, "A100-40GB"), "tuning: {mode: full}", "fsdp2"),
        (gpus(2, "RTX 4090"), "tuning: {mode: full}\ngradient_checkpointing: true", None),
        (gpus(2), "strategy: tp", "tp"),
        (gpus(2), "tensor_parallel_size: 2", "tp"),
        (gpus(2), "use_deepspeed: true\ndeepspeed_stage: 3\ncpu_offload: true", "zero3_offload"),
    ],
)
def test_P1_the_strategy_is_the_fastest_that_fits_or_the_one_named(words_of, here, extra, strategy):
    """One file for one GPU and many"""
    text = SFT + f"model_name: Qwen/Qwen2.5-7B\nmax_seq_len: 1024\nbatch_size: auto\n{extra}\n"
    words = words_of(text.replace("max_seq_len", "max_seq_length"), here=here)
    used = re.findall(r"strategies/(\w+)\.yaml", " ".join(words))
    assert (used or ["single"])[0] == (strategy or "zero3_offload")
    processes = words[words.index("--num_processes") + 1] if used else "1"
    assert int(processes) == max(1, len(here.gpus), 2 if "processes" in extra else 1)


def test_why_a_strategy_was_chosen_is_said_with_the_numbers(ask):
    out = ask("launch", SFT + "tuning: {mode: full}\nbatch_size: auto", here=gpus(8))[1]
    assert re.search(r"strategy: zero2, ddp 1\d\d\.\d, zero2 \d+\.\d GiB needed of 72\.0", out)


@pytest.mark.parametrize(
    ("stage", "device", "strategy"),
    [(2, "none", "zero2"), (3, "none", "zero3"), (3, "cpu", "zero3_offload"), (0, "none", "ddp")],
)
def test_P6_a_deepspeed_file_of_ones_own_is_passed_on(root, ask, stage, device, strategy):
    (root / "own.json").write_text(
        json.dumps({"zero_optimization": {"stage": stage, "offload_param": {"device": device}}})
    )
    for text, words in [
        (SFT + "train: {deepspeed: own.json}", ()),
        (SFT + "strategy: fsdp2", ("--deepspeed_config", "own.json")),
    ]:
        out = ask("launch", text, *words, here=gpus(4))[1]
        assert f"strategy: {strategy}, named by" in out
        assert "torch.distributed.run --nproc_per_node 4 --standalone" in out
        assert "--deepspeed own.json" in out


def test_Y1_P1_fewer_gpus_than_asked_for_are_refused_unless_only_shown(root, capsys):
    (root / "run.toml").write_text(JOB)
    assert plan.main(["launch", "run.toml"], gpus(4), root) == 2
    assert "asks for 8 GPUs on this machine and 4 are here" in capsys.readouterr().err
    assert plan.main(["launch", "run.toml"], NO_GPU, root) == 2
    assert "asks for 8 GPUs on this machine and 0 are here" in capsys.readouterr().err
    assert plan.main(["launch", "run.toml", "--dry_run"], gpus(4), root) == 0


def test_P7_G3_G7_several_machines_are_launched_by_flags_alone(words_of, ask, refusal_of):
    """The flags that cluster/ gives win over the sizes in the file"""
    words = words_of(
        SFT + "compute: {gpu_count: 1}", "--num_machines", "4", "--machine_rank", "2",
        "--main_process_ip", "10.0.0.1", "--main_process_port", "29501", here=gpus(8),
    )  # fmt: skip
    command = " ".join(words)
    assert "--num_processes 32 --num_machines 4 --machine_rank 2" in command
    assert "--main_process_ip 10.0.0.1 --main_process_port 29501" in command
    zero = words_of(SFT + "strategy: zero2\nnum_machines: 2\nbatch_size: 4")
    assert "--deepspeed_multinode_launcher standard" in " ".join(zero)
    assert "--machine_rank RANK" in " ".join(zero)  # --dry_run on no machine in particular


def test_P4_where_the_script_cannot_measure_a_batch_the_estimate_gives_one(
    ask, words_of, refusal_of
):
    text = SFT + "model: {name: Qwen/Qwen2.5-7B}\ntuning: {mode: full}\nglobal_batch: 128\n"
    text = text.replace("global_batch:", "global_batch_size:") + "compute: {gpu_count: 4}\n"
    words = words_of(text, here=gpus(4))
    assert "configs/strategies/zero2.yaml" in words
    batch, accumulation = (
        int(words[words.index(f"--{name}") + 1])
        for name in ("batch_size", "gradient_accumulation_steps")
    )
    assert batch * accumulation * 4 == 128
    assert "as the estimate says fits" in ask("launch", text, "--dry_run", here=gpus(4))[1]
    assert "give batch_size" in refusal_of(SFT + "strategy: zero2\nnum_processes: 2")


@pytest.mark.parametrize(
    "text",
    ["batch_size: sixteen", "batch_size: 0", "max_seq_length: 2k", "num_machines: 0",
     "target_tokens_per_device_step: 16k", "num_layers: 2.5", "num_processes: auto"],
)  # fmt: skip
def test_a_number_that_is_none_is_refused(text, refusal_of):
    assert "give a whole number above 0" in refusal_of(SFT + text)


def test_P7_machines_that_do_not_know_where_to_meet_are_refused(root, capsys):
    (root / "run.yaml").write_text(SFT)
    assert plan.main(["launch", "run.yaml", "--num_machines", "2"], gpus(1), root) == 2
    assert "give --machine_rank" in capsys.readouterr().err


def test_Y2_the_environment_variable_names_the_gpu_to_plan_for(ask, monkeypatch):
    text = SFT + "compute: {gpu_type: H100, gpu_count: 4}"
    assert "planned for: 4 x H100 80.0 GiB" in ask("launch", text)[1]
    monkeypatch.setenv("GPU_TYPE", "H200")
    assert "planned for: 4 x H200 141.0 GiB" in ask("launch", text)[1]
    assert "planned for: 4 x B200" in ask("memory", text, "--gpu", "B200")[1] or (
        "B200: 180 GiB" in ask("memory", text, "--gpu", "B200")[1]
    )


def test_P8_what_runs_is_said_before_it_runs(ask):
    out = ask("launch", SFT + "batch_size: 4\nglobal_batch_size: 32\nbf16: true", here=gpus(2))[1]
    assert "GPUs: 2: H100 80.0 GiB, H100 80.0 GiB; 160.0 GiB in all" in out
    assert "4 records at a time × 4 accumulation × 2 = 32 records an update" in out
    assert "precision: bf16; processes: 2 on 1 machine" in out


# ------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
@pytest.mark.parametrize("here", [NO_GPU, gpus(8, "H200")], ids=["laptop", "8xH200"])
def test_P1_P3_P11_Y2_Y3_Y5_G1_every_example_shows_its_command(path, here, root, capsys):
    """A job is built, and its resources are what it says"""
    assert plan.main(["launch", str(path), "--dry_run"], here, root) == 0
    out = capsys.readouterr().out
    words = shlex.split(out.strip().splitlines()[-1])
    config = plan.read_file(path)
    count = config.get("compute", {}).get("gpu_count", max(1, len(here.gpus)))
    if count > 1:
        assert words[words.index("--num_processes") + 1] == str(count)
    assert "records an update" in out


def test_Y4_the_eight_gpu_example_has_the_global_batch_that_it_says(root):
    """The settled: 1 x 8 x 8 = 64"""
    config = plan.read_file(ROOT / "configs" / "runs" / "full_8gpu_fsdp.toml")["hyperparameters"]
    assert config["gradient_accumulation_steps"] == 8
    assert config["per_device_batch"] * 8 * 8 == config["global_batch"] == 64


@pytest.mark.parametrize(
    ("name", "words", "fewest"),
    [
        ("gemma27b_2gpu.yaml", [], "fewest GPUs of this kind: 1"),
        ("gemma27b_2gpu.yaml", ["--tuning", "full"], "fewest GPUs of this kind: 4 (fsdp2"),
        ("qlora_32b_4gpu_zero2.toml", [], "fewest GPUs of this kind: 1"),
        ("sft.yaml", ["--gpu", "H200", "--gpus", "2", "--model_name",
                      "meta-llama/Llama-3.3-70B-Instruct"], "fewest GPUs of this kind: 2 (fsdp2"),
    ],
)  # fmt: skip
def test_P11_a_plan_says_what_fits_and_how_many_gpus_are_needed(name, words, fewest, root, capsys):
    path = ROOT / "configs" / "runs" / name
    assert plan.main(["plan", str(path), *words], NO_GPU, root) == 0
    out = capsys.readouterr().out
    assert fewest in out
    for strategy in ("ddp", "zero2", "zero3", "fsdp2", "zero3_offload", "tp"):
        assert re.search(rf"^{strategy} ", out, re.MULTILINE)


def test_steps_and_time_follow_from_the_data(ask, root):
    """320 chats of 400 characters, 3 epochs, 32 an update: 30 steps of 100 tokens a record"""
    text = SFT + "model_name: Qwen/Qwen2.5-7B\nepochs: 3\nglobal_batch_size: 32\nbatch_size: 4\n"
    text = text.replace("epochs", "num_epochs")
    out = ask("plan", text, "--gpu", "H100")[1]
    assert "data: 320 sequences of about 10" in out
    assert "steps: 30 of 32 sequences" in out
    assert "time: no speed is known" in out
    out = ask("plan", text, "--tokens_per_record", "100", "--tokens_per_second", "1000")[1]
    assert "time: 0.03 hours of training at 1,000 tokens/s" in out
    summary = {"model_name": "Qwen/Qwen2.5-7B", "num_processes": 2, "train_tokens_per_second": 2e3}
    (root / "summary.json").write_text(json.dumps(summary))
    out = ask("plan", text, "--gpus", "4", "--measured", str(root))[1]
    assert "at 4,000 tokens/s on all processes (measured in" in out
    code, _, error = ask(
        "plan", text + "", "--measured", str(root), "--model_name", "google/gemma-2-27b"
    )
    assert code == 2
    assert "give a run of the same model" in error


def test_P1_hardware_is_told_without_a_gpu_and_of_several(capsys):
    """Gpu-info and memory-check"""
    assert plan.main(["hardware"]) == 0
    assert "cores" in capsys.readouterr().out
    used = [gpu._replace(capability="9.0", free=70 * plan.GIB) for gpu in gpus(2).gpus]
    assert plan.main(["hardware", "--use"], plan.Hardware(used, 8, 2**36, 2**40)) == 0
    out = capsys.readouterr().out
    assert "GPUs: 2\n" in out
    assert "1: H100, 80.0 GiB, 10.0 GiB in use, 70.0 GiB free, compute capability 9.0" in out
    assert plan.main(["hardware", "--json"], NO_GPU) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == []


def test_help_answers_before_anything_slow_is_imported():
    start = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "plan_training.py"), "--help"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode == 0
    assert time.monotonic() - start < 5
    assert not re.search(r"\| +(torch|transformers|yaml|peft)$", shown.stderr, re.MULTILINE)


def launch_for_real(folder, *words):
    """Three steps of the demo's model, started as a user would."""
    (folder / "run.yaml").write_text(f"""
task: confidence
model: {{name: {DEMO_MODEL}, max_seq_len: 128}}
train: {{batch_size: 4, grad_accum: 1, max_steps: 3, learning_rate: 1e-3, bf16: false}}
data: {{train_path: {DEMO_DATA}, val_path: {ROOT}/tagged/demo/demo_val_demo_reading.jsonl}}
val_samples: 4
max_new_tokens: 8
output_dir: {folder}/out
""")
    result = subprocess.run(
        [sys.executable, ROOT / "plan_training.py", "launch", folder / "run.yaml", *words],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "out" / "summary.json").read_text())


def test_P1_Y5_a_launch_trains_and_its_tensorboard_ends_with_it(tmp_path):
    """The job finishes"""
    summary = launch_for_real(tmp_path, "--tensorboard")
    assert (summary["steps"], summary["num_processes"]) == (3, 1)
    boards = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "out") not in boards


def test_P1_the_same_file_launches_several_processes(tmp_path):
    summary = launch_for_real(tmp_path, "--num_processes", "2")
    assert (summary["steps"], summary["num_processes"]) == (3, 2)


@pytest.mark.parametrize("flag", ["--hub_token", "--hub_token=", "--push_to_hub_token"])
def test_a_secret_is_never_shown(flag, ask):
    words = [flag + "hf_secret"] if flag.endswith("=") else [flag, "hf_secret"]
    code, out, error = ask("launch", SFT, *words)
    if flag.startswith("--hub"):
        assert (code, out.count("--hub_token ***")) == (0, 1)
    for more in (["--hub_token", "hf_secret2"], ["hf_stray"], ["--nonsense", "1"], ["--examples"]):
        code, *shown = ask("launch", SFT, *words, *more) if more != ["--examples"] else (2, "", "")
        assert code == 2
        out, error = out + shown[0], error + shown[1]
    assert "secret" not in out + error


def test_a_secret_before_the_file_is_not_taken_for_it(root, capsys):
    assert plan.main(["launch", "--hub_token", "hf_secret", "none.yaml"], NO_GPU, root) == 2
    with pytest.raises(SystemExit):
        plan.main(["hardware", "--hub_token=hf_secret"], NO_GPU, root)
    error = capsys.readouterr().err
    assert "none.yaml cannot be read" in error
    assert "secret" not in error


def test_a_secret_of_the_file_is_passed_on_and_not_shown(root, ask):
    assert "secret" not in "".join(ask("launch", SFT + "hub_token: hf_secret")[1:])
    options = plan.build_parser().parse_args(["launch", "run.yaml"])
    options.training_flags = []
    run = plan.read_run("run.yaml", options, root)
    command = plan.make_launch(run, options, NO_GPU, False, root).command
    assert command[command.index("--hub_token") + 1] == "hf_secret"


HOSTILE = "a; rm -rf x $(id) `id` 'q\".yaml"


def test_a_hostile_file_name_is_only_a_name_to_bash(root, capsys):
    (root / HOSTILE).write_text(SFT + "output_dir: '$(touch x); y'\nrun_name: '`id`'")
    assert plan.main(["cluster", "slurm", HOSTILE], NO_GPU, root) == 0
    script = capsys.readouterr().out
    [name] = re.findall(r"^#SBATCH --job-name=(\S+)$", script, re.MULTILINE)
    assert re.fullmatch(r"[a-z0-9-]+", name)
    [line] = re.findall(r"^CONFIG=.*$", script, re.MULTILINE)
    shown = subprocess.run(
        ["bash", "-c", f'{line}\nprintf %s "$CONFIG"'], capture_output=True, text=True, check=True
    )
    assert (shown.stdout, shown.stderr) == (HOSTILE, "")


def test_a_hostile_file_name_is_only_a_name_to_kubernetes(root, capsys):
    (root / HOSTILE).write_text(SFT)  # no output_dir: the script's default names the job
    assert plan.main(["cluster", "kubernetes", HOSTILE], NO_GPU, root) == 0
    _, job = yaml.safe_load_all(capsys.readouterr().out)
    # Kubernetes expands $(NAME), and takes $$ for $
    assert job["spec"]["trainer"]["args"][1] == HOSTILE.replace("$", "$$")


def test_max_restarts_reaches_a_launcher_on_one_process_several_and_two_machines(words_of):
    def restarts(*words, text=SFT, **options):
        command = words_of(text, *words, **options)
        script = next(i for i, word in enumerate(command) if word in plan.SCRIPTS.values())
        assert "--max_restarts" not in command[script:]
        launcher = command[:script]
        assert launcher[launcher.index("--max_restarts") + 1] == "3"
        return launcher

    assert "torch.distributed.run" in restarts(
        "--max_restarts", "3"
    )  # plain python restarts nothing
    assert "accelerate.commands.launch" in restarts(text=SFT + "max_restarts: 3", here=gpus(2))
    machines = ("--num_machines", "2", "--max_restarts", "3")
    assert "accelerate.commands.launch" in restarts(*machines, here=gpus(2))
    assert "--max_restarts" not in words_of(SFT, "--max_restarts", "0", here=gpus(2))


def test_a_launcher_restarts_a_single_process(tmp_path):
    """Its first life ends at once, its second well"""
    script = tmp_path / "script.py"
    script.write_text("import os, sys; sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')")
    run = plan.Run("run.yaml", "sft", script, {}, {}, {"max_restarts": plan.Given(1, "")})
    launch = plan.Launch(run, None, 1, 1, "single", "", False, 1, False, 1, 1, None, [], {})
    command = plan.build_command(launch, True, ROOT)
    assert subprocess.run(command, capture_output=True).returncode == 0
    run.facts.clear()
    command = plan.build_command(launch, True, ROOT)
    environment = {**os.environ, "TORCHELASTIC_RESTART_COUNT": "0"}
    assert subprocess.run(command, capture_output=True, env=environment).returncode == 1


@pytest.mark.parametrize(
    ("sent", "training", "code"),
    [
        ("SIGTERM", "trap 'echo told; exit 7' TERM", 7),
        ("SIGINT", "trap 'echo told; exit 7' INT", 7),
        ("SIGTERM", ":", 128 + 15),
    ],
)
def test_a_launch_beside_tensorboard_passes_signals_on_and_waits(sent, training, code, tmp_path):
    """A real process group, as a terminal's; the training is a shell that says what it was told"""
    program = f"""
import sys, plan_training as plan
run = plan.Run("f", "sft", plan.ROOT, {{"output_dir": sys.argv[1]}}, {{}}, {{}})
script = {f"{training}; echo up; while :; do sleep 0.1; done"!r}
launch = plan.Launch(run, None, 1, 1, "single", "", False, 1, False, 1, 1, None,
                     ["bash", "-c", script], {{}})
sys.exit(plan.start(launch, True))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, text=True, process_group=0,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    [board] = subprocess.run(
        ["pgrep", "-af", f"logdir {tmp_path}/logs"], capture_output=True, text=True
    ).stdout.splitlines()
    assert "--host localhost" in board
    os.killpg(process.pid, getattr(signal, sent))
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.split()) == (code, ["told"] * (code == 7))
    assert subprocess.run(["pgrep", "-f", f"logdir {tmp_path}/logs"]).returncode == 1


def test_a_failing_training_fails_the_launch(tmp_path):
    (tmp_path / "bad.jsonl").write_text("no json\n")
    (tmp_path / "run.yaml").write_text(
        f"task: confidence\nmodel_name: {DEMO_MODEL}\ntrain_data: {tmp_path}/bad.jsonl\n"
        f"output_dir: {tmp_path}/out\n"
    )
    result = subprocess.run(
        [sys.executable, str(ROOT / "plan_training.py"), "launch", str(tmp_path / "run.yaml")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 2
    assert "bad.jsonl:1" in result.stderr


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("gpu-info", "plan_training.py hardware"),
        ("memory-check", "plan_training.py hardware --use"),
        ("setup-accelerate", "accelerate config default"),
        ("plan", "plan_training.py plan my.yaml"),
        ("train", "plan_training.py launch my.yaml --num_processes 1"),
        ("train-distributed", "plan_training.py launch my.yaml"),
        ("train-distributed-tb", "plan_training.py launch my.yaml --tensorboard"),
        ("train-deepspeed", "plan_training.py launch my.yaml --deepspeed_config own.json"),
        (
            "train-deepspeed-tb",
            "plan_training.py launch my.yaml --deepspeed_config own.json --tensorboard",
        ),
    ],
)
def test_P1_a_make_target_runs_the_launcher(target, words):
    shown = make_would_run(target, "CONFIG=my.yaml", "DEEPSPEED_CONFIG=own.json")
    assert shown.rstrip().endswith(words)


def test_P1_deepspeed_without_a_file_is_zero2():
    shown = make_would_run("train-deepspeed")
    assert shown.rstrip().endswith("confidence_qwen7b.yaml --strategy zero2")


def test_G4_a_pipeline_is_launched_with_a_process_for_each_stage(words_of):
    text = SFT + "tuning: {mode: full}\npipeline_parallel_size: 2\nnum_processes: 2\n"
    words = words_of(
        text + "batch_size: 4\ngradient_accumulation_steps: 8\nglobal_batch_size: 32"
    )  # one replica
    assert "configs/strategies/ddp.yaml" in " ".join(words)
    assert words[words.index("--pipeline_parallel_size") + 1] == "2"
