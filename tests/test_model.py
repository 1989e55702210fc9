import os

import pytest
import torch
from conftest import tagged_records
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from train_confidence_lora import (
    Collator,
    InputError,
    confidence_ids,
    confidence_segments,
    encode_segments,
    initialize_model_with_tokens,
    load_base_model,
    parse_record,
    save_adapter,
)

KINDS = ["untied", "tied", "spare", "mistral"]


def batch_of(tokenizer, count=32, adapter="lora"):
    import json

    records = [parse_record(json.dumps(record)) for record in tagged_records(count)]
    rows = [
        encode_segments(tokenizer, [confidence_segments(tokenizer, r, adapter)])[0] for r in records
    ]
    return Collator(tokenizer.pad_token_id)(rows)


def train_steps(model, batch, steps=30, rate=1e-2):
    """Losses of a few steps of plain training on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        logits = model(
            input_ids=batch["input_ids"][:, :-1], attention_mask=batch["attention_mask"][:, :-1]
        ).logits
        labels = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_grows_only_when_there_is_no_room(kind, tiny_models):
    before = AutoModelForCausalLM.from_pretrained(tiny_models[kind]).get_input_embeddings()
    model, tokenizer = initialize_model_with_tokens(tiny_models[kind])
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == (before.num_embeddings if kind == "spare" else len(tokenizer))
    assert max(confidence_ids(tokenizer).all) == len(tokenizer) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_distinct_deterministic_and_near_the_mean(kind, tiny_models):
    model, tokenizer = initialize_model_with_tokens(tiny_models[kind])
    again, _ = initialize_model_with_tokens(tiny_models[kind])
    ids = confidence_ids(tokenizer).all
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(model.base_model.model, get)().weight
        rows, mean = weight[ids], weight[: min(ids)].mean(dim=0)
        assert torch.equal(rows, getattr(again.base_model.model, get)().weight[ids])
        assert len(torch.unique(rows, dim=0)) == len(ids)
        assert (rows - mean).norm(dim=1).max() < 0.5 * (weight[: min(ids)] - mean).norm(
            dim=1
        ).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_tag_rows_train_in_embedding_and_head_and_nothing_else_of_them_does(kind, tiny_models):
    model, tokenizer = initialize_model_with_tokens(tiny_models[kind], lora_dropout=0.0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    rows = {name for name in trainable if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if kind == "tied" else 2)
    assert all("lora_" in name for name in trainable - rows)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_steps(model, batch_of(tokenizer), steps=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable


@pytest.mark.parametrize("adapter", ["lora", "activated"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_reloads_in_plain_peft_and_merges(kind, adapter, tiny_models, tmp_path):
    """The recipe of the model card: tokenizer of the adapter, resize if longer, from_pretrained."""
    model, tokenizer = initialize_model_with_tokens(tiny_models[kind], adapter, lora_dropout=0.0)
    batch = batch_of(tokenizer, 8)
    train_steps(model, batch, steps=5)
    inputs = {key: batch[key][:, :-1] for key in ("input_ids", "attention_mask")}
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
    save_adapter(model, tokenizer, tmp_path / "final")

    reloaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert confidence_ids(reloaded_tokenizer) == confidence_ids(tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tiny_models[kind])
    if len(reloaded_tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(reloaded_tokenizer), mean_resizing=False)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "final").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, expected)
    if adapter == "lora":  # an activated adapter cannot be merged: it is off before the marker
        with torch.no_grad():
            merged = reloaded.merge_and_unload()(**inputs).logits
        torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(merged[:, -1].argmax(-1), expected[:, -1].argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_whole_embedding_is_saved(kind, tiny_models, tmp_path):
    model, tokenizer = initialize_model_with_tokens(tiny_models[kind])
    save_adapter(model, tokenizer, tmp_path / "final")
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) * 4
    base = sum(p.numel() for name, p in model.named_parameters() if "base_layer" in name) * 4
    size = os.path.getsize(tmp_path / "final" / "adapter_model.safetensors")
    rows = len(confidence_ids(tokenizer).all) * 64 * 4 * 2
    assert size < lora + rows + 10_000  # the safetensors header, on a model of a few kilobytes
    assert rows < 0.05 * base
    assert "P(C) / (P(C) + P(U))" in (tmp_path / "final" / "README.md").read_text()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_training_learns(bits, tiny_models):
    model, tokenizer = initialize_model_with_tokens(
        tiny_models["untied"], lora_dropout=0.0, load_in_8bit=bits == 8, load_in_4bit=bits == 4
    )
    kinds = {type(module).__name__ for module in model.modules()}
    assert {8: "Linear8bitLt", 4: "Linear4bit"}[bits] in kinds
    losses = train_steps(model, batch_of(tokenizer))
    assert losses[-1] < 0.5 * losses[0]


def test_bf16_weights_leave_the_adapter_in_float32(tiny_models):
    model, _ = initialize_model_with_tokens(tiny_models["untied"], dtype=torch.bfloat16)
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_a_model_that_is_not_there_is_one_sentence():
    with pytest.raises(InputError, match="--model_name nowhere/nothing: cannot load its tokenizer"):
        initialize_model_with_tokens("nowhere/nothing")


def test_flash_attention_without_the_package_is_one_sentence(tiny_models):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base_model(tiny_models["untied"], attn_implementation="flash_attention_2")
