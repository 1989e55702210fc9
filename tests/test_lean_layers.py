"""Our forward passes in place of PEFT's must compute the same; FP8, nearly the same."""

import copy

import pytest
import torch
from conftest import tagged_records

import train_confidence_lora as confidence
from train_confidence_lora import (
    Collator,
    Float8Linear,
    InputError,
    LeanLora,
    confidence_ids,
    encode_records,
    initialize_model_with_tokens,
    label_loss,
    load_base_model,
    parse_record,
    to_fp8,
    use_lean_layers,
)


def as_peft_has_it(model):
    """A copy whose layers run PEFT's and transformers' own code."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module).__module__ == confidence.__name__:
            module.__class__ = type(module).__base__
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"TrainableTokensLayer", "Linear"} < kinds
    assert not any(kind.startswith(("Lean", "TokenRows")) for kind in kinds)
    return model


def randomized(model):
    """LoRA's B starts at zero, which would hide what it does."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def batch_of(tokenizer, adapter="lora", count=6):
    import json

    records = [parse_record(json.dumps(record)) for record in tagged_records(count)]
    return Collator(tokenizer.pad_token_id)(list(encode_records(tokenizer, records, adapter, 256)))


@pytest.mark.parametrize("kind", ["untied", "tied", "spare", "mistral"])
@pytest.mark.parametrize("adapter", ["lora", "activated"])
def test_loss_and_every_gradient_equal_those_of_pefts_layers(adapter, kind, tiny_models):
    model, tokenizer = initialize_model_with_tokens(tiny_models[kind], adapter)
    randomized(model).train()
    batch, ids = batch_of(tokenizer, adapter), confidence_ids(tokenizer)
    results = []
    for candidate in (model, as_peft_has_it(model)):
        loss, _ = label_loss(candidate, batch, ids)
        loss.backward()
        gradients = {n: p.grad for n, p in candidate.named_parameters() if p.grad is not None}
        results.append((loss, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert any(type(m) is LeanLora for m in model.modules())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients.get(name), gradient, atol=1e-5, rtol=1e-4)


def test_dropout_disabled_and_merged_adapters_are_left_to_peft(tiny_models):
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"], lora_dropout=0.5)
    randomized(model).train()
    ids = batch_of(tokenizer)["input_ids"]
    assert not torch.equal(model(ids).logits, model(ids).logits)  # dropout is at work
    model.eval()
    peft_model = as_peft_has_it(model)
    torch.testing.assert_close(model(ids).logits, peft_model(ids).logits, atol=1e-4, rtol=1e-4)
    with model.disable_adapter(), peft_model.disable_adapter():
        assert torch.equal(model(ids).logits, peft_model(ids).logits)
    apart = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, apart, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, apart, atol=1e-4, rtol=1e-4)


def test_the_gradient_of_tag_rows_never_takes_the_size_of_the_vocabulary(tiny_models):
    """PEFT's layers have a gradient for every row of embedding and head."""
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"])
    rows = model.get_base_model().get_output_embeddings().weight.shape[0]
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in weights:
                shapes.append(tuple(out.shape))
            return out

    batch, ids = batch_of(tokenizer), confidence_ids(tokenizer)
    hidden = model.get_base_model().config.hidden_size
    for candidate, expected in ((model, False), (as_peft_has_it(model), True)):
        shapes.clear()
        weights = {p.untyped_storage().data_ptr() for p in candidate.parameters()}
        with Watch():
            label_loss(candidate, batch, ids)[0].backward()
        assert ((rows, hidden) in shapes) == expected


def relative_error(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("amax", [0, 1e-38, 1e-7, 223.9, 224, 448, 449, 1.7e38])
def test_a_row_of_any_size_fits_into_fp8(amax):
    rows, scale = to_fp8(torch.linspace(-1, 1, 33)[None] * amax)
    assert rows.float().isfinite().all()
    assert torch.log2(scale).frac() == 0
    assert rows.float().abs().max() >= 224 or amax < 1e-27


def test_fp8_output_and_gradient_are_close_to_the_exact_ones_and_use_one_weight():
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 768, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(4, 37, 512, dtype=torch.bfloat16, requires_grad=True)
    layer = Float8Linear(linear)
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    truth = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    assert relative_error(out, truth) < 0.05
    assert relative_error(x.grad, grad.double() @ linear.weight.double()) < 0.05
    transposed = layer.by_input.view(torch.float8_e4m3fn).float()
    backward = (transposed * layer.input_scale.view(torch.float32)).t()
    assert relative_error(backward, layer.weight) < 1e-4


@pytest.mark.parametrize("adapter", ["lora", "activated"])
def test_an_adapter_trains_over_fp8_weights_and_cannot_be_merged_into_them(adapter, tiny_models):
    model, tokenizer = initialize_model_with_tokens(
        tiny_models["untied"], adapter, dtype=torch.bfloat16, fp8=True
    )
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(Float8Linear) == 14  # seven in each of two layers; the head stays
    batch, ids = batch_of(tokenizer, adapter), confidence_ids(tokenizer)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(15):
        loss, labels = label_loss(model.train(), batch, ids)
        optimizer.zero_grad()
        (loss / labels).backward()
        optimizer.step()
        losses.append(loss.item() / labels)
    assert losses[-1] < 0.7 * losses[0]
    if adapter == "lora":
        with pytest.raises(RuntimeError, match="without --fp8"):
            model.merge_adapter()


def test_fp8_refuses_a_gpu_without_it(tiny_models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model = load_base_model(tiny_models["untied"])
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(InputError, match=r"--fp8 needs a GPU of compute capability 8\.9"):
        confidence.convert_frozen_linears(model)


def test_use_lean_layers_twice_changes_nothing(tiny_models):
    model, _ = initialize_model_with_tokens(tiny_models["untied"])
    before = [type(m) for m in model.modules()]
    use_lean_layers(model)
    assert [type(m) for m in model.modules()] == before
