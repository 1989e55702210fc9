"""The memory estimate of plan_training.py, beside tensors that are really there."""

from collections import Counter

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

import plan_training as plan
import train_confidence_lora as confidence
import train_language_model as language

HIDDEN, INTER, LAYERS, HEADS, KV = 256, 704, 4, 8, 2


def tiny_config(**changes):
    shape = {
        "vocab_size": 512,
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "tie_word_embeddings": False,
    }
    return Qwen2Config(**{**shape, **changes})


def tensor_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def after_a_step(model, length=16):
    """(weights, gradients, optimizer) in bytes of a model that AdamW has really trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    tokens = torch.arange(length)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    held = [part for state in optimizer.state.values() for part in state.values()]
    gradients = [p.grad for p in trained]
    return trained, tensor_bytes(gradients), tensor_bytes(held)


@pytest.mark.parametrize("tied", [False, True])
def test_P11_full_fine_tuning_is_estimated_to_the_byte_that_adamw_holds(tied):
    """Weights, gradients and optimizer of a plan are what a run has."""
    config = tiny_config(tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    trained, gradients, optimizer = after_a_step(model)
    size = plan.count_model(config, "full", 2)
    parts = plan.Memory(size, "full", False, 16).parts("single", 1, 1, False)
    assert parts["weights"] == tensor_bytes(trained) == tensor_bytes(model.parameters())
    assert (parts["gradients"], parts["optimizer"]) == (gradients, optimizer)


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]])
def test_P11_a_lora_is_estimated_to_the_byte_that_adamw_holds(modules):
    config = tiny_config()
    base = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    frozen = tensor_bytes(base.parameters())
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules)
    trained, gradients, optimizer = after_a_step(get_peft_model(base, lora))
    size = plan.count_model(config, "lora", 2, lora_r=4, target_modules=modules)
    parts = plan.Memory(size, "lora", True, 16).parts("single", 1, 1, False)
    assert parts["weights"] == frozen
    assert parts["adapter"] == tensor_bytes(trained)
    assert (parts["gradients"], parts["optimizer"]) == (gradients, optimizer)


def quantised_weights(model):
    """Bytes of a bitsandbytes model's weights with their scales and tables."""
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            total += parameter.numel() * parameter.element_size()
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                nested = state.state2
                total += tensor_bytes(
                    [state.absmax, state.code, state.offset, nested.absmax, nested.code]
                )
            scales = getattr(parameter, "SCB", None)
            if scales is not None:
                total += tensor_bytes([scales])
    return total


@pytest.mark.parametrize("bits", [4, 8])
def test_Y3_quantised_weights_are_estimated_to_the_byte_that_bitsandbytes_holds(bits, tmp_path):
    """What a QLoRA's frozen weights take."""
    config = tiny_config()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = confidence.load_base_model(
        str(tmp_path), torch.bfloat16, load_in_4bit=bits == 4, load_in_8bit=bits == 8
    )
    assert plan.count_model(config, "qlora", 2, bits).weights == quantised_weights(model)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7.616),
        ("Qwen/Qwen2.5-32B-Instruct", 32.764),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7.242),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.554),
        ("google/gemma-2-27b-it", 27.227),
    ],
)
def test_P11_shapes_of_the_table_have_as_many_parameters_as_the_models(name, billions):
    """Plans need no download. The numbers are those that the models' cards say."""
    run = plan.Run("", "sft", ROOT, {"model_name": name}, {}, {})
    size = plan.count_model(plan.model_config(run), "full", 2)
    assert round(size.parameters / 1e9, 3) == billions


def kept_for_backward(model, batch, length, half):
    """Bytes that autograd really keeps in the decoder, weights and their copies left out."""
    own = {part.untyped_storage().data_ptr() for part in [*model.parameters(), *model.buffers()]}
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = torch.randint(0, 500, (batch, length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, half),
    ):
        core.model(input_ids=tokens, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("tuning", "half"),
    [("lora", True), ("lora", False), ("full", True), ("full", False), ("qlora", True)],
)
def test_P4_P11_activations_are_estimated_within_a_tenth_of_what_autograd_keeps(
    tuning, half, tmp_path
):
    """The formula against the layers that really train."""
    config, batch, length = tiny_config(), 2, 300
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if tuning == "qlora":
        model.save_pretrained(tmp_path)
        model = confidence.load_base_model(str(tmp_path), torch.bfloat16, load_in_4bit=True)
    elif tuning == "lora" and half:
        model = model.to(torch.bfloat16)
    if tuning != "full":
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
        model = get_peft_model(model, lora)
        confidence.use_lean_layers(model)
    really = kept_for_backward(model.train(), batch, length, half)
    whole, _ = plan.activation_bytes(config, tuning, half, lora_r=16)
    assert batch * length * LAYERS * whole == pytest.approx(really, rel=0.1)


def memory_of(tuning, **changes):
    size = plan.count_model(tiny_config(), tuning, 2, 4 if tuning == "qlora" else None)
    return plan.Memory(size, tuning, True, 64, **changes)


def test_P6_strategies_divide_what_they_say_they_divide():
    """ZeRO-2 divides gradients and optimizer, ZeRO-3 and FSDP the weights too."""
    memory = memory_of("full")
    alone, eight = (memory.parts("zero2", count, 1, False) for count in (1, 8))
    assert eight["weights"] == alone["weights"]
    assert eight["gradients"] == alone["gradients"] // 8
    assert eight["optimizer"] == alone["optimizer"] // 8
    for strategy in ("zero3", "fsdp2"):
        alone, eight = (memory.parts(strategy, count, 1, False) for count in (1, 8))
        assert eight["weights"] == alone["weights"] // 8
    offloaded = memory.parts("zero3_offload", 8, 1, False)
    assert offloaded["weights"] == offloaded["optimizer"] == 0
    assert offloaded["main memory"] > 0


def test_recomputing_saves_activations_and_an_activated_adapter_needs_next_to_none():
    memory = memory_of("lora")
    whole, recomputed = (memory.activations(1, flag) for flag in (False, True))
    assert recomputed < whole / 2
    assert memory_of("lora", activated=True).activations(1, False) < whole / 2


def test_G1_a_model_from_dimensions_is_counted_as_it_is_built(tokenizer):
    flags = {
        "tuning": "scratch", "model_type": "llama", "hidden_size": 96, "num_heads": 4,
        "num_layers": 2, "max_seq_length": 64,
    }  # fmt: skip
    run = plan.Run("", "cpt", ROOT, {**flags, "vocab_size": len(tokenizer)}, {}, {})
    built = language.new_model(language.LanguageSettings(**flags), tokenizer)
    size = plan.count_model(plan.model_config(run), "scratch", 4)
    assert size.weights == tensor_bytes(built.parameters())


def test_attention_that_keeps_its_scores_is_counted():
    flat, eager = (memory_of("lora", eager=flag).activations(1, False) for flag in (False, True))
    assert eager - flat == 64 * LAYERS * (4 + 2 * 2) * HEADS * 64


def test_the_optimizers_counted_by_name_are_transformers_names():
    from transformers.training_args import OptimizerNames

    names = Counter(item.value for item in OptimizerNames)
    assert [name for name in plan.OPTIMIZER_BYTES if not names[name]] == []


def test_P11_a_model_that_is_nowhere_is_answered_with_what_to_do():
    run = plan.Run("", "sft", ROOT, {"model_name": "nobody/nothing"}, {}, {})
    with pytest.raises(plan.InputError, match=r"hf download nobody/nothing config\.json"):
        plan.model_config(run)
