"""The training step: its options change its cost, and results by rounding alone."""

import functools
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed import HashStore
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from worker import CONFIG as GUIDED

import dit
from config import Config, resolve
from models import Batch, Execution, Objective, build_model
from schedules import consistency_times
from support.data.batches import BatchPlan
from support.runs.checkpoint import TrainState
from support.runs.optimizers import OPTIMIZERS
from support.system import hardware
from support.system.files import UserError
from support.system.processes import Processes
from training import execution
from training.learner import Learner, build_learner

CPU = Processes(0, 0, 1, torch.device("cpu"))
PIXELS = Config(
    working_dir="unused", model_type="UNet", dataset_type="CIFAR10",
    data_size=8, batch_size=4, velocity_loss_ratio=0.5,
)  # fmt: skip
CONFIGS = {"DiT": GUIDED, "UNet": PIXELS}


def make_learner(config: Config, **options) -> tuple[Learner, list[str]]:
    """A learner with some options, every weight of which matters, and its notes."""
    config = resolve(config.model_copy(update=options))
    channels = 3 if config.model_type == "UNet" else 1
    plan = BatchPlan(config.batch_size, config.flow_matching_count, 1, config.accumulation_steps)
    made, notes = build_learner(config, CPU, plan, channels, 10)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.state.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
    return made, notes


def draw(config: Config, seed: int = 2) -> Batch:
    """A whole batch; where there are labels, seed - 1 of each loss are dropped."""
    source = torch.Generator().manual_seed(seed)
    is_unet = config.model_type == "UNet"
    V, B = config.flow_matching_count, config.batch_size
    x_0, x_1 = torch.randn(2, B, 3 if is_unet else 1, 8, 8, generator=source)
    vel_t, t, s = (torch.rand(count, generator=source) for count in (V, B - V, B - V))
    times = [torch.cat([vel_t, con]) for con in consistency_times(t, s, 0.1)]
    if is_unet:
        told = {"augment_labels": torch.randn(B, 6, generator=source)}
    else:
        rows = torch.cat([torch.arange(V), torch.arange(B - V)])
        labels = torch.randint(10, (B,), generator=source)
        told = {"labels": labels, "null_mask": rows < seed - 1}
    seeds = (100 * seed, 100 * seed + 50)
    return Batch(x_0, x_1, *times, V, V, B - V, **told, dropout_seeds=seeds)


def gradients(made: Learner, batch: Batch) -> torch.Tensor:
    """All gradients and the metrics of one batch, in one row."""
    made.state.optimizer.zero_grad()
    metrics = made.accumulate_gradients(iter([batch]))
    found = [p.grad.flatten() for p in made.state.model.parameters() if p.grad is not None]
    return torch.cat([torch.stack([*metrics.values()]), *found])


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# What the step costs


def test_a_step_takes_the_arithmetic_of_four_and_three_eighths_forwards_and_never_waits():
    """On the meta device, where there is nothing to wait for: reading a value would raise."""
    with torch.device("meta"):
        model = build_model("DiT-B-4", 4, 32, 1000, 0.1)

    x, t = torch.empty(40, 4, 32, 32, device="meta"), torch.empty(40, device="meta")
    null_mask = torch.cat([torch.arange(30) < 3, torch.arange(10) < 1])
    batch = Batch(x, x, t, t, t, 30, 30, 10, t.long(), null_mask)
    # The counter does not see the fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_step:
        model.objective = Objective(3.0, 0.25, 0.8, 1.0, 0.01)
        model(batch).loss.backward()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_forward:
        model.solution(x, t, t, t.long())
    forwards = of_step.get_total_flops() / of_forward.get_total_flops()
    assert forwards == pytest.approx(4.375, abs=5e-3)


def test_both_losses_share_the_calls_of_the_network():
    made, _ = make_learner(GUIDED)
    sizes = []
    made.state.model.network.register_forward_hook(
        lambda module, given, output: sizes.append((len(output), torch.is_grad_enabled()))
    )
    gradients(made, draw(GUIDED))
    # Of 12 and 4 samples one each is masked: 11 + 3 null passes and 3 of their own; then at t, l.
    assert sizes == [(17, False), (16, True), (4, False)]


class Operations(TorchDispatchMode):
    """Counts operations by name; a GPU would launch one kernel or more for each."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def step_as_on_a_gpu(made: Learner, batch: Batch) -> Counter:
    """Take a step without reading its result, and count its operations."""
    made.guard.refuses_at_once = False
    with Operations() as operations:
        made.step(iter([batch]))
    return operations.counts


def all_of(state: TrainState) -> list[torch.Tensor]:
    """The weights and the optimizer's state."""
    entries = [value for entry in state.optimizer.state.values() for value in entry.values()]
    return [tensor.clone() for tensor in [*state.model.parameters(), *entries]]


@pytest.mark.parametrize("optimizer", ["AdamW", "RAdam", "unfused"])
def test_a_step_that_is_not_finite_is_held_back_on_the_device(optimizer, monkeypatch):
    is_masked = optimizer == "unfused"
    if is_masked:
        monkeypatch.setitem(OPTIMIZERS, "AdamW", torch.optim.RAdam)
    made, _ = make_learner(GUIDED, optimizer="AdamW" if is_masked else optimizer)
    for _ in range(2):
        counts = step_as_on_a_gpu(made, draw(GUIDED))
    trained = [p for p in made.state.model.parameters() if p.requires_grad]
    assert counts["masked_fill_"] == (len(trained) if is_masked else 0)
    before, broken = all_of(made.state), draw(GUIDED)
    broken.x_0[0] = torch.nan
    for batch in (broken, draw(GUIDED)):  # nor is any later step applied
        step_as_on_a_gpu(made, batch)
    assert is_masked or all(map(torch.equal, all_of(made.state), before))
    assert all(tensor.isfinite().all() for tensor in all_of(made.state))
    with pytest.raises(UserError, match=r"step 3: .*Grad_Norm"):
        made.guard.refuse()


@pytest.fixture
def group_of_one():
    """This process as a group of one, which exchanges gradients with itself."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_step_waits_for_no_number_and_walks_through_no_network(monkeypatch):
    made, _ = make_learner(GUIDED)
    batch, walks = draw(GUIDED), []
    named = nn.Module.named_parameters
    monkeypatch.setattr(
        nn.Module, "named_parameters", lambda *given, **more: walks.append(1) or named(*given)
    )
    assert step_as_on_a_gpu(made, batch)["_local_scalar_dense"] == 0
    assert not walks


# Options


def test_guidance_of_the_whole_batch_changes_nothing():
    (plain, _), (whole, _) = make_learner(GUIDED), make_learner(GUIDED)
    whole.state.model.execution = Execution(fixed_shapes=True)
    for seed in (2, 3):
        batch = draw(GUIDED, seed)
        assert relative_difference(gradients(whole, batch), gradients(plain, batch)) < 1e-5


def test_bf16_reaches_neither_consistency_pass():
    made, notes = make_learner(GUIDED, precision="bf16")
    assert notes == []
    seen = []
    made.state.model.network.blocks[0].mlp.fc1.register_forward_hook(
        lambda module, given, output: seen.append((len(output), output.dtype))
    )
    coarse = gradients(made, draw(GUIDED))
    assert seen == [
        (17, torch.bfloat16),  # guidance
        (12, torch.bfloat16),  # flow matching
        (4, torch.float32),  # F(x_t, t, s)
        (4, torch.float32),  # F(x_l, l, s)
    ]
    plain, _ = make_learner(GUIDED)
    assert 1e-5 < relative_difference(coarse, gradients(plain, draw(GUIDED))) < 0.03
    assert all(p.dtype == torch.float32 for p in made.state.model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_activation_checkpointing_stores_less(name):
    config, stored = CONFIGS[name], []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        stored[-1] += tensor.nbytes
        return tensor

    for is_on in (False, True):
        made, _ = make_learner(config, activation_checkpointing=is_on)
        stored.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradients(made, draw(config))
    assert stored[1] < 0.35 * stored[0]


@pytest.mark.slow
def test_channels_last_changes_the_layout_alone():
    (plain, _), (made, _) = make_learner(PIXELS), make_learner(PIXELS, channels_last=True)
    for learned, layout in ((plain, torch.contiguous_format), (made, torch.channels_last)):
        weight = learned.state.model.network.dec["8x8_block0"].conv0.weight
        assert weight.is_contiguous(memory_format=layout)
    batch = draw(PIXELS)
    assert relative_difference(gradients(made, batch), gradients(plain, batch)) < 1e-4
    made.step(iter([batch]))
    plain.state.load_state_dict(made.state.state_dict(1), "the other layout")
    pairs = zip(plain.state.model.parameters(), made.state.model.parameters(), strict=True)
    assert all(one.is_contiguous() and torch.equal(one, other) for one, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("DiT", "inductor"), ("UNet", "aot_eager")])
def test_a_compiled_network_gives_the_same_gradients_and_is_compiled_once(
    name, backend, monkeypatch
):
    """A tiny DiT with the real compiler; of the UNet only the graphs, as it takes minutes."""
    monkeypatch.setitem(dit.SIZES, "Nano", dit.Size(width=32, depth=3, heads=2))
    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend)
    )
    config, graphs = CONFIGS[name], []
    plain, _ = make_learner(config)
    torch._dynamo.reset()
    made, notes = make_learner(config, compile=True)
    assert [note.split(": ")[0] for note in notes] == ["compile"] * (config.cfg_scale > 1)
    assert list(made.state.model.state_dict()) == list(plain.state.model.state_dict())
    before = counters["stats"]["unique_graphs"]
    for seed in (2, 3, 4):  # more labels are dropped each time, and other dropout masks drawn
        batch = draw(config, seed)
        assert relative_difference(gradients(made, batch), gradients(plain, batch)) < 1e-4
        graphs.append(counters["stats"]["unique_graphs"])
    # The average is a network of its own, not the model's compiled one.
    x, t = torch.randn(2, 3 if name == "UNet" else 1, 8, 8), torch.rand(2)
    labels = None if name == "UNet" else torch.tensor([1, 2])
    with torch.no_grad():
        averages = [each.state.ema_model.solution(x, t, 0 * t, labels) for each in (made, plain)]
    assert torch.equal(*averages)
    # One graph for each kind of block and kind of pass; the blocks of a DiT are all alike.
    assert graphs == [before + {"DiT": 1 * 3, "UNet": 14 * 2}[name]] * 3


@pytest.mark.slow
def test_exchanging_gradients_cuts_no_compiled_graph_into_more(monkeypatch, group_of_one):
    graphs = []
    count = functools.partialmethod(
        nn.Module.compile, backend=lambda graph, inputs, **options: graphs.append(graph) or graph
    )
    monkeypatch.setitem(dit.SIZES, "Nano", dit.Size(width=512, depth=3, heads=2))
    monkeypatch.setattr(nn.Module, "compile", count)
    torch._dynamo.reset()
    made, _ = make_learner(GUIDED, compile=True)
    made.parallel_model = DistributedDataParallel(made.state.model, bucket_cap_mb=1)
    made.step(iter([draw(GUIDED)]))
    assert len(graphs) == 3  # one for each kind of pass


def test_clipping_shortens_a_long_gradient_and_leaves_a_short_one():
    batch = draw(GUIDED)
    plain = gradients(make_learner(GUIDED)[0], batch)
    norm = plain[4].item()
    clipped = gradients(make_learner(GUIDED, gradient_clip=norm / 2)[0], batch)
    assert torch.allclose(clipped[5:], plain[5:] / 2, rtol=1e-4)
    assert torch.equal(clipped[:5], plain[:5])  # the norm is that before clipping
    assert torch.equal(gradients(make_learner(GUIDED, gradient_clip=norm * 2)[0], batch), plain)


# What a device cannot do


def test_an_option_that_the_device_cannot_do_is_said_and_left_out(monkeypatch):
    monkeypatch.setattr(execution, "obstacle_to_bf16", lambda device: "too old")
    monkeypatch.setattr(execution, "obstacle_to_compiling", lambda device: "no compiler")
    made, notes = make_learner(GUIDED, precision="bf16", compile=True)
    named = zip(notes, ("precision: .*too old", "compile: .*no compiler"), strict=True)
    assert all(re.match(words, note) for note, words in named)
    plain, _ = make_learner(GUIDED)
    assert torch.equal(gradients(made, draw(GUIDED)), gradients(plain, draw(GUIDED)))


def test_a_missing_compiler_is_found_out(monkeypatch, tmp_path):
    assert hardware.obstacle_to_bf16(torch.device("cpu")) is None
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    assert hardware.obstacle_to_compiling(torch.device("cpu")) is not None
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model_type", "precision", "is_allowed"),
    [("DiT-Nano-4", "tf32", True), ("DiT-Nano-4", "bf16", True), ("UNet", "fp32", False)],
)
def test_cuda_may_use_tf32_unless_fp32_is_asked_for_and_times_convolutions_of_a_unet(
    monkeypatch, model_type, precision, is_allowed
):
    matmul = SimpleNamespace(allow_tf32=not is_allowed)
    cudnn = SimpleNamespace(allow_tf32=not is_allowed, benchmark=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(execution, "obstacle_to_bf16", lambda device: None)
    with torch.device("meta"):
        model = build_model(model_type, 3, 8, 10, 0.1 if model_type != "UNet" else 0.0)
    execution.set_options(model.network, torch.device("cuda"), precision, False, False)
    assert matmul.allow_tf32 == cudnn.allow_tf32 == is_allowed
    assert cudnn.benchmark == (model_type == "UNet")
