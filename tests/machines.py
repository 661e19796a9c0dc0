"""Runs on two machines, which are namespaces of this one, joined by a virtual cable.

    python tests/faults.py machines_killed

Each machine has its own processes, host name and network: alpha is 10.99.0.1, beta 10.99.0.2. Each
resolves its own name to 127.0.1.1, as a fresh Debian does. Needs root and iproute2.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from commands import ROOT
from faults import (
    LIMIT_SECONDS,
    MACHINES,
    Tally,
    check,
    ends_as,
    options_of,
    start_two,
    wait_until,
    whole,
)

NAMES, ADDRESSES = ("alpha", "beta"), ("10.99.0.1", "10.99.0.2")
NOBODY, PORT = "10.99.0.9", 29500
STOP_BETA = json.dumps(["step", "", 4, "SIGSTOP", 1])  # before the fourth step
NO_FAULT = json.dumps(["", "", 0, "", 0])
REFUSED = f"""
import socket, time
started = time.monotonic()
assert socket.socket().connect_ex(("{ADDRESSES[1]}", 9)) == 111  # connection refused
print(time.monotonic() - started)
"""
SILENCE_MINUTES = 0.15
DELAY_SECONDS, LOSS = 0.05, 0.01  # of each packet, and the share that is lost, on a slow cable


class Machine:
    """Namespaces. When their first process is killed, all their processes end."""

    def __init__(self, index: int, folder: Path):
        self.index, self.folder = index, folder
        self.cores = sorted(os.sched_getaffinity(0))
        kinds = ["--net", "--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
        self._outer = subprocess.Popen(["unshare", *kinds, "sleep", "infinity"])
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        wait_until(lambda: (text := children.read_text().split()) and is_sleep(text[0]))
        self.pid = children.read_text().split()[0]
        hosts = folder / f"hosts{index}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {NAMES[index]}\n")
        self.do("mount", "--bind", hosts, "/etc/hosts")
        self.do("hostname", NAMES[index])

    def inside(self, *command: object) -> list[str]:
        return ["nsenter", "-t", self.pid, "-n", "-u", "-m", "-p", *map(str, command)]

    def do(self, *command: object) -> None:
        subprocess.run(self.inside(*command), check=True)

    def connect(self) -> None:
        """Give this machine's end of the cable an address."""
        self.do("ip", "address", "add", f"{ADDRESSES[self.index]}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            self.do("ip", "link", "set", interface, "up")

    def start(self, command: Sequence[object], **environment: object) -> "Command":
        """Start a Python command on a core of its own, if there are enough cores."""
        core = self.cores[self.index % len(self.cores)]
        settings = [f"{name}={value}" for name, value in environment.items()]
        prefix = ["env", "-C", ROOT, "OMP_NUM_THREADS=1", *settings, "taskset", "-c", core]
        output = self.folder / f"{NAMES[self.index]}.{time.monotonic_ns()}"
        return Command(self.inside(*prefix, sys.executable, *command), output)

    def kill(self) -> None:
        """Kill all processes of the machine at once."""
        self._outer.kill()
        self._outer.wait()


def is_sleep(pid: str) -> bool:
    """Whether a process already runs `sleep`."""
    return Path(f"/proc/{pid}/comm").read_text().strip() == "sleep"


class Command:
    """A command on a machine. Its output goes to a file."""

    def __init__(self, command: list[str], output: Path):
        self._output = output
        with output.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self._output.read_text()

    def end(self) -> int:
        """Wait at most LIMIT_SECONDS. Returns the exit status."""
        try:
            return self._process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {LIMIT_SECONDS} s: {self.said()}") from None

    def refused(self, *words: str) -> None:
        """Wait for the command, which must fail with one error line that has these words."""
        check(self.end() != 0, self.said())
        self.complains(*words)

    def complains(self, *words: str) -> None:
        """Wait for one error line that has these words; torchrun itself may run on for minutes."""
        try:
            wait_until(lambda: re.search("^error.*\n", self.said(), re.MULTILINE))
        except AssertionError:
            raise AssertionError(f"no error for {LIMIT_SECONDS} s: {self.said()}") from None
        lines = [line for line in self.said().splitlines() if line.startswith("error")]
        check(len(lines) == 1, self.said())
        for word in words:
            check(word in lines[0], f"{word!r} is not in {lines[0]!r}")


class Machines:
    """Both machines and the cable between them, which may be slow."""

    def __init__(self, folder: Path, is_slow: bool = False):
        self.both = [Machine(index, folder) for index in range(2)]
        alpha, beta = self.both
        self._link: subprocess.Popen | None = None
        if is_slow:
            link = [sys.executable, ROOT / "tests" / "slow_link.py", alpha.pid, beta.pid]
            link += [str(DELAY_SECONDS), str(LOSS)]
            self._link = subprocess.Popen(link, stdout=subprocess.PIPE)
            assert self._link.stdout is not None
            check(self._link.stdout.readline() == b"connected\n", "the slow link is not connected")
        else:
            cable = ["type", "veth", "peer", "name", "eth0", "netns", beta.pid]
            add = ["nsenter", "-t", alpha.pid, "-n", "ip", "link", "add", "eth0"]
            subprocess.run([*add, *cable], check=True)
        for machine in self.both:
            machine.connect()

    def end(self) -> None:
        """End both machines and the cable."""
        for machine in self.both:
            machine.kill()
        if self._link:
            self._link.kill()
            self._link.wait()

    def plug(self, is_in: bool) -> None:
        """Plug the cable into beta, or unplug it."""
        self.both[1].do("ip", "link", "set", "eth0", "up" if is_in else "down")

    def round_trip_seconds(self) -> float:
        """The seconds until beta refuses a connection from alpha."""
        tried = subprocess.run(
            self.both[0].inside(sys.executable, "-c", REFUSED), capture_output=True
        )
        return float(tried.stdout)

    def wait_until_beta_stops(self) -> None:
        """Wait until beta's process is stopped. Alpha's process then waits for it."""
        states = self.both[1].inside("ps", "-e", "-o", "stat")
        wait_until(lambda: "\nT" in subprocess.check_output(states, text=True))

    def go_on(self) -> None:
        """Let beta's process continue."""
        self.both[1].do("kill", "-CONT", "--", "-1")

    def start(self, index: int, place: Path, fault: str = NO_FAULT) -> Command:
        """Start torchrun on one machine."""
        flags = [
            *("--nnodes=2", "--nproc-per-node=1", "--rdzv-id=soflow", "--rdzv-backend=c10d"),
            f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}",
            f"--rdzv-conf=is_host={index == 0},timeout=20",
            f"--local-addr={ADDRESSES[index]}",
        ]
        options = options_of(place, timeout_minutes=SILENCE_MINUTES)
        script = [ROOT / "tests" / "faulty.py", fault, *options]
        return self.both[index].start(["-m", "torch.distributed.run", *flags, *script])

    def start_both(self, place: Path, fault: str = NO_FAULT) -> list[Command]:
        return [self.start(index, place, fault) for index in range(2)]

    def start_and_unplug(self, place: Path) -> list[Command]:
        """Start a run on both machines and unplug the cable before its fourth step."""
        commands = self.start_both(place, STOP_BETA)
        self.wait_until_beta_stops()
        self.plug(False)
        self.go_on()
        return commands

    def start_alone(self, index: int, place: Path, address: str = ADDRESSES[0]) -> Command:
        """Start a process of a run as SLURM does, without torchrun."""
        world = {"RANK": index, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
        where = {"MASTER_ADDR": address, "MASTER_PORT": PORT}
        options = options_of(place, timeout_minutes=SILENCE_MINUTES)
        return self.both[index].start([ROOT / "train.py", *options], **world, **where)


@contextlib.contextmanager
def machines(folder: Path, is_slow: bool = False) -> Iterator[Machines]:
    """Two machines, during the block."""
    pair = Machines(folder, is_slow)
    try:
        yield pair
    finally:
        pair.end()


def finish(commands: list[Command]) -> None:
    """Wait for a run, which must finish."""
    for command in commands:
        check(command.end() == 0, command.said())


def goes_on(folder: Path, unbroken: Path) -> None:
    """Check that the run in `folder`, restarted on two machines, ends like an unbroken one."""
    with machines(folder) as pair:
        finish(pair.start_both(folder / "run"))
    ends_as(folder / "run", unbroken)


# The faults


def trains(folder: Path, unbroken: Path) -> None:
    """A run ends like one on a single machine, with torchrun and without."""
    with machines(folder) as pair:
        finish(pair.start_both(folder / "torchrun"))
        ends_as(folder / "torchrun", unbroken)
        finish([pair.start_alone(index, folder / "alone") for index in range(2)])
        ends_as(folder / "alone", unbroken)


def continues(folder: Path, unbroken: Path) -> None:
    """A run that lost its last checkpoints continues from the first one."""
    shutil.copytree(unbroken, folder / "run")
    for path in (folder / "run").glob("*/[346].*"):
        path.unlink()
    goes_on(folder, unbroken)


def killed(folder: Path, unbroken: Path) -> None:
    """One machine is killed. The other reports it, and the same commands continue the run."""
    with machines(folder) as pair:
        alpha, _ = pair.start_both(folder / "run", STOP_BETA)
        pair.wait_until_beta_stops()
        pair.both[1].kill()
        alpha.complains("another process is gone")
    goes_on(folder, unbroken)


def blinks(folder: Path, unbroken: Path) -> None:
    """The cable is unplugged for less than the time-out, which changes nothing."""
    with machines(folder) as pair:
        commands = pair.start_and_unplug(folder / "run")
        time.sleep(2)
        pair.plug(True)
        finish(commands)
    ends_as(folder / "run", unbroken)


def cut(folder: Path, unbroken: Path) -> None:
    """The cable is unplugged for longer. Both give up; replugged, the same commands continue."""
    with machines(folder) as pair:
        commands = pair.start_and_unplug(folder / "run")
        for command in commands:
            command.complains(f"another process was silent for {SILENCE_MINUTES} minutes")
    goes_on(folder, unbroken)


def slow(folder: Path, unbroken: Path) -> None:
    """Each packet takes 50 ms, and one in a hundred is lost."""
    with machines(folder, is_slow=True) as pair:
        check(pair.round_trip_seconds() >= 2 * DELAY_SECONDS, "the cable is not slow")
        finish(pair.start_both(folder / "run"))
    ends_as(folder / "run", unbroken)


def late(folder: Path, unbroken: Path) -> None:
    """One machine joins after the other has waited for a while."""
    with machines(folder) as pair:
        alpha = pair.start(0, folder / "run")
        time.sleep(10)
        finish([alpha, pair.start(1, folder / "run")])
    ends_as(folder / "run", unbroken)


def unshared(folder: Path, unbroken: Path) -> None:
    """A working_dir that the machines do not share is refused, with the name of the machine."""
    place = folder / "own" / "run"
    place.parent.mkdir()
    with machines(folder) as pair:
        pair.both[1].do("mount", "-t", "tmpfs", "x", place.parent)
        words = ("working_dir", str(place), "on beta is not the folder", "share")
        alpha, beta = pair.start_both(place)
        alpha.refused(*words)
        beta.refused(*words)
    check(not list(place.rglob("*.pt")), "a checkpoint was written")


def misled(folder: Path, unbroken: Path) -> None:
    """A wrong address and a port in use are reported in one line within the time-out."""
    with machines(folder) as pair:
        wrong = pair.start_alone(1, folder / "run", NOBODY)
        wrong.refused("on beta: no connection", f"MASTER_ADDR {NOBODY}", "No route to host")
        listen = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(60)"
        pair.both[0].start(["-c", listen])
        time.sleep(1)
        taken = pair.start_alone(0, folder / "run")
        taken.refused("on alpha", f"MASTER_PORT {PORT}")
    check(not (folder / "run").exists(), "a folder was made")


SCENARIOS: dict[str, Callable[[Path, Path], None]] = {name: globals()[name] for name in MACHINES}


def obstacle(name: str) -> str:
    """Why this machine cannot act as two; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not all(map(shutil.which, ("ip", "unshare", "nsenter", "taskset"))):
        return "needs iproute2 and util-linux"
    trial = "ip link add name v0 type veth peer name v1"
    if name == "slow":
        trial = "ip tuntap add v0 mode tap"
    if subprocess.run(["unshare", "--net", *trial.split()], capture_output=True).returncode:
        return f"this kernel does not do `{trial}`"
    return ""


def try_it(name: str, folder: Path) -> Tally:
    """Try one fault, in its own folder."""
    tally = Tally(MACHINES[name])
    if why := obstacle(name):
        return dataclasses.replace(tally, skipped=why)
    with tally.attempt(name):
        unbroken = folder / "whole"
        if name not in ("unshared", "misled"):
            whole(unbroken, start_two)
        (folder / name).mkdir()
        SCENARIOS[name](folder / name, unbroken)
    return tally


def main() -> None:
    """Print the tally of one fault as JSON."""
    (name,) = [word for word in sys.argv[1:] if word != "--json"]
    with tempfile.TemporaryDirectory(prefix="machines-") as folder:
        print(json.dumps([dataclasses.asdict(try_it(name, Path(folder)))]))


if __name__ == "__main__":
    main()
