"""Runs examples/slurm.sh on a real SLURM with two nodes, both of them this machine.

    python tests/faults.py slurm

SLURM runs in a temporary folder, in namespaces with their own network, until this command ends.
Needs root, iproute2, and Debian's packages slurmctld, slurmd and slurm-client.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT
from faults import Tally, check, logged

NODES, ADDRESS = ("alpha", "beta"), "10.99.0.1"
ROW = "two nodes of SLURM"
LIMIT_SECONDS = 240
TOTAL_STEPS = 1500  # longer than SLURM needs to notice that a job's time is up: up to a minute
PROCESSES = 2
CONFIGURATION = """
ClusterName=trial
SlurmctldHost=alpha
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
NodeName=alpha Port=17001 CPUs=64 Gres=gpu:8
NodeName=beta Port=17002 CPUs=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""
# Rank 0 takes a while to exit; without a trap, a signal would kill it meanwhile.
LEAVES_LAST = """#!/bin/sh
trap : TERM
{python} "$@"
status=$?
trap - TERM
[ "$RANK" = 0 ] && sleep 3
exit $status
"""


def obstacle() -> str:
    """Why SLURM cannot run here; empty if it can."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))):
        return "SLURM is not installed"
    if os.geteuid() != 0:
        return "needs root"
    return "" if shutil.which("ip") and shutil.which("unshare") else "needs iproute2 and util-linux"


def say(*command: object) -> str:
    """Run a command, which must succeed. Returns what it printed."""
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True)
    check(ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}")
    return ended.stdout


def wait_for(what: str, holds, *of) -> None:
    """Wait until `holds()`. If that takes too long, the error quotes the end of the files `of`."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        told = "".join(path.read_text()[-3000:] for path in of if path.exists())
        check(time.monotonic() < deadline, f"timed out waiting for {what}: {told}")
        time.sleep(0.2)


# Inside


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """SLURM in this process's namespaces, during the block."""
    say("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    say("ip", "address", "add", f"{ADDRESS}/24", "dev", "eth0")
    for interface in ("lo", "eth0", "eth1"):
        say("ip", "link", "set", interface, "up")
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} {' '.join(NODES)}\n")
    say("mount", "--bind", folder / "hosts", "/etc/hosts")
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    for gpu in range(8):
        (folder / f"gpu{gpu}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(LEAVES_LAST.format(python=sys.executable))
    (folder / "bin" / "python").chmod(0o755)
    os.environ["PATH"] = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
    commands = [["hostname", "alpha"], ["slurmctld", "-D"]]
    commands += [["slurmd", "-D", "-N", node] for node in NODES]
    say(*commands.pop(0))
    daemons = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    try:
        wait_for("the nodes", lambda: are_idle(), *folder.glob("*.log"))
        yield
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()


def are_idle() -> bool:
    ended = subprocess.run(["sinfo", "-h", "-o", "%D %t"], capture_output=True, text=True)
    return ended.stdout.strip() == f"{len(NODES)} idle"


@dataclasses.dataclass
class Job:
    """A training run that the example script started."""

    number: str
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "job.out"

    @property
    def log(self) -> str:
        path = self.folder / "run" / "log.txt"
        return path.read_text() if path.exists() else ""

    def told(self, name: str) -> str:
        """One of the values that SLURM keeps about the job."""
        found = re.search(rf"\b{name}=(\S*)", say("scontrol", "show", "job", self.number))
        return found[1] if found else ""

    def wait_until(self, what: str, holds) -> None:
        ends = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(what, lambda: holds() or self.told("JobState") in ends, self.output)
        said = self.output.read_text()[-3000:] if self.output.exists() else ""
        check(holds(), f"{self.told('JobState')} instead of {what}: {said}")


def submit(folder: Path, *options: str, **values: object) -> Job:
    """Submit a job with one process per node."""
    folder.mkdir()
    lines = (ROOT / "configs" / "digits.yaml").read_text().splitlines()
    settings = {
        "working_dir": folder / "run", "model_type": "DiT-Nano-4", "total_steps": TOTAL_STEPS,
        "batch_size": 12, "eval_demo_steps": 0, "eval_steps": 0, "ckpt_saving_steps": 0,
        "logging_steps": 10, **values,
    }  # fmt: skip
    kept = [line for line in lines if line.split(":")[0] not in settings]
    config = "\n".join([*kept, *(f"{key}: {value}" for key, value in settings.items())])
    (folder / "config.yaml").write_text(config + "\n")
    size = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=4"]
    size += [f"--output={folder}/job.out", f"--chdir={ROOT}", "--parsable", *options]
    number = say("sbatch", *size, ROOT / "examples" / "slurm.sh", folder / "config.yaml")
    return Job(number.strip(), folder)


def finishes(folder: Path) -> None:
    """A run that is preempted once and times out once is requeued, continues, and finishes."""
    job = submit(folder, "--time=2", "--signal=TERM@60")
    job.wait_until("its first steps", lambda: "Step: " in job.log)
    cores = say("scontrol", "show", "step", f"{job.number}.0")
    check("CPUs=8" in cores, f"not 4 cores for each of {PROCESSES} processes: {cores}")
    say("scontrol", "requeue", job.number)
    job.wait_until("its requeueing", lambda: job.told("JobState") == "PENDING")
    check(job.output.read_text().count("stopped by a signal") == 1, job.output.read_text())
    resume(job, 1)
    job.wait_until("the end of its time", lambda: job.told("Restarts") == "2")
    check(job.output.read_text().count("stopped by a signal") == 2, job.output.read_text())
    say("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    resume(job, 2)
    job.wait_until("its end", lambda: job.told("JobState") not in ("RUNNING", "COMPLETING"))
    said = job.output.read_text()
    check(job.told("JobState") == "COMPLETED", said)
    check(f"finished: all {TOTAL_STEPS} steps" in said, said)
    check(said.count("fresh run") == 1 and said.count("resumed at step") == 2, said)
    check([*logged(job.log)] == [*range(10, TOTAL_STEPS + 1, 10)], "steps are missing in the log")


def resume(job: Job, restarts: int) -> None:
    """Wait until the requeued job has continued. SLURM itself would wait for two minutes."""
    time.sleep(2)  # it cannot start in the second in which it ended
    say("scontrol", "update", f"JobId={job.number}", "StartTime=now")
    job.wait_until("its continuation", lambda: job.log.count("resumed at step") == restarts)


def fails_for_good(folder: Path) -> None:
    """A run that fails is not requeued."""
    job = submit(folder, batch_size=13)
    job.wait_until("its failure", lambda: job.told("JobState") == "FAILED")
    said = job.output.read_text()
    check("batch_size: 13 cannot be cut into 2 processes" in said, said)
    check(job.told("Restarts") == "0" and job.told("ExitCode") == "1:0", job.told("ExitCode"))


def stays_cancelled(folder: Path) -> None:
    """A run that its user cancels saves a checkpoint and is not requeued."""
    job = submit(folder)
    job.wait_until("its first steps", lambda: "Step: " in job.log)
    say("scancel", job.number)
    wait_for("the nodes", are_idle, job.output)
    check(job.told("JobState") == "CANCELLED" and job.told("Restarts") == "0", job.told("JobState"))
    check("stopped by a signal" in job.output.read_text(), job.output.read_text())


def inside(folder: Path) -> Tally:
    """Try the jobs on a SLURM of their own."""
    tally = Tally(ROW)
    with cluster(folder):
        for scenario in (fails_for_good, stays_cancelled, finishes):
            with tally.attempt(scenario.__name__):
                scenario(folder / scenario.__name__)
    return tally


# Outside


def try_it() -> Tally:
    """Try the jobs, in namespaces whose processes all end with this command."""
    if why := obstacle():
        return Tally(ROW, skipped=why)
    kinds = ["--net", "--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        command = [sys.executable, __file__, "--inside", folder]
        ended = subprocess.run(["unshare", *kinds, *command], stdout=subprocess.PIPE, text=True)
    check(ended.returncode == 0, ended.stdout)
    return Tally(**json.loads(ended.stdout)[0])


def main() -> None:
    """Print the tally as JSON."""
    tally = inside(Path(sys.argv[2])) if sys.argv[1] == "--inside" else try_it()
    print(json.dumps([dataclasses.asdict(tally)]))


if __name__ == "__main__":
    main()
