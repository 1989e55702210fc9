import json

import pytest
import torch
from conftest import tagged_records
from datasets import Dataset

from train_confidence_lora import (
    HELD_WEIGHT,
    LabelTrainer,
    LengthGroupedSampler,
    Settings,
    TrainingArguments,
    confidence_recipe,
    encode_records,
    initialize_model_with_tokens,
    parse_record,
    score_batch,
    set_seed,
)


def make_trainer(model_name, folder, adapter="lora", **arguments):
    """A trainer on 32 records without dropout, one process."""
    set_seed(0)
    model, tokenizer = initialize_model_with_tokens(model_name, adapter, lora_dropout=0.0)
    records = [parse_record(json.dumps(record)) for record in tagged_records(32)]
    arguments = {
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        **arguments,
    }
    return LabelTrainer(
        confidence_recipe(Settings(adapter=adapter), tokenizer, torch.float32),
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), use_cpu=True, remove_unused_columns=False,
            disable_tqdm=True, save_strategy="no", logging_steps=1, **arguments,
        ),
        train_dataset=Dataset.from_list(
            list(encode_records(tokenizer, records, adapter, max_tokens=256))
        ),
        processing_class=tokenizer,
    )  # fmt: skip


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("adapter", ["lora", "activated"])
def test_the_loss_equals_cross_entropy_over_all_logits_of_plain_passes(
    adapter, tiny_models, tmp_path
):
    """Against PEFT's own forward, one record at a time, unpadded, logits everywhere."""
    trainer = make_trainer(tiny_models["untied"], tmp_path, adapter)
    rows = [trainer.train_dataset[i] for i in range(8)]
    model = trainer.model
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        weight = torch.full_like(each, HELD_WEIGHT)
        weight[-2:] = 1.0  # marker and tag
        total = total + (each * weight)[labels != -100].sum()
        count += int((labels != -100).sum())
    (total / count).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    assert loss.item() == pytest.approx((total / count).item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3)
    assert sum(g.norm() > 0 for g in expected.values()) > 10


@pytest.mark.parametrize("adapter", ["lora", "activated"])
def test_accumulation_does_not_change_the_steps(adapter, tiny_models, tmp_path):
    whole = make_trainer(tiny_models["untied"], tmp_path, adapter, per_device_train_batch_size=8)
    parts = make_trainer(
        tiny_models["untied"], tmp_path, adapter,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.parametrize("kind", ["untied", "tied", "spare", "mistral"])
@pytest.mark.parametrize("adapter", ["lora", "activated"])
def test_confidence_is_learned(adapter, kind, tiny_models, tmp_path):
    """Even on a random model: the rule is one word in the question."""
    trainer = make_trainer(
        tiny_models[kind], tmp_path, adapter,
        max_steps=120, learning_rate=5e-3, per_device_train_batch_size=32,
    )  # fmt: skip
    trainer.train()
    records = [parse_record(json.dumps(record)) for record in tagged_records(32)]
    scored = score_batch(trainer.model.eval(), trainer.processing_class, records, None)
    right = [(p > 0.5) == record["confident"] for record, (p, _, _) in zip(records, scored)]
    assert sum(right) >= 31


def test_real_tokens_are_counted_without_padding(tiny_models, tmp_path):
    trainer = make_trainer(
        tiny_models["untied"], tmp_path, num_train_epochs=1, max_steps=-1,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    real = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert int(trainer.totals[0]) == real


def test_batches_are_of_like_length_and_the_same_on_every_process():
    lengths = [10 + (i * 37) % 500 for i in range(5000)]
    sampler = LengthGroupedSampler(lengths, 16, seed=1)
    order = list(sampler)
    torch.manual_seed(99)  # the global generator differs between processes
    assert list(sampler) == order
    assert sorted(order) == list(range(5000))
    padded = sum(
        max(lengths[i] for i in order[k : k + 16]) * len(order[k : k + 16])
        for k in range(0, 5000, 16)
    )
    assert sum(lengths) / padded > 0.95
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_a_checkpoint_holds_no_pickle_of_ours_and_no_whole_embedding(tiny_models, tmp_path):
    trainer = make_trainer(tiny_models["mistral"], tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "training_args.bin" not in names
    size = (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size
    lora = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n) * 4
    assert size < lora + 20_000
