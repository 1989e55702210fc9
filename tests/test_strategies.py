"""Every strategy of configs/strategies through the real scripts and `accelerate launch`, in two
gloo processes (rows P6, P7, G3, G4, G5). A strategy that fell back to another is a failed test, so
each run is observed from inside: world size, wrapper, numbers that a rank holds. And whatever
splits the work, losses, evaluation and weights must be those of one process."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, tagged_records, write_jsonl
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from test_language_model import make_chats
from test_run import without_runtime
from transformers import AutoModelForCausalLM, AutoTokenizer

from train_language_model import encode_chats, parse_chat

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
STRATEGIES = ["ddp", "zero2", "zero3", "zero3_offload", "fsdp2", "tp", "two_machines"]
SPLITTING = ["zero3", "fsdp2", "tp"]
ROWS = 8  # of a global batch
SECONDS = 280  # for the runs of a launch
pytestmark = pytest.mark.timeout(900)  # a test may wait for what another worker launches
TUNINGS = [(strategy, tuning) for strategy in STRATEGIES for tuning in ("full", "lora")]
TUNINGS.remove(("two_machines", "lora"))


def needs(strategy):
    if strategy.startswith(("zero", "json")) and not DEEPSPEED:
        pytest.skip("needs deepspeed, which `make test` installs")


def each(*strategies):
    return pytest.mark.parametrize("strategy", strategies)


# ------------------------------------------------------------------------------------------------
# The runs. What a strategy does is one launch, made once for all tests and workers


def language(data, folder, processes, out, *more, accumulation=1, script="train_language_model.py"):
    """A run of three steps on chats. The learning rate is high and Adam's epsilon large, so that
    weights move visibly and not by the sign of a gradient that is nearly zero."""
    flags = {
        "model_name": data / "base", "train_data": data / "chats.jsonl",
        "val_data": data / "val.jsonl", "evaluation": "generate", "max_new_tokens": 12,
        "output_dir": folder / out, "max_steps": 3, "save_steps": 2, "eval_steps": 3,
        "logging_steps": 1, "batch_size": ROWS // processes // accumulation,
        "gradient_accumulation_steps": accumulation, "learning_rate": 1e-2,
        "adam_epsilon": 1e-3, "max_grad_norm": 0.5, "lora_dropout": 0, "bf16": False,
    }  # fmt: skip
    return [script, *(str(w) for k, v in flags.items() for w in (f"--{k}", v)), *more]


def confidence(data, folder, processes, out, *more):
    """A confidence run of two steps."""
    flags = {
        "model_name": data / "untrained", "train_data": data / "tagged.jsonl",
        "val_data": f"demo={data / 'tagged_val.jsonl'}", "validation_answers": "recorded",
        "output_dir": folder / out, "max_steps": 2, "logging_steps": 1,
        "batch_size": ROWS // processes, "learning_rate": 1e-3, "lora_dropout": 0, "bf16": False,
    }  # fmt: skip
    argv = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    return ["train_confidence_lora.py", *argv, *more]


def runs_of(strategy, data, folder):
    """[(name, command line, step to die at)] of a strategy's launch."""
    processes = {"single": 1, "tp": 1}.get(strategy, 2)  # that a batch is split over

    def run(name, *more, out=None, die_at=None, **options):
        return name, language(data, folder, processes, out or name, *more, **options), die_at

    full = ("--tuning", "full")
    runs = [run("full", *full, accumulation=2), run("lora")]
    if strategy in ("json", "two_machines"):
        return runs[:1]
    if strategy in ("ddp", "zero2", "zero3", "fsdp2", "tp"):
        runs.append(run("cut", *full, die_at=2, accumulation=2))
        runs.append(run("resumed", *full, out="cut", accumulation=2))
    if strategy in ("single", "zero2"):
        runs.append(run("bf16", *full, "--bf16", "true"))
    if strategy in ("single", "ddp"):
        runs.append(run("recompute", "--gradient_checkpointing"))
    if strategy in ("single", "ddp", "zero2"):
        for adapter in ("lora", "activated"):
            name = f"confidence_{adapter}"
            argv = confidence(data, folder, processes, name, "--adapter", adapter)
            runs.append((name, argv, None))
    if strategy in SPLITTING:
        runs.append(run("qlora", "--tuning", "qlora"))
        runs.append(("confidence", confidence(data, folder, processes, "confidence"), None))
    if strategy in (*SPLITTING, "zero2"):
        auto = ("--batch_size", "auto", "--gradient_accumulation_steps", "auto")
        runs.append(run("auto", *auto))
    if strategy == "tp":
        runs.append(run("scratch", "--tuning", "scratch"))
    return runs


def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def launch(*words, **environment):
    """Starts `accelerate launch` with these words."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_LOG_LEVEL": "error", **environment}
    return subprocess.Popen(
        command, env={**os.environ, **own}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(*launchers):
    """Their exit codes and what they said. One that hangs is asked to end its processes."""
    try:
        said = [launcher.communicate(timeout=SECONDS)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                launcher.send_signal(signal.SIGTERM)
    return [launcher.returncode for launcher in launchers], "\n".join(said)


def launch_runs(strategy, data, folder):
    runs = [
        {"name": name, "argv": argv, "die_at": die_at, "port": free_port()}
        for name, argv, die_at in runs_of(strategy, data, folder)
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    end = [ROOT / "tests" / "strategy_runs.py", folder]
    file = ["--config_file", ROOT / "configs" / "strategies" / f"{strategy}.yaml"]
    processes = ["--num_processes", 1 if strategy == "single" else 2]
    if strategy == "json":
        own = {
            "zero_optimization": {"stage": 2},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
        }
        (folder / "own.json").write_text(json.dumps(own))
        file = ["--use_deepspeed", "--deepspeed_config_file", folder / "own.json"]
    if strategy == "two_machines":
        port = free_port()
        launchers = [
            launch(*file, *processes, "--machine_rank", rank, "--main_process_port", port, *end)
            for rank in (0, 1)
        ]
    else:
        launchers = [launch(*file, *processes, "--main_process_port", 0, *end)]
    codes, said = wait_for(*launchers)
    (folder / "launch.log").write_text(said)
    assert not any(codes), said


def make_data(folder):
    """Chats, tagged records, and a model that answers half-way right, so that there is a ROUGE."""
    write_jsonl(folder / "chats.jsonl", make_chats(30))
    write_jsonl(folder / "val.jsonl", make_chats(3))  # an odd number: shares are uneven
    write_jsonl(folder / "tagged.jsonl", tagged_records(40))
    write_jsonl(folder / "tagged_val.jsonl", tagged_records(9, seed=9))
    make_model(folder / "untrained")
    model = AutoModelForCausalLM.from_pretrained(folder / "untrained")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = encodings_of(folder / "chats.jsonl", folder / "untrained")
    for step in range(40):
        loss = sum(loss_of(model, row)[0] for row in rows[step % 10 :: 10]) / 100
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(folder / "untrained").save_pretrained(folder / "base")


def encodings_of(file, model):
    lines = file.read_text().splitlines()
    chats = [{**parse_chat(line), "line": i} for i, line in enumerate(lines)]
    return list(encode_chats(AutoTokenizer.from_pretrained(model), chats, 512))


def loss_of(model, row):
    """Transformers' own logits, cross-entropy summed over a chat's labels; how many these are."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"][1:])
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


class Run:
    """What is left of one run."""

    def __init__(self, folder, name):
        ranks = sorted(folder.glob(f"{name}.*.rc"))
        files = [path.with_suffix("") for path in ranks]
        self.codes = [int(path.read_text()) for path in ranks]
        self.logs = [Path(f"{path}.log").read_text() for path in files]
        seen = [Path(f"{path}.json") for path in files]
        self.ranks = [json.loads(path.read_text()) for path in seen if path.exists()]
        self.folder = folder / {"resumed": "cut"}.get(name, name)

    @property
    def done(self):
        assert self.codes, f"{self.folder.name} was never run: {self.folder.parent}/launch.log"
        assert not any(self.codes), "\n".join(self.logs)
        return self

    @property
    def summary(self):
        return json.loads((self.done.folder / "summary.json").read_text())

    @property
    def logged(self):
        """The loss of each step, as logged."""
        files = self.done.folder.glob("checkpoint-*/trainer_state.json")
        states = [json.loads(path.read_text()) for path in files]
        last = max(states, key=lambda state: state["global_step"])
        return [line["loss"] for line in last["log_history"] if "loss" in line]

    @property
    def weights(self):
        return {k: v for f in (self.folder / "final").glob("*.safetensors") for k, v in
                load_file(f).items()}  # fmt: skip


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """(function, folder name) -> folder that the function filled once, for all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "strategies"
    base.mkdir(exist_ok=True)

    def make(name, fill):
        folder = base / name
        with FileLock(base / f"{name}.lock"):
            if not folder.exists():
                folder.mkdir()
                fill(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def data(shared):
    return shared("data", make_data)


@pytest.fixture(scope="session")
def find(shared, data):
    """(strategy, name) -> the Run."""

    def find(strategy, name):
        needs(strategy)
        return Run(shared(strategy, lambda folder: launch_runs(strategy, data, folder)), name)

    return find


# ------------------------------------------------------------------------------------------------
# What the work was split by


@each(*STRATEGIES, "json")
def test_G3_G4_P6_the_work_is_split_as_asked_and_nothing_falls_back(strategy, find):
    kind, wrapper = {
        "ddp": ("MULTI_CPU", "DistributedDataParallel"),
        "two_machines": ("MULTI_CPU", "DistributedDataParallel"),
        "fsdp2": ("FSDP", "FSDPModule"),
        "tp": ("MULTI_CPU", "Qwen2ForCausalLM"),
    }.get(strategy, ("DEEPSPEED", "DeepSpeedEngine"))
    whole = find("single", "full").ranks[0]["held"]
    ranks = find(strategy, "full").done.ranks
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["world_size"] == 2
        assert rank["distributed_type"] == kind
        assert wrapper in rank["wrappers"]
        if strategy != "tp":
            assert rank["whole"] == whole
    held, moments = (sum(rank[name] for rank in ranks) for name in ("held", "moments"))
    if strategy in ("ddp", "two_machines"):
        assert held == moments == 2 * whole
    elif strategy in ("zero2", "json"):
        assert held == 2 * whole
        assert moments == whole
    elif strategy == "tp":  # embeddings and norms stay whole
        assert ranks[0]["split"] > 0
        assert whole < held < 1.8 * whole
        assert moments == held
    else:
        assert held == moments == whole
        assert max(rank["held"] for rank in ranks) < 0.6 * whole


# ------------------------------------------------------------------------------------------------
# The same as one process


@pytest.mark.parametrize(("strategy", "tuning"), [*TUNINGS, ("json", "full")])
def test_G4_P6_P7_losses_evaluation_and_weights_are_those_of_one_process(strategy, tuning, find):
    one, run = find("single", tuning), find(strategy, tuning)
    ours, expected = run.summary, one.summary
    assert ours["num_processes"] == 2
    assert ours["global_batch_size"] == expected["global_batch_size"] == ROWS
    assert ours["train_tokens"] == expected["train_tokens"]
    assert ours["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
    assert run.logged == pytest.approx(one.logged, abs=1e-4)
    for when in ("validation_before_training", "validation"):
        figures, others = ours[when]["chats"], expected[when]["chats"]
        assert figures["loss"] == pytest.approx(others["loss"], abs=1e-4)
        assert figures["rougeL"] == pytest.approx(others["rougeL"], abs=1e-4)
    assert 0 < expected["validation"]["chats"]["rougeL"] < 1
    before = expected["validation_before_training"]["chats"]["loss"]
    assert abs(expected["validation"]["chats"]["loss"] - before) > 1e-3  # it learned something
    assert run.weights.keys() == one.weights.keys()
    for name, tensor in one.weights.items():
        assert (run.weights[name] - tensor).abs().max() < 1e-3, name


@pytest.mark.parametrize(("strategy", "tuning"), [("single", "full"), ("single", "lora"), *TUNINGS])
def test_G4_P6_what_was_saved_reloads_in_one_process(strategy, tuning, find, data):
    run = find(strategy, tuning)
    final = run.done.folder / "final"
    model = AutoModelForCausalLM.from_pretrained(final if tuning == "full" else data / "base")
    if tuning == "lora":
        model = PeftModel.from_pretrained(model, final)
    model.eval()
    with torch.no_grad():
        sums = [loss_of(model, row) for row in encodings_of(data / "val.jsonl", final)]
    loss = sum(loss.item() for loss, _ in sums) / sum(labels for _, labels in sums)
    assert loss == pytest.approx(run.summary["validation"]["chats"]["loss"], abs=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "activated"])
@each("ddp", "zero2")
def test_P6_a_confidence_run_is_that_of_one_process(strategy, adapter, find):
    one, run = (find(each, f"confidence_{adapter}") for each in ("single", strategy))
    ours, expected = run.summary, one.summary
    assert ours["num_processes"] == 2
    assert ours["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
    assert run.logged == pytest.approx(one.logged, abs=1e-4)
    for when in ("validation_before_training", "validation"):
        figures, others = without_runtime(ours[when]), without_runtime(expected[when])
        assert figures.keys() == others.keys()
        for name, figure in others.items():
            assert figures[name] == pytest.approx(figure, abs=1e-4), (when, name)
    for name, tensor in one.weights.items():
        assert (run.weights[name] - tensor).abs().max() < 2e-3, name
    wrapper, times = {"ddp": ("DistributedDataParallel", 2), "zero2": ("DeepSpeedEngine", 1)}[
        strategy
    ]
    assert [rank["world_size"] for rank in run.ranks] == [2, 2]
    assert all(wrapper in rank["wrappers"] for rank in run.ranks)
    assert sum(rank["moments"] for rank in run.ranks) == times * one.ranks[0]["moments"]


@each("ddp", "zero2", "zero3", "fsdp2")
def test_G4_P6_a_run_that_died_goes_on_and_ends_the_same(strategy, find):
    assert {step for step, _ in find(strategy, "cut").done.ranks[0]["losses"]} == {0, 1}
    whole, resumed = find(strategy, "full"), find(strategy, "resumed")
    assert "resuming from" in resumed.done.logs[0]
    assert [step for step, _ in resumed.ranks[0]["losses"]] == [2, 2]
    for rank, other in zip(resumed.ranks, whole.ranks, strict=True):
        last = [loss for step, loss in other["losses"] if step == 2]
        assert [loss for _, loss in rank["losses"]] == pytest.approx(last, abs=1e-4)
    assert resumed.weights.keys() == whole.weights.keys()
    for name, tensor in whole.weights.items():
        assert (resumed.weights[name] - tensor).abs().max() < 1e-4, name


def test_G4_gradient_checkpointing_under_ddp_changes_nothing(find):
    one, run, plain = find("single", "recompute"), find("ddp", "recompute"), find("ddp", "lora")
    assert all(rank["checkpointing"] for rank in run.done.ranks)
    assert not any(rank["checkpointing"] for rank in plain.ranks)
    assert run.logged == pytest.approx(one.logged, abs=1e-4)
    assert run.logged == pytest.approx(plain.logged, abs=1e-4)


def test_P6_bf16_under_zero2(find):
    one, run = find("single", "bf16"), find("zero2", "bf16")
    assert all(rank["autocast"] == "bf16" for rank in run.done.ranks)
    assert run.logged == pytest.approx(one.logged, abs=0.05)


# ------------------------------------------------------------------------------------------------
# Logging


@each("ddp", "zero2", "zero3", "fsdp2", "two_machines")
def test_G5_the_logged_loss_is_the_mean_over_all_ranks(strategy, find):
    """Each rank's own differs from it, and the run of one process has it."""
    run = find(strategy, "full")
    steps = [
        [sum(loss for at, loss in rank["losses"] if at == step) for step in range(3)]
        for rank in run.done.ranks
    ]
    for logged, *parts in zip(run.logged, *steps):
        assert abs(parts[0] - parts[1]) > 1e-3
        assert logged == pytest.approx(sum(parts) / 2, abs=1e-4)


@each(*STRATEGIES)
def test_G5_only_the_main_process_tells_of_steps(strategy, find):
    first, second = find(strategy, "full").done.logs
    assert len(re.findall(r"^step \d+/3  loss", first, re.MULTILINE)) == 3
    assert "Distributed training with 2 processes" in first
    for words in ("step 1/3", "Distributed training", "validation at step"):
        assert words not in second


# ------------------------------------------------------------------------------------------------
# What cannot be done is refused, in one sentence of one process


REFUSALS = {
    "qlora": "--tuning qlora and STRATEGY exclude each other",
    "confidence": "a confidence run reads tags' rows and caches of a whole model, which STRATEGY",
    "auto": "--batch_size auto measures a model that one process holds, and this launch splits it",
}


def assert_refused(run, words):
    assert run.codes == [2, 2], "\n".join(run.logs)
    said = "\n".join(run.logs)
    assert len(re.findall(r"^train_\w+\.py: error: ", said, re.MULTILINE)) == 1
    assert words in said
    assert "Traceback" not in said
    assert not run.ranks


@pytest.mark.parametrize("name", REFUSALS)
@each(*SPLITTING)
def test_G4_what_a_strategy_cannot_split_is_refused(strategy, name, find):
    assert_refused(find(strategy, name), REFUSALS[name].replace("STRATEGY", strategy))


def test_P6_an_automatic_batch_size_is_refused_under_zero2(find):
    assert_refused(find("zero2", "auto"), REFUSALS["auto"])


def test_G4_tensor_parallel_neither_builds_from_scratch_nor_goes_on(find):
    assert_refused(find("tp", "scratch"), "--tuning scratch cannot be built in parts")
    assert find("tp", "cut").done.ranks
    assert_refused(find("tp", "resumed"), "a tensor parallel run cannot go on from a checkpoint")


def test_G4_fsdp_that_accelerate_would_make_ddp_is_refused(data, tmp_path):
    """The script itself, without what strategy_runs.py lifts."""
    file = ROOT / "configs" / "strategies" / "fsdp2.yaml"
    script, *flags = language(data, tmp_path, 2, "run")
    words = ["--config_file", file, "--num_processes", 2, "--main_process_port", 0]
    [code], said = wait_for(launch(*words, ROOT / script, *flags))
    assert code != 0
    assert said.count("train_language_model.py: error: the launch asked for FSDP and") == 1
