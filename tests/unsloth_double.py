"""A stand-in for the unsloth package, which cannot be imported without a GPU.

It does on a CPU, with transformers' own layers, what unsloth 2026.10.7 does to a model as far as
ours must cope with it (unsloth/models/llama.py, unless another file is named):

- the embedding and the head are rebuilt (unsloth_zoo/patching_utils.py, patch_model_and_tokenizer);
- after get_peft_model nothing but the LoRA matrices trains (unsloth_zoo/training_utils.py,
  prepare_model_for_training), the seeds are set anew, a hook makes the embedding's output require
  a gradient, and aLoRA is refused;
- decoder and model take and give caches as tuples of keys and values; the decoder silently cuts
  what is longer than `max_seq_length` and drops the mask in training (LlamaModel_fast_forward);
- a single token of a single record is multiplied by `lm_head.weight`, and the head is not called
  (CausalLM_fast_forward). That one token after a cache goes through a routine of its own, which
  holds the cache in the layers, is not copied here;
- generate() turns gradient checkpointing off, and back on only if the model was training; it
  decodes by copies of the LoRA weights that it makes once and only for_training() drops
  (unsloth/kernels/utils.py, fast_linear_forward). Here a copy that has grown old is an error.
"""

import functools
import inspect
import types

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, Cache, DynamicCache, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

calls = []  # names of what was called, for the tests


def as_tuple(cache):
    if not isinstance(cache, Cache):
        return cache
    return tuple((layer.keys, layer.values) for layer in cache.layers if layer.is_initialized)


def decoder_forward(
    self,
    input_ids=None,
    causal_mask=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    use_cache=None,
    output_attentions=None,
    output_hidden_states=None,
    return_dict=None,
    *args,
    **kwargs,
):
    input_ids = input_ids[:, : self.max_seq_length]
    if attention_mask is not None:
        attention_mask = None if self.training else attention_mask[:, : self.max_seq_length]
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past_key_values or ()):  # a Cache has no items
        cache.update(keys, values, layer)
    output = type(self).forward(
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache if use_cache else None,
        use_cache=bool(use_cache),
    )
    return BaseModelOutputWithPast(
        last_hidden_state=output.last_hidden_state,
        past_key_values=as_tuple(cache) if use_cache else None,
    )


def model_forward(
    self,
    input_ids=None,
    causal_mask=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    labels=None,
    use_cache=None,
    output_attentions=None,
    output_hidden_states=None,
    return_dict=None,
    num_logits_to_keep=0,
    logits_to_keep=0,
    *args,
    **kwargs,
):
    past_key_values = as_tuple(past_key_values) or None
    output = self.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
    )
    hidden, weight = output.last_hidden_state, self.lm_head.weight  # read whatever follows
    if hidden.shape[:2] == (1, 1):
        calls.append("weight")
        logits = torch.mv(weight, hidden.ravel().to(weight.dtype))[None, None]
    else:
        calls.append("head")
        keep = max(num_logits_to_keep, logits_to_keep)
        logits = self.lm_head(hidden[:, -keep:] if keep else hidden)
    return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


def prepare_inputs(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
    past_key_values = as_tuple(past_key_values) or None
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    new = 1 if past_key_values else input_ids.shape[1]
    return {
        "input_ids": input_ids[:, -new:],
        "position_ids": positions[:, -new:],
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "use_cache": True,
        "logits_to_keep": 1,
    }


def for_training(model, use_gradient_checkpointing=None):
    for weight in model.parameters():
        if hasattr(weight, "_fast_lora"):
            del weight._fast_lora
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = use_gradient_checkpointing
    return model.train()


def generate(self, *args, **kwargs):
    was_training = self.training
    for module in self.modules():
        module.training = False
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = was_training
    for name, weight in self.named_parameters():
        if ".lora_" in name:
            if not hasattr(weight, "_fast_lora"):
                weight._fast_lora = weight.detach().clone()
            assert torch.equal(weight._fast_lora, weight), f"{name} was decoded by an old copy"
    calls.append("generate")
    kwargs.update(cache_implementation="dynamic", logits_to_keep=1)
    kwargs["pad_token_id"] = kwargs.pop("pad_token_id", self.config.eos_token_id)
    with torch.inference_mode():
        return self._old_generate(*args, **kwargs)


class FastLanguageModel:
    @staticmethod
    def from_pretrained(
        model_name="unsloth/Llama-3.2-1B-Instruct",
        max_seq_length=2048,
        dtype=None,
        load_in_4bit=True,
        load_in_8bit=False,
        load_in_16bit=False,
        full_finetuning=False,
        token=None,
        device_map="sequential",
        device_map_planner_kwargs=None,
        rope_scaling=None,
        fix_tokenizer=True,
        trust_remote_code=False,
        use_gradient_checkpointing="unsloth",
        resize_model_vocab=None,
        revision=None,
        use_exact_model_name=False,
        offload_embedding="auto",
        **kwargs,
    ):
        # loader.py: apply_unsloth_gradient_checkpointing compares the length with 512
        assert use_gradient_checkpointing != "unsloth" or max_seq_length >= 512
        assert use_exact_model_name or model_name.startswith("unsloth/")  # else it is another model
        model = AutoModelForCausalLM.from_pretrained(
            model_name, dtype=dtype, device_map=device_map, **kwargs
        )
        tied = model.config.tie_word_embeddings
        old, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        pad = model.config.pad_token_id
        model.set_input_embeddings(torch.nn.Embedding.from_pretrained(old, padding_idx=pad))
        model.lm_head = torch.nn.Linear(1, 1, bias=None)
        model.lm_head.weight = old if tied else head
        model.lm_head.out_features, model.lm_head.in_features = head.shape
        model.tie_weights()
        if tied:
            assert model.lm_head.weight is model.get_input_embeddings().weight
        model.model.max_seq_length = max_seq_length or model.config.max_position_embeddings
        model.model.forward = types.MethodType(decoder_forward, model.model)
        model.forward = types.MethodType(model_forward, model)
        model.prepare_inputs_for_generation = types.MethodType(prepare_inputs, model)
        model._old_generate = model.generate
        model.generate = types.MethodType(generate, model)
        calls.append("from_pretrained")
        return model, None

    @staticmethod
    def get_peft_model(
        model,
        r=16,
        target_modules=(
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ),
        lora_alpha=16,
        lora_dropout=0.0,
        bias="none",
        layers_to_transform=None,
        layers_pattern=None,
        finetune_last_n_layers=None,
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        max_seq_length=2048,
        use_rslora=False,
        modules_to_save=None,
        init_lora_weights=True,
        loftq_config=None,
        **kwargs,
    ):  # fmt: skip
        if kwargs.get("alora_invocation_tokens") is not None:
            raise NotImplementedError("Unsloth: Activated LoRA is not supported yet.")
        set_seed(random_state)
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            target_modules=list(target_modules),
            lora_dropout=lora_dropout,
            bias=bias,
            task_type=TaskType.CAUSAL_LM,
            init_lora_weights=init_lora_weights,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            **kwargs,
        )
        model = get_peft_model(model, config)
        for name, weight in model.named_parameters():
            weight.requires_grad_(".lora_A." in name or ".lora_B." in name)
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        model.enable_input_require_grads()
        model.for_training = functools.partial(for_training, model)
        model.for_inference = model.eval
        calls.append("get_peft_model")
        return model


assert "trainable_token_indices" in inspect.signature(LoraConfig).parameters
