"""cluster/: what Slurm and Kubernetes would start, and a run of two machines."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import DEMO_MODEL, ROOT, tagged_records, write_jsonl
from kubeflow_trainer_api import models
from safetensors.torch import load_file

from plan_training import main, resource_name

RUN = """--batch_size 4 --gradient_accumulation_steps 1 --max_steps 4 --lora_dropout 0
--eval_steps 2 --save_steps 2 --logging_steps 1 --learning_rate 1e-3 --no_bf16""".split()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", tagged_records(64))


# ------------------------------------------------------------------------------------------------
# Two machines: two networks of this computer where it allows them, joined by a cable
# ------------------------------------------------------------------------------------------------
CABLE = """set -e
mount -t tmpfs none /run  # where `ip netns` keeps its names; ours end with this shell
for machine in 0 1; do ip netns add "$machine"; done
ip link add eth0 netns 0 type veth peer name eth0 netns 1
for machine in 0 1; do
  ip -n "$machine" address add "10.0.0.1$machine/24" dev eth0
  ip -n "$machine" link set lo up
  ip -n "$machine" link set eth0 up
done
"""
BOTH = """for machine in 0 1; do
  mkdir -p "machine$machine"
  (cd "machine$machine" && exec timeout -k 10 200 $ENTER"$machine" "${@/MACHINE/$machine}" \
    > log 2>&1) &
  jobs[machine]=$!
done
status=0
for job in "${jobs[@]}"; do wait "$job" || status=$?; done
exit $status
"""
ALONE = ["unshare", "--user", "--map-root-user", "--net", "--mount"]


def networks_allowed():
    """Whether this computer lets us have networks of our own: root is not needed, a kernel is."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    return subprocess.run([*ALONE, "bash", "-c", CABLE], capture_output=True).returncode == 0


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


NETWORKS = networks_allowed()


def on_two_machines(command, folder):
    """Runs a command on two machines, each in a folder of its own, machine0 and machine1.

    In the command, MACHINE stands for the machine's number and ADDRESS for where machine 0 is.
    Returns what the two said.
    """
    if NETWORKS:
        shell, address = [*ALONE, "bash", "-c", CABLE + BOTH], "10.0.0.10"
        # gloo would look up the name of the computer, which both machines have from this one
        environment = {"ENTER": "nsenter --net=/run/netns/", "GLOO_SOCKET_IFNAME": "eth0"}
    else:
        shell, address = ["bash", "-c", BOTH], "127.0.0.1"
        environment = {"ENTER": "env NUMBER="}
    result = subprocess.run(
        [*shell, "-", *(word.replace("ADDRESS", address) for word in command)],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    logs = [folder / f"machine{machine}" / "log" for machine in (0, 1)]
    said = [path.read_text() if path.exists() else "" for path in logs]
    assert result.returncode == 0, "\n".join([result.stderr, *said])
    return said


def accelerate(machines, *arguments):
    """The command that trains in two processes on one machine or two."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(ROOT / "train_config_4gpu.yaml"), "--num_processes", "2",
               "--num_machines", str(machines), "--main_process_port", free_port()]  # fmt: skip
    if machines == 2:
        command += ["--machine_rank", "MACHINE", "--main_process_ip", "ADDRESS"]
    return [*command, str(ROOT / "train_confidence_lora.py"), *arguments]


@pytest.fixture(scope="session")
def one_machine(data, tmp_path_factory):
    """The folder of a run of two processes on one machine, which several machines must equal."""
    folder = tmp_path_factory.mktemp("one_machine")
    command = accelerate(1, "--model_name", DEMO_MODEL, "--train_data", data,
                         "--output_dir", "run", *RUN)  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, timeout=240, capture_output=True)
    return folder / "run"


def assert_same_run(run, expected):
    """Two runs that cannot differ but by the order in which floats were added."""
    summary, other = (json.loads((path / "summary.json").read_text()) for path in (run, expected))
    for name in ("num_processes", "global_batch_size", "steps", "train_tokens"):
        assert summary[name] == other[name], name
    assert summary["num_processes"] == 2
    assert summary["train_loss"] == pytest.approx(other["train_loss"], abs=1e-6)
    weights = [load_file(path / "final" / "adapter_model.safetensors") for path in (run, expected)]
    for name, tensor in weights[1].items():
        assert (weights[0][name] - tensor).abs().max() < 1e-5, name


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("disk", ["shared", "own"])
def test_P7_two_machines_train_what_one_does_and_only_the_first_writes(
    disk, data, one_machine, tmp_path, record_property
):
    record_property("networks", "two, joined by a cable" if NETWORKS else "one: loopback")
    out = tmp_path / "run" if disk == "shared" else Path("run")
    said = on_two_machines(
        accelerate(2, "--model_name", DEMO_MODEL, "--train_data", data,
                   "--output_dir", str(out), *RUN),
        tmp_path,
    )  # fmt: skip
    assert said[0].count("Distributed training with 2 processes") == 1
    assert "validation at step 4" in said[0]
    assert "Distributed training" not in said[1]
    assert "validation at step" not in said[1]
    run = tmp_path / "run" if disk == "shared" else tmp_path / "machine0" / "run"
    assert_same_run(run, one_machine)
    written = files_of(run)
    if disk == "own":
        assert not files_of(tmp_path / "machine1" / "run")
    without_logs = [
        {name for name in names if not name.startswith("logs/")}
        for names in (written, files_of(one_machine))
    ]
    assert without_logs[0] == without_logs[1]


# ------------------------------------------------------------------------------------------------
# What the cluster files start: the launcher, on a run file of the demo model
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(data, tmp_path):
    """A folder that looks like the repository, with a run file of the demo model: run.yaml."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".venv", "checkpoints"):
            (folder / path.name).symlink_to(path)
    (folder / "checkpoints").mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    words = iter([word.removeprefix("--") for word in RUN if word != "--no_bf16"])
    settings = {name: yaml.safe_load(value) for name, value in zip(words, words)}
    settings |= {"task": "confidence", "num_processes": 2, "bf16": False, "learning_rate": 1e-3,
                 "model_name": DEMO_MODEL, "train_data": data,
                 "output_dir": str(tmp_path / "run")}  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


# Slurm's side of the script: a node list of two, and the step's command once on each node
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
trap 'told=1; kill -TERM "${tasks[@]}"' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_NODEID=$node "$@" > >(sed -u "s/^/$node: /") 2>&1 &
  tasks[node]=$!
done
status=0
for task in "${tasks[@]}"; do
  told=1
  while [[ -n $told ]]; do told=; wait "$task" || status=$?; done
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show hostnames node[7-8]") printf '127.0.0.1\\n127.0.0.2\\n' ;;
  "requeue "*) echo "$2" >> requeued ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def slurm(checkout, tmp_path):
    """Starts the Slurm script as Slurm does: a copy elsewhere, under Slurm's variables."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    shutil.copy(ROOT / "cluster" / "slurm.sbatch", tmp_path / "slurm_script")
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}",
                   "SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_NODELIST": "node[7-8]",
                   "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "1",
                   "SLURM_JOB_ID": str(int(free_port()) % 10000)}  # fmt: skip

    def start(*arguments, **more):
        return subprocess.Popen(
            ["bash", str(tmp_path / "slurm_script"), *arguments], env=environment | more, cwd="/",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def test_G7_the_slurm_script_makes_one_world_of_its_nodes(slurm, one_machine, tmp_path):
    job = slurm("run.yaml", "--run_name", "slurm")
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert re.findall("^(.): Distributed training with 2 processes", said, re.MULTILINE) == ["0"]
    assert_same_run(tmp_path / "run", one_machine)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["run_name"] == "slurm"  # flags after the file reach the run


WAITS = """import signal, sys, time
def told(*_):
    print("told", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, told)
print("training", flush=True)
time.sleep(60)
"""
# The step is over before the script looks at it again; srun's own `kill` is as fast as ever.
SLOW_KILL = {
    "BASH_FUNC_kill%%": '() { builtin kill "$@" && [[ $0 == */slurm_script ]] && sleep 2; }'
}


@pytest.mark.parametrize("environment", [{}, SLOW_KILL])
@pytest.mark.parametrize(("signal", "requeued"), [("TERM", False), ("USR1", True)])
def test_a_signal_to_the_slurm_script_reaches_every_node_and_time_that_is_up_requeues(
    signal, requeued, environment, slurm, checkout
):
    (checkout / "plan_training.py").unlink()
    (checkout / "plan_training.py").write_text(WAITS)
    job = slurm("run.yaml", **environment)
    begun = [job.stdout.readline(), job.stdout.readline()]
    assert sorted(begun) == ["0: training\n", "1: training\n"]
    subprocess.run(["kill", f"-{signal}", str(job.pid)], check=True)
    said, _ = job.communicate(timeout=30)
    assert {"0: told", "1: told"} <= set(said.splitlines())
    assert job.returncode == 143
    assert (checkout / "requeued").exists() == requeued


def test_a_slurm_job_without_its_run_file_says_so_before_it_starts_anything(slurm):
    job = slurm("configs/runs/nowhere.yaml")
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 2
    assert "configs/runs/nowhere.yaml does not exist" in said
    assert said.count("\n") == 1


def test_the_slurm_script_asks_for_four_nodes_of_eight_gpus_and_is_sound_bash():
    path = ROOT / "cluster" / "slurm.sbatch"
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", path.read_text(), re.MULTILINE))
    expected = {"nodes": "4", "gpus-per-node": "8", "ntasks-per-node": "1"}
    assert {name: asked[name] for name in expected} == expected
    assert (ROOT / Path(asked["output"]).parent).is_dir()  # Slurm would not make it
    checker = Path(sys.executable).with_name("shellcheck")
    subprocess.run([checker, path], check=True)


# ------------------------------------------------------------------------------------------------
# Kubernetes
# ------------------------------------------------------------------------------------------------
SCHEMAS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
}


def manifest():
    text = (ROOT / "cluster" / "kubernetes.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def assert_valid(document):
    """By Kubeflow's own models. They refuse wrong types and missing names, and leave out names that
    they do not know: whatever does not come back was misspelt."""
    assert SCHEMAS[document["kind"]].from_dict(document).to_dict() == document


def test_G7_the_manifest_is_valid_by_kubeflows_schema():
    documents = manifest()
    assert set(documents) == set(SCHEMAS)
    for document in documents.values():
        assert_valid(document)
    trainer = documents["TrainJob"]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 2)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 2


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.trainer.numNodes", "4"),
        ("spec.trainer.nodes", 4),
        ("spec.trainer.args", "launch"),
        ("spec.runtimeRef", {}),
        ("spec.podTemplateOverrides", []),  # Kubeflow Trainer 2.0 and 2.1
        ("spec.runtimePatches", [{"trainingRuntimeSpec": {}}]),
    ],
)
def test_a_broken_manifest_is_not_valid(path, value):
    document = manifest()["TrainJob"]
    place = document
    *parents, last = path.split(".")
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises((ValueError, AssertionError)):
        assert_valid(document)


def test_what_the_manifest_mounts_is_there():
    documents = manifest()
    patch = documents["TrainJob"]["spec"]["runtimePatches"][0]
    job = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claim = volumes[mounts["/app/checkpoints"]]["persistentVolumeClaim"]["claimName"]
    assert claim == documents["PersistentVolumeClaim"]["metadata"]["name"]
    assert documents["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


POD = """words=()
for word in "$@"; do  # $(NAME) is what Kubernetes replaces, before anything runs
  [[ $word =~ ^\\$\\(([A-Z_]+)\\)$ ]] && word=${!BASH_REMATCH[1]}
  words+=("$word")
done
cd "$CHECKOUT"
exec "${words[@]}"
"""


def test_G7_the_manifests_command_makes_one_world_of_its_workers(checkout, one_machine, tmp_path):
    """Under the variables that Kubeflow's torch runtime sets, put in as Kubernetes does."""
    trainer = manifest()["TrainJob"]["spec"]["trainer"]
    command = [sys.executable if word == "python" else word for word in trainer["command"]]
    arguments = ["run.yaml" if word.startswith("configs/") else word for word in trainer["args"]]
    variables = ["PET_NNODES=2", "PET_NPROC_PER_NODE=1", "PET_NODE_RANK=MACHINE",
                 "PET_MASTER_ADDR=ADDRESS", f"PET_MASTER_PORT={free_port()}"]  # fmt: skip
    worker = ["env", *variables, f"CHECKOUT={checkout}", "bash", "-c", POD, "-"]
    said = on_two_machines([*worker, *command, *arguments], tmp_path)
    assert "Distributed training with 2 processes" in said[0]
    assert_same_run(tmp_path / "run", one_machine)


# ------------------------------------------------------------------------------------------------
# The same for a run of other sizes: plan_training.py cluster


@pytest.fixture
def rendered(checkout, capsys, monkeypatch):
    """What `plan_training.py cluster KIND` prints for two machines of four GPUs."""

    def rendered(kind):
        run = checkout / "my run.yaml"
        text = (checkout / "run.yaml").read_text().replace("num_processes: 2", "num_processes: 8")
        run.write_text(text + "num_machines: 2\n")
        assert main(["cluster", kind, str(run), "--output_dir", "checkpoints/Qwen_SFT v2"]) == 0
        return run, capsys.readouterr().out

    return rendered


def test_G7_the_rendered_slurm_script_differs_from_the_shipped_one_in_its_sizes_alone(rendered):
    run, text = rendered("slurm")
    shipped = (ROOT / "cluster" / "slurm.sbatch").read_text().splitlines()
    lines = text.splitlines()
    assert [line.split("  #")[0].rstrip() for line in lines if line not in shipped] == [
        "#SBATCH --job-name=qwen-sft-v2",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=32",
        f"CONFIG='{run}'",
    ]
    assert len(lines) == len(shipped)


def test_G7_the_rendered_manifest_is_valid_and_has_the_runs_sizes(rendered):
    run, text = rendered("kubernetes")
    documents = {document["kind"]: document for document in yaml.safe_load_all(text)}
    for document in documents.values():
        assert_valid(document)
    job = documents["TrainJob"]
    trainer = job["spec"]["trainer"]
    assert job["metadata"]["name"] == "qwen-sft-v2"
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 4
    assert trainer["args"][:2] == ["launch", str(run)]
    assert trainer["args"][2:] == manifest()["TrainJob"]["spec"]["trainer"]["args"][2:]


@pytest.mark.parametrize("name", ["Qwen_7B", "7b", "ünï", "a" * 90, "-x-", "lauf/3"])
def test_any_run_name_becomes_a_name_that_kubernetes_takes(name):
    assert re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", resource_name(name))
