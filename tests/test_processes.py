"""Several processes, by torchrun and gloo: the same objective, images and continuation."""

import re
import shutil
import socket

import pytest
import torch
import worker
from checkpoints import assert_equal, load, state_of
from commands import digits_settings, forked, run, succeed

import train
from models import Batch
from support.data.batches import BatchPlan
from support.data.datasets import PixelData, RawBatch
from support.system import processes
from support.system.files import UserError
from support.system.processes import Processes, reporting_lost_processes
from support.system.randomness import PerImageStream
from training.draws import draw_batch

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ALONE = Processes(0, 0, 1, torch.device("cpu"))


def whole_batch() -> Batch:
    """One drawn batch of 16 digits."""
    source = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (16, 1, 8, 8), generator=source, dtype=torch.uint8)
    labels = torch.arange(16) % 10
    plan = BatchPlan(16, 10, 1, 1)
    data = PixelData(pixels, labels, tuple("0123456789"))
    return draw_batch(
        worker.CONFIG, plan, data, RawBatch(pixels, labels), 7, 0, torch.device("cpu")
    )


def cut(batch: Batch, num_microbatches: int) -> list[Batch]:
    """The batch in parts, as the plan cuts it."""
    plan = BatchPlan(16, 10, num_microbatches, 1)

    return [
        batch.rows(plan.samples(part), len(plan.first_samples(part)))
        for part in range(num_microbatches)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process finds, and what two do."""
    folder = tmp_path_factory.mktemp("processes")
    results = {}
    for ranks, name in ((1, "one"), (2, "two")):
        torch.save(cut(whole_batch(), ranks), folder / f"{name}.in")
        done = forked("tests/worker.py", folder / f"{name}.in", folder / f"{name}.out", ranks=ranks)
        assert done.returncode == 0, done.stderr
        results[name] = torch.load(folder / f"{name}.out", weights_only=True)
    return results


def assert_close(one: dict, other: dict) -> None:
    assert torch.allclose(one["metrics"], other["metrics"], rtol=1e-4)
    for left, right in zip(one["gradients"], other["gradients"], strict=True):
        assert (left - right).norm() <= 1e-4 * left.norm() + 1e-7


def test_one_drawn_batch_has_the_same_gradient_over_one_and_two_processes(found):
    assert found["one"]["gradients"]["metrics"][4] > 0
    assert_close(found["one"]["gradients"], found["two"]["gradients"])


def test_one_drawn_batch_has_the_same_gradient_in_four_accumulation_steps(found):
    accumulated = worker.gradients(ALONE, cut(whole_batch(), 4), BatchPlan(16, 10, 1, 4))
    assert_close(found["one"]["gradients"], accumulated)


def test_two_processes_sample_the_images_that_one_does(found):
    one, two = found["one"]["per image"], found["two"]["per image"]
    assert torch.equal(one["labels"], two["labels"])
    assert one["pixels"].shape == (11, 8, 8, 1)
    assert (one["pixels"].int() - two["pixels"].int()).abs().max() <= 1
    assert torch.equal(one["labels"], PerImageStream(42, 10, (1, 8, 8)).draw(range(11), 0).labels)


def test_reference_stream_of_two_processes_is_drawn_and_joined_as_the_reference_does(found):
    """11 images over 2 processes: 6 each, in batches of 4 and 2, joined in rank order, cut."""
    sources = [torch.Generator().manual_seed(42 + rank) for rank in range(2)]
    model = worker.toy_model().eval()
    expected_labels, expected_images = [], []
    for size in (4, 2):
        for source in sources:
            labels = torch.randint(10, (size,), generator=source)
            first, second = (torch.randn(size, 1, 8, 8, generator=source) for _ in range(2))
            one, half, zero = torch.ones(size), torch.full((size,), 0.5), torch.zeros(size)
            with torch.no_grad():
                x_0 = model.solution(first, one, zero, labels)
                x_0 = model.solution(0.5 * x_0 + 0.5 * second, half, zero, labels)
            expected_labels.append(labels)
            expected_images.append(x_0)
    pixels = (127.5 * torch.cat(expected_images) + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
    two = found["two"]["reference"]
    assert torch.equal(two["labels"], torch.cat(expected_labels)[:11])
    assert (two["pixels"].int() - pixels[:11].int()).abs().max() <= 1


def test_two_processes_train_stop_and_continue_exactly_and_one_goes_on_from_there(tmp_path, capsys):
    def settings(name: str) -> list[str]:
        # Of one held-out image a process has none, and has to look along all the same.
        looking = {"held_out": 1, "held_out_steps": 2}
        return digits_settings(
            tmp_path / name, ckpt_saving_steps=3, accumulation_steps=2, **looking
        )

    said = succeed(*TORCHRUN, "train.py", *settings("whole"), "--set=eval_steps=6")
    assert "12 = 2 processes x 3 x 2 accumulation" in said
    assert said.count("fresh run") == 1
    assert (tmp_path / "whole" / "evals" / "6.npz").exists()
    assert len((tmp_path / "whole" / "held_out.jsonl").read_text().splitlines()) == 3
    for name in ("two", "one"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        (tmp_path / name / "ckpts" / "6.pt").unlink()
    done = forked("train.py", *settings("two"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert_equal(state_of(load(tmp_path / "whole", 6)), state_of(load(tmp_path / "two", 6)))

    train.main(settings("one"))
    assert "12 = 1 process x 6 x 2 accumulation" in capsys.readouterr().out
    assert load(tmp_path / "one", 6)["finished_steps"] == 6


def test_a_batch_that_cannot_be_cut_is_refused_in_one_line_by_all(tmp_path):
    finished = run(*TORCHRUN, "train.py", *digits_settings(tmp_path / "run", batch_size=13))
    assert finished.returncode != 0
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "batch_size: 13" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (1, 0, 0)])
def test_a_process_takes_its_gpu_by_its_rank_or_the_only_one_it_sees(
    monkeypatch, count, local_rank, index
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert processes.choose_device("auto", local_rank, 8) == torch.device("cuda", index)


def test_a_process_beyond_the_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"process 2 .* 2"):
        processes.choose_device("cuda", 2, 4)


@pytest.mark.parametrize("shown", ["aa", "bbb", "aab"])
def test_processes_that_see_one_gpu_each_are_refused_where_it_is_the_same(shown):
    """Known by all of a machine, whose first process speaks for it; rank 5 is another machine's."""
    store = torch.distributed.HashStore()
    store.set("gpu 5", "alpha a")
    for rank, gpu in enumerate(shown):
        store.set(f"gpu {6 + rank}", f"beta {gpu}")
    for rank, gpu in enumerate(shown):
        with pytest.raises(UserError, match=r"^process \d "):
            processes.check_own_gpu(store, f"beta {gpu}", 6 + rank, rank, len(shown))
    store.set("gpu 6", "beta c")
    store.set("gpu 7", "beta a")
    processes.check_own_gpu(store, "beta c", 6, 0, 2)


@pytest.mark.parametrize(
    ("cores", "others", "threads"),
    [
        (range(8), [("here", [*range(8)])] * 3 + [("there", [*range(8)])], 2),  # of torchrun
        (range(2), [("here", [2, 3]), ("there", [0, 1])], 2),  # each its own, by SLURM
        (range(2), [("here", [0, 1])] * 7, 1),
    ],
)
def test_processes_share_the_cores_that_they_run_on_for_threads_and_compiling(
    monkeypatch, cores, others, threads
):
    chosen = []
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr(processes, "usable_cores", lambda: [*cores])
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, *others])
    processes.share_cores(ALONE)
    assert chosen == [threads]
    assert processes.os.environ == {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}


def test_processes_but_the_main_one_take_no_room_for_what_is_gathered(monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "empty_like", lambda values: taken.append(values) or values)
    monkeypatch.setattr(torch.distributed, "gather", lambda values, gathered: None)
    for rank in (1, 0):
        assert not taken
        Processes(rank, rank, 2, torch.device("cpu")).gather_on_main(torch.ones(3))
    assert len(taken) == 2


def connected(rank: int, port: int, **world: object) -> str:
    """What a process that looks for another at `port` of this machine says at its end."""
    script = (
        "from support.system.command import run_command\n"
        "from support.system.processes import connected\n"
        "def main():\n"
        "    with connected('cpu', timeout_minutes=0.02):\n"
        "        pass\n"
        "run_command(main)"
    )
    own = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **own, **world}
    finished = forked("-c", script, env={name: str(value) for name, value in where.items()})
    assert finished.returncode == 1
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error")]
    assert "is gone" not in line
    return line


def test_processes_that_cannot_connect_say_what_is_the_matter():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert "EADDRINUSE" in connected(0, port)
    assert f"MASTER_ADDR 127.0.0.1, MASTER_PORT {port}" in connected(1, port)
    assert "1/2 clients joined" in connected(0, port)
    assert "MASTER_PORT abc" in connected(0, port, MASTER_PORT="abc")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"), "is gone"),
        (RuntimeError("[gloo/a.cc:5] Timed out waiting 5ms for recv"), "silent for 3 minutes"),
        (RuntimeError("Application timeout caused pair closure"), "silent for 3 minutes"),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ../c10d/NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27"
                "\nLast error:\nCuda failure 2 'out of memory'\nException raised from create at"
            ),
            "(NCCL error in: ../c10d/NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27 "
            "Last error: Cuda failure 2 'out of memory')",
        ),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: x.cpp:77, remote process exited or there was a network error"
            ),
            "is gone",
        ),
    ],
)
def test_another_process_is_gone_only_where_one_was_there(error, said):
    with pytest.raises(UserError, match=re.escape(said)), reporting_lost_processes(1, 3):
        raise error


def test_working_dir_that_each_machine_has_for_itself_is_refused_by_name(tmp_path, monkeypatch):
    own = Processes(0, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(Processes, "broadcast_object", lambda self, value: value)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, "beta"])
    with pytest.raises(UserError, match=f"working_dir: {tmp_path} .*beta"):
        own.check_shared(tmp_path, "working_dir")
    assert not list(tmp_path.iterdir())
