"""TRL 1.15's SFTTrainer at its fastest, training the same adapter with the same tag rows.

Two things stand in its way, and are patched here without making it slower:

- Its loss reads `lm_head.bias`, which PEFT's wrapper of trainable token rows does not pass on.
- Its loss is a Triton kernel at the labelled positions, which no CPU runs. There, the same
  arithmetic in PyTorch takes its place.

Tried and slower on a CPU: gradient checkpointing (TRL's default), random order, packing and
`padding_free` (without FlashAttention they attend over the whole packed row), logits everywhere.
"""

import torch
import trl.trainer.utils
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

FASTEST = {
    "gradient_checkpointing": False,
    "max_length": None,  # the rows are cut already
    "train_sampling_strategy": "group_by_length",
}


class TorchLogProb:
    """trl.kernels.ChunkedLogProbFunction for where there is no Triton."""

    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, chunk_size, softcap, scale, outputs):
        logits = torch.nn.functional.linear(hidden, weight, bias).float() * (scale / temperature)
        log_p = logits.log_softmax(dim=-1)
        chosen = log_p.gather(-1, labels[:, None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
            hits = logits.argmax(dim=-1) == labels
        return chosen, entropy, None, None, hits


def make_trl_trainer(model, tokenizer, rows, arguments: dict, tag_only: bool) -> SFTTrainer:
    """SFTTrainer on our encodings.

    Args:
        tag_only: whether the labels are ours, marker, tag and 16 tokens of the answer; else those
            of TRL's completion-only loss, the whole completion, which is answer, marker and tag.
        arguments: of SFTConfig, over FASTEST.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.register_parameter("bias", head.original_module.bias)
    if trl.trainer.utils._ChunkedLogProbFunction is None:
        trl.trainer.utils._ChunkedLogProbFunction = TorchLogProb

    def relabelled(row: dict) -> dict:
        labels = row["labels"]
        if not tag_only:
            start = next(i for i, label in enumerate(labels) if label != -100)
            labels = labels[:start] + row["input_ids"][start:]
        return {"input_ids": row["input_ids"], "labels": labels}

    return SFTTrainer(
        model=model,
        args=SFTConfig(**{**arguments, **FASTEST}),
        train_dataset=Dataset.from_list([relabelled(row) for row in rows]),
        processing_class=tokenizer,
    )
