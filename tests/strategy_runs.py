"""Started by `accelerate launch` in place of a training script: runs several command lines of the
real scripts, one after the other, each in a process of its own on every rank.

    accelerate launch --config_file configs/strategies/zero2.yaml strategy_runs.py FOLDER

FOLDER/runs.json lists them: {"name", "argv" (the script first), "port", "die_at": a step or null}.
What a rank says goes to FOLDER/NAME.RANK.log, its exit code to NAME.RANK.rc, and what was seen from
inside of its training to NAME.RANK.json. The libraries are imported once and inherited by forking,
which is most of the time that a run of a tiny model takes; a run knows nothing of the others.

Three things keep strategies off a CPU, and are lifted here, not in the scripts:
- accelerate makes FSDP plain DDP there (state.py asks for MULTI_GPU and its like). This sets what
  it would have set, and its fsdp2_prepare_model then shards over a gloo mesh. Likewise it refuses
  tensor parallelism, which works over gloo.
- DeepSpeed compiles C++ on a CPU for its own all-reduce through shared memory: minutes, and a
  process killed meanwhile leaves a lock that later ones wait for. Without it gloo does that work;
  and for offloading, torch's Adam that of its CPUAdam.
- ZeRO-3 leaves every parameter of a tiny model whole on every rank: below a threshold, now 0.
SHARDING_ON_CPU=0 leaves all as it is.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

RANK = os.environ.get("RANK", "0")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import Trainer  # noqa: E402

import train_language_model  # noqa: E402, F401  # what the children inherit

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed


def allow_sharding_on_cpu() -> None:
    from accelerate import Accelerator, state
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    make_state, make_plugin = state.AcceleratorState.__init__, DeepSpeedPlugin.__post_init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def without_threshold(self):
        make_plugin(self)
        config = self.hf_ds_config.config
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        config["zero_force_ds_cpu_optimizer"] = False

    state.AcceleratorState.__init__ = with_fsdp
    if int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1")) > 1:
        Accelerator.multi_device = property(lambda self: self.use_distributed)
    DeepSpeedPlugin.__post_init__ = without_threshold
    if "deepspeed" in sys.modules:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def elements(parameter) -> int:
    """How many numbers of a parameter this rank holds."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    if hasattr(parameter, "to_local"):
        return parameter.to_local().numel()
    return parameter.numel()


def moments(optimizer) -> int:
    """How many numbers of Adam's first moment this rank holds."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return sum(
        elements(state["exp_avg"]) for state in optimizer.state.values() if "exp_avg" in state
    )


def observe(file: Path, die_at: int | None) -> None:
    """Has the trainer write into `file` what its training really is, and die before a step."""
    step, seen = Trainer.training_step, {"losses": []}

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == die_at:
            os._exit(0)
        loss = step(self, model, inputs, num_items_in_batch)
        seen["losses"].append([self.state.global_step, loss.item()])
        inner = self.accelerator.unwrap_model(model)
        parameters = list(model.parameters())
        seen.update(
            world_size=self.args.world_size,
            wrappers=[kind.__name__ for kind in type(model).__mro__[:3]],
            distributed_type=self.accelerator.distributed_type.value,
            held=sum(map(elements, parameters)),
            whole=sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
            split=sum(hasattr(p, "to_local") or hasattr(p, "ds_tensor") for p in parameters),
            dtypes=sorted({str(p.dtype) for p in parameters}),
            checkpointing=getattr(inner, "is_gradient_checkpointing", False),
            moments=moments(self.optimizer),
            trainable=sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad),
            autocast=str(self.accelerator.mixed_precision),
        )
        file.write_text(json.dumps(seen))
        return loss

    Trainer.training_step = training_step  # a script that is __main__ has classes of its own


def run(folder: Path, name: str, argv: list[str], die_at: int | None) -> None:
    """Does one run in this process and ends it."""
    log = os.open(folder / f"{name}.{RANK}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 0
    try:
        observe(folder / f"{name}.{RANK}.json", die_at)
        sys.argv = argv
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    if os.environ.get("SHARDING_ON_CPU") != "0":
        allow_sharding_on_cpu()
    folder = Path(sys.argv[1])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for each in json.loads((folder / "runs.json").read_text()):
        # Each world meets at a port of its own: an earlier one may not yet have left the launcher's
        os.environ["MASTER_PORT"] = str(each.pop("port"))
        child = os.fork()
        if not child:
            run(folder, **each)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / f"{each['name']}.{RANK}.rc").write_text(str(code))


main()
sys.stdout.flush()
os._exit(0)  # nothing is left to tidy up, and tidying takes seconds
