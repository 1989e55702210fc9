"""The automatic batch size, what log() tells, the cache of encodings, the profile, memory in
validation; and that the benchmarks run."""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import weakref

import pytest
import torch
from conftest import ROOT, tagged_records, write_jsonl

import train_confidence_lora as confidence
from train_confidence_lora import (
    InputError,
    Settings,
    ValidationCallback,
    add_confidence_tokens,
    check_window,
    encode_dataset,
    flops_per_token,
    initialize_model_with_tokens,
    load_tokenizer,
    main,
    plan_batches,
    read_records,
    split_update,
)

QUICK = "--max_steps 2 --logging_steps 1 --eval_strategy no --eval_on_start False".split()


@pytest.fixture
def line(train_file, tiny_models, tmp_path):
    return ["--model_name", tiny_models["untied"], "--train_data", train_file, "--output_dir",
            str(tmp_path / "run"), *QUICK]  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "asked", "expected"),
    [
        (16, "auto", 4, None, (16, 2)),  # 128 records, on however many processes
        (16, "auto", 1, None, (16, 8)),
        (64, "auto", 4, None, (64, 1)),  # a batch above the target is not refused
        (8, 3, 2, None, (8, 3)),
        (8, "auto", 2, 64, (8, 4)),
        ("auto", "auto", 4, None, (32, 1)),
        ("auto", "auto", 2, 48, (24, 1)),
    ],
)
def test_what_is_auto_makes_the_global_batch(batch, accumulation, processes, asked, expected):
    assert split_update(batch, accumulation, processes, asked) == expected


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "asked", "message"),
    [
        (16, 2, 4, 64, "64 is not 16 records at a time x 2 accumulation x 4 processes = 128"),
        ("auto", "auto", 3, 128, "128 is not 42 records at a time"),
        ("auto", 2, 1, None, "give --global_batch_size in its place"),
    ],
)
def test_a_global_batch_that_cannot_be_is_refused(batch, accumulation, processes, asked, message):
    with pytest.raises(InputError, match=message):
        split_update(batch, accumulation, processes, asked)


def test_auto_takes_all_that_fits_and_trains_on_the_same_records_as_a_batch_given(line, tmp_path):
    auto = main([*line, "--batch_size", "auto", "--global_batch_size", "16"])
    assert auto["per_device_train_batch_size"] == 16
    assert auto["gradient_accumulation_steps"] == 1
    line[line.index("--output_dir") + 1] = str(tmp_path / "given")
    given = main([*line, "--batch_size", "4", "--gradient_accumulation_steps", "4"])
    assert auto["train_loss"] == pytest.approx(given["train_loss"], abs=1e-5)
    assert auto["train_tokens"] == given["train_tokens"]


class Memory:
    """Stands for a device: a batch takes what its size says, and more than there is, an error."""

    def __init__(self, monkeypatch, limit, record=100, checkpointed=10):
        self.limit, self.record, self.checkpointed = limit, record, checkpointed
        self.tried, self.taken, whole = [], 0, confidence.label_loss

        def label_loss(model, batch, ids):
            recompute = getattr(model.get_base_model(), "is_gradient_checkpointing", False)
            count = len(batch["input_ids"])
            self.taken = count * (self.checkpointed if recompute else self.record)
            self.tried.append((count, recompute))
            if self.taken > self.limit:
                raise torch.OutOfMemoryError
            return whole(model, batch, ids)

        monkeypatch.setattr(confidence, "label_loss", label_loss)
        monkeypatch.setattr(confidence, "peak_memory", lambda reset=False: self.taken)
        # what Adam needs is taken off the limit: 12 bytes for each trainable parameter
        monkeypatch.setattr(confidence, "memory_limit", lambda: limit + 12 * self.trainable)
        self.trainable = 0


@pytest.fixture
def encodings_of(tiny_models, train_file):
    def make(model_name):
        tokenizer = load_tokenizer(model_name)
        add_confidence_tokens(tokenizer)
        settings = Settings(train_data=train_file)
        return encode_dataset(tokenizer, read_records(train_file), settings), settings

    return make


def fit(monkeypatch, encodings, settings, tiny_models, memory, share):
    settings.model_name, settings.global_batch_size = tiny_models["untied"], share
    folder = tempfile.mkdtemp()
    training = confidence.parse_command_line(["--batch_size", "auto", "--output_dir", folder])[1]
    run = confidence.open_run(settings, training)
    model, tokenizer = initialize_model_with_tokens(settings.model_name)
    recipe = confidence.confidence_recipe(settings, tokenizer, run.dtype)
    memory.trainable = model.get_nb_trainable_parameters()[0]
    memory.tried.clear()
    return confidence.initialize_fitting_model(recipe, settings, run, encodings), run.args


@pytest.mark.parametrize(("limit", "size"), [(10_000, 24), (1_250, 12), (350, 3), (100, 1)])
def test_the_largest_divisor_that_fits_is_chosen(
    limit, size, encodings_of, tiny_models, monkeypatch
):
    memory = Memory(monkeypatch, limit)
    encodings, settings = encodings_of(tiny_models["untied"])
    _, args = fit(monkeypatch, encodings, settings, tiny_models, memory, 24)
    assert args.per_device_train_batch_size == size
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 24
    assert not args.gradient_checkpointing
    assert max(count for count, _ in memory.tried) <= max(2, size)  # nothing larger is tried


def test_gradient_checkpointing_is_chosen_only_when_nothing_else_fits(
    encodings_of, tiny_models, monkeypatch, capsys
):
    memory = Memory(monkeypatch, 50)
    encodings, settings = encodings_of(tiny_models["untied"])
    _, args = fit(monkeypatch, encodings, settings, tiny_models, memory, 24)
    assert (args.per_device_train_batch_size, args.gradient_checkpointing) == (4, True)
    assert "gradient checkpointing because nothing fits without" in capsys.readouterr().out


def test_eight_bits_are_chosen_when_checkpointing_is_not_enough_and_then_it_gives_up(
    encodings_of, tiny_models, monkeypatch, capsys
):
    memory = Memory(monkeypatch, 50, checkpointed=100)
    encodings, settings = encodings_of(tiny_models["untied"])
    with pytest.raises(InputError, match=r"not even one record of .* tokens fits into memory"):
        fit(monkeypatch, encodings, settings, tiny_models, memory, 8)
    assert memory.tried == [(1, False), (1, True)] * 3  # whole, 8-bit and 4-bit weights


def test_encodings_are_read_from_the_cache_unless_what_decides_them_changed(
    encodings_of, tiny_models, train_file, monkeypatch
):
    first, settings = encodings_of(tiny_models["untied"])
    tokenizer = load_tokenizer(tiny_models["untied"])
    add_confidence_tokens(tokenizer)
    records = read_records(train_file)
    calls, whole = [], confidence.encode_records

    def counted(*args, **options):
        calls.append(options)
        return whole(*args, **options)

    monkeypatch.setattr(confidence, "encode_records", counted)
    again = encode_dataset(tokenizer, records, settings)
    assert again[:] == first[:]
    assert not calls
    encode_dataset(tokenizer, records[1:], settings)
    settings.adapter = "activated"
    changed = encode_dataset(tokenizer, records, settings)
    assert len(calls) == 2
    assert changed[:] != first[:]


def test_skipped_records_are_named_in_every_run_cached_or_not(tiny_models, tmp_path, capsys):
    rows = tagged_records(8)
    rows[4]["question"] = "are there figs " * 200
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    tokenizer = load_tokenizer(tiny_models["untied"])
    add_confidence_tokens(tokenizer)
    for _ in range(2):
        encodings = encode_dataset(
            tokenizer, read_records(path), Settings(train_data=path, max_seq_length=256)
        )
        assert len(encodings) == 7
        assert "skipped 1 of 8" in (said := capsys.readouterr().out)
        assert "line 5: too long by" in said


def test_tokens_memory_and_mfu_are_logged_and_validation_is_not_counted(
    line, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(confidence, "gpu_peak_flops", lambda: 1e12)

    def slow(self, model, name):
        import time

        time.sleep(3)
        return {"accuracy": None, "calibration_error": None}, []

    monkeypatch.setattr(ValidationCallback, "_validate_dataset", slow)
    monkeypatch.setattr(ValidationCallback, "_keep", lambda *_: {})
    monkeypatch.setattr(ValidationCallback, "_table", lambda *_: "")
    monkeypatch.setattr(ValidationCallback, "means", ())
    monkeypatch.setattr(confidence, "finish", lambda *_: {})
    arguments = [*line[:-4], "--eval_steps", "2", "--batch_size", "8"]
    main([*arguments, "--gradient_accumulation_steps", "1", "--max_steps", "4"])
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    lines = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(lines) == 4
    speeds = [entry["tokens_per_second"] for entry in lines]
    assert min(speeds[1:]) > 200  # eight records of some 60 tokens; with the pauses, below 160
    model, _ = initialize_model_with_tokens(line[1])
    ratio = lines[-1]["mfu"] / lines[-1]["tokens_per_second"]
    assert ratio == pytest.approx(flops_per_token(model, False) / 1e12)
    assert lines[-1]["peak_memory_gb"] > 0.1
    said = capsys.readouterr().out
    assert "tokens/s a process  MFU" in said
    assert " GB  0 s left" in said


@pytest.mark.parametrize(
    ("adapter", "recompute", "factor"),
    [("lora", False, 4), ("lora", True, 6), ("activated", False, 2)],
)
def test_flops_are_counted_by_the_rule(adapter, recompute, factor, tiny_models):
    """Two layers of q, k, v, o (64 x 64 and 64 x 32) and an MLP of 64 x 128."""
    model, _ = initialize_model_with_tokens(tiny_models["untied"], adapter)
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert flops_per_token(model, recompute) == factor * weights


@pytest.mark.parametrize(("length", "refused"), [(128, False), (256, True)])
def test_layers_with_a_window_shorter_than_a_sequence_are_refused(length, refused, tiny_models):
    model, _ = initialize_model_with_tokens(tiny_models["untied"], "activated")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 128
    if refused:
        with pytest.raises(InputError, match="give --max_seq_length 128 or less"):
            check_window(model, length)
    else:
        check_window(model, length)


def test_a_model_let_go_is_freed_at_once(tiny_models):
    """The next, smaller one must not be measured beside it."""
    model, _ = initialize_model_with_tokens(tiny_models["untied"])
    mlps = [
        weakref.ref(m.get_base_layer().weight)
        for name, m in model.named_modules()
        if name.endswith(("gate_proj", "down_proj"))
    ]
    del model
    gc.collect()
    assert len(mlps) == 4
    assert all(mlp() is None for mlp in mlps)


def test_a_profile_is_recorded(line, tmp_path):
    main([*line, "--profile", "--max_steps", "6", "--batch_size", "8"])
    (trace,) = (tmp_path / "run" / "logs").glob("*.pt.trace.json")
    importlib.import_module("torch_tb_profiler.plugin")  # TensorBoard's; breaks an import circle
    from torch_tb_profiler.profiler.data import RunProfileData

    profile = RunProfileData.parse("worker", 0, str(trace), str(tmp_path / "cache"))
    profile.process()
    assert list(profile.steps_names) == ["2", "3", "4"]


def test_a_terminal_shows_a_progress_bar_instead_of_lines(line):
    """A real pseudo-terminal of 150 columns."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
        os.execv(sys.executable, [sys.executable, str(ROOT / "train_confidence_lora.py"), *line])
    shown = b""
    with contextlib.suppress(OSError):  # how a closed pseudo-terminal ends
        while part := os.read(terminal, 4096):
            shown += part
    assert os.waitpid(pid, 0)[1] == 0
    last = shown.decode().replace("\r", "\n").split("| 2/2 [")[-1].split("\n")[0]
    assert re.search(r"loss \d.* lr .* tokens/s a process .* peak \d+\.\d GB", last)
    assert "step 2/2" not in shown.decode()


def test_validation_that_runs_out_of_memory_goes_on_in_smaller_parts(
    train_file, tiny_models, tmp_path, monkeypatch
):
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"])
    records = read_records(train_file)
    callback = ValidationCallback(
        {"demo": records}, tokenizer, Settings(max_new_tokens=4), tmp_path, True, 32
    )
    _, whole = callback._validate_dataset(model.eval(), "demo")
    sizes, score = [], confidence.score_batch

    def small(model, tokenizer, records, *rest):
        sizes.append(len(records))
        if len(records) > 8:
            raise torch.OutOfMemoryError
        return score(model, tokenizer, records, *rest)

    monkeypatch.setattr(confidence, "score_batch", small)
    _, parts = callback._validate_dataset(model, "demo")
    assert sizes == [32, 16, *[8] * 8]  # what did not fit is not tried again
    assert [s.response for s in parts] == [s.response for s in whole]
    assert [s.confidence for s in parts] == pytest.approx([s.confidence for s in whole], abs=1e-5)


def test_batches_of_recorded_answers_hold_no_more_than_a_total_length():
    batches = plan_batches([5, 9, 2, 2, 8, 2], 10, most=18)
    assert batches == [[1, 4], [0, 2, 3], [5]]
    assert plan_batches([50], 10, most=18) == [[0]]  # a single long one is a batch all the same


def test_liger_without_a_gpu_is_refused_in_one_sentence(line, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([*line, "--use_liger_kernel", "True"])
    assert exit_info.value.code == 2
    assert "--use_liger_kernel needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("train_speed.py", "--model tiny --records 24 --steps 3 --rounds 1 --contenders recipe "
         "lora --same_order", "largest difference of loss, recipe and lora:"),
        ("validation_speed.py", "--model tiny --records 6 --sequential_records 2 "
         "--max_new_tokens 8", "2 of 2 answers are the same"),
    ],
)  # fmt: skip
def test_the_benchmarks_run(script, arguments, expected):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments.split()],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected in done.stdout
    if script == "train_speed.py":
        assert float(done.stdout.split()[-1]) < 1e-4
