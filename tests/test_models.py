"""The method: the reference's golden numbers, autograd identities, and the exact network."""

import math
from dataclasses import replace

import goldens
import pytest
import torch
from exact import ExactNetwork
from torch import nn

import dit
import schedules
from models import Batch, Execution, LossTerms, Objective, SoFlow, build_model
from schedules import Times, consistency_times, gap_fraction, guidance_decay

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
UNGUIDED = Objective(cfg_scale=1.0, mix_ratio=1.0, cfg_decay_time=1.0, p=1.0, eps=0.01)
GUIDED = Objective(cfg_scale=3.0, mix_ratio=0.25, cfg_decay_time=0.8, p=1.0, eps=0.01)


# Golden numbers


@pytest.fixture(scope="module", params=["dit_b4_guided", "dit_trig_guided", "unet"])
def golden(request):
    """A model filled by rule, and the reference's arrays and settings for it."""
    arrays, meta = goldens.load(request.param)
    channels, classes = (3, 10) if meta["model_type"] == "UNet" else (4, 1000)
    model = build_model(
        meta["model_type"], channels, 32, classes,
        meta["cfg_drop_rate"], meta["noising_type"], meta["coefficient_type"],
    ).eval()  # fmt: skip
    goldens.fill_weights(model.network)
    return model, arrays, meta


def terms_of(model: SoFlow, objective: Objective, times, x_0, x_1, *rest, seed=0) -> LossTerms:
    """The loss of samples that are all for flow matching at t, or for consistency at (t, l, s)."""
    model.objective = objective
    if isinstance(times, torch.Tensor):
        V, times = len(x_0), Times(times, times, times)
    else:
        V = 0
    batch = Batch(x_0, x_1, *times, V, V, len(x_0) - V, *rest, dropout_seeds=(seed, seed))
    loss, metrics = model(batch)
    name = "Vel" if V else "Con"
    return LossTerms(loss, metrics[f"{name}_MSE"], metrics[f"{name}_Weight"])


def gradients(model: SoFlow, loss: torch.Tensor) -> torch.Tensor:
    """The gradients of all parameters, in one row."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


@pytest.mark.slow
def test_network_velocity_and_solution_equal_the_reference(golden):
    model, arrays, _ = golden
    x, t, s = arrays["in_x0"], arrays["in_t"], arrays["in_s"]
    names = [name for name in ("labels", "augment_labels") if f"in_{name}" in arrays]
    given = {name: arrays[f"in_{name}"] for name in names}
    with torch.no_grad():
        outputs = {
            "network": model.network(x, t, t - s, **given),
            "velocity": model.velocity(x, t, **given),
            "solution": model.solution(x, t, s, **given),
        }
        if "network_uncond" in arrays:
            outputs["network_uncond"] = model.network(x, t, t - s)
    for name, output in outputs.items():
        assert goldens.relative_error(output, arrays[name]) < OUTPUT_TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["vel", "con"])
def test_losses_and_gradients_equal_the_reference(golden, loss):
    model, arrays, meta = golden
    objective = Objective(
        **{key: meta[key] for key in ("cfg_scale", "mix_ratio", "cfg_decay_time", "p", "eps")}
    )
    times = Times(arrays["in_t"], arrays["in_l"], arrays["in_s"])
    samples = [
        arrays.get(f"in_{name}") for name in ("x0", "x1", "labels", "cfg_mask", "augment_labels")
    ]
    model.zero_grad()
    terms = terms_of(model, objective, times.t if loss == "vel" else times, *samples)
    terms.loss.backward()
    assert goldens.relative_error(torch.stack(terms).detach(), arrays[loss]) < OUTPUT_TOLERANCE
    norms = torch.tensor([0.0 if p.grad is None else p.grad.norm() for p in model.parameters()])
    assert goldens.relative_error(norms, arrays[f"{loss}_gradnorm"]) < GRADIENT_TOLERANCE


def test_schedules_equal_the_reference():
    golden, _ = goldens.load("schedules")
    t, s = golden["t"], golden["s"]

    def agrees(actual, name):
        assert goldens.relative_error(actual, golden[name]) < OUTPUT_TOLERANCE, name

    for kind, path in schedules.PATHS.items():
        point = path(t)
        for name, value in zip(("alpha", "beta", "alpha_grad", "beta_grad"), point, strict=True):
            agrees(value, f"{kind}/{name}")
    for kind, form in schedules.SOLUTION_FORMS.items():
        at = form(t, s)
        agrees(at.a, f"{kind}/a")
        agrees(at.b, f"{kind}/b")
        assert torch.allclose(at.a_s, golden[f"{kind}/a_grad_s"], atol=1e-6)
        agrees(at.b_s, f"{kind}/b_grad_s")
    for tau in ("0.5", "0.8", "1.0"):
        agrees(guidance_decay(t, float(tau)), f"decay/{tau}")
    for schedule in ("Const", "Linear", "Cosine", "Exponent"):
        fractions = [gap_fraction(schedule, step, 400, 0.1, 0.002) for step in (0, 100, 250, 400)]
        agrees(torch.stack([t + (s - t) * r for r in fractions]), f"middle/{schedule}")


@pytest.mark.parametrize("entry", list(goldens.manifest()))
def test_state_dict_has_the_names_shapes_order_and_kinds_of_released_checkpoints(entry):
    expected = goldens.manifest()[entry]
    model_type = entry.removesuffix("-nodrop")
    channels, classes = (3, 10) if entry == "UNet" else (4, 1000)
    drop_rate = 0.0 if entry in ("UNet", "DiT-B-4-nodrop") else 0.1
    with torch.device("meta"):
        model = build_model(model_type, channels, 32, classes, drop_rate)
    parameters = [name for name, _ in model.named_parameters()]
    found = []
    for name, tensor in model.state_dict().items():
        kind = "param" if name in parameters else "buffer"
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append([name, list(tensor.shape), dtype, kind])
    assert found == expected
    # Optimizer states are stored by position among the parameters.
    assert parameters == [name for name, _, _, kind in expected if kind == "param"]


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "channels"), [("DiT-B-4", 4), ("UNet", 3)])
def test_initial_weights_have_the_spread_of_the_reference(entry, channels):
    expected = goldens.initial_std()[entry]
    torch.manual_seed(0)
    model = build_model(entry, channels, 32, 1000, 0.1 if entry == "DiT-B-4" else 0.0)
    for name, tensor in model.state_dict().items():
        mean, std, elements = expected[name]
        # Five standard errors of a mean over three seeds and one, and the stored rounding.
        slack = 5 * math.sqrt(4 / 3 / elements)
        assert abs(tensor.mean().item() - mean) <= slack * std + 1e-5 + 1e-4 * abs(mean), name
        assert abs(tensor.std(correction=0).item() - std) <= slack * std + 1e-4 * std, name
        if entry == "UNet" and std and not name.endswith("resample_filter"):
            # Uniform: the largest of so many draws is all but sqrt(3) standard deviations.
            assert tensor.abs().max().item() == pytest.approx(math.sqrt(3) * std, rel=0.06), name


# Autograd


def derivative(function, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jvp(function, at, torch.ones_like(at))[1]


@pytest.mark.parametrize("kind", schedules.PATHS)
def test_path_derivatives_equal_autograd(kind):
    t = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    path = schedules.PATHS[kind]
    assert torch.allclose(path(t).alpha_prime, derivative(lambda t: path(t).alpha, t))
    assert torch.allclose(path(t).beta_prime, derivative(lambda t: path(t).beta, t))


@pytest.mark.parametrize("kind", schedules.SOLUTION_FORMS)
def test_solution_form_derivatives_equal_autograd_and_it_is_the_identity_at_s_equal_t(kind):
    t = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    s = t.flip(0) * 0.7
    form = schedules.SOLUTION_FORMS[kind]
    assert torch.allclose(form(t, s).a_s, derivative(lambda s: form(t, s).a, s))
    assert torch.allclose(form(t, s).b_s, derivative(lambda s: form(t, s).b, s))
    assert torch.equal(form(t, t).a, torch.ones_like(t))
    assert torch.equal(form(t, t).b, torch.zeros_like(t))


# Toy networks in float64


class ToyNetwork(nn.Module):
    """A smooth network with classes (the last row of its table is the null class)."""

    null_label = 3

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 3, padding=1)
        self.table = nn.Embedding(4, 2)
        self.calls: list[tuple] = []

    def forward(self, x, t, gap, labels=None):
        if labels is None:
            labels = torch.full((len(x),), self.null_label)
        self.calls.append((torch.is_grad_enabled(), labels.tolist()))
        shift = (1 + t + 2 * gap)[:, None] * self.table(labels)
        return torch.tanh(self.mix(x) + shift[:, :, None, None])


def draws(batch: int):
    source = torch.Generator().manual_seed(0)
    x_0, x_1 = torch.randn(2, batch, 2, 4, 4, generator=source, dtype=torch.float64)
    t, s = torch.rand(2, batch, generator=source, dtype=torch.float64)
    return x_0, x_1, consistency_times(t, s, ratio=0.1)


def toy_model(kind: type[SoFlow] = SoFlow, **kinds) -> SoFlow:
    torch.manual_seed(1)
    return kind(ToyNetwork(), **kinds).double()


class PseudoHuber(SoFlow):
    def loss_weight(self, squared_error, scale=1):
        return 1 / (scale * (squared_error + self.objective.eps).sqrt())


def test_a_variant_of_the_consistency_loss_is_a_subclass_with_one_short_method():
    x_0, x_1, times = draws(5)
    found = []
    for kind, p in ((SoFlow, 1.0), (PseudoHuber, 1.0), (SoFlow, 0.5)):
        model = toy_model(kind)
        terms = terms_of(model, replace(UNGUIDED, p=p), times, x_0, x_1, torch.arange(5) % 3)
        found.append(gradients(model, terms.loss))
    plain, huber, same = found
    assert not torch.allclose(huber, plain, rtol=0.1)
    torch.testing.assert_close(huber, same)


def test_the_exact_network_has_no_loss_and_solves_the_path():
    c = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    model = SoFlow(ExactNetwork(c))
    _, x_1, times = draws(6)
    x_0 = c.expand(6, -1, -1, -1)
    flow_matching = terms_of(model, UNGUIDED, times.t, x_0, x_1)
    consistency = terms_of(model, UNGUIDED, times, x_0, x_1)
    assert flow_matching.squared_error < 1e-20
    assert consistency.squared_error < 1e-18
    assert abs(consistency.loss) < 1e-9
    x_t, _ = model.interpolate(x_0, x_1, times.t)
    x_s, _ = model.interpolate(x_0, x_1, times.s)
    assert torch.allclose(model.solution(x_t, times.t, times.s), x_s)
    assert torch.allclose(model.solution(x_t, times.t, times.t), x_t)
    assert torch.allclose(model.solution(x_1, times.t**0, 0 * times.t), x_0)


@pytest.mark.parametrize("kind", schedules.SOLUTION_FORMS)
def test_velocity_is_the_derivative_of_the_solution(kind):
    model = toy_model(coefficient_type=kind)
    x_0, _, times = draws(4)
    labels = torch.tensor([0, 1, 2, 1])
    slope = derivative(lambda s: model.solution(x_0, times.t, s, labels), times.t)
    # The network is not differentiated: b(t, t) = 0 multiplies its derivative.
    assert torch.allclose(model.velocity(x_0, times.t, labels), slope)


@pytest.mark.parametrize("kind", schedules.SOLUTION_FORMS)
@pytest.mark.parametrize("p", [0.0, 0.75])
def test_surrogate_gradient_is_that_of_the_squared_error_it_stands_for(kind, p):
    model = toy_model(coefficient_type=kind)
    objective = Objective(1.0, 1.0, 1.0, p, 0.01)
    x_0, x_1, times = draws(5)
    labels = torch.tensor([0, 1, 2, 0, 1])
    surrogate = terms_of(model, objective, times, x_0, x_1, labels).loss
    found = gradients(model, surrogate)

    t, l, s = times  # noqa: E741
    x_t, velocity_t = model.interpolate(x_0, x_1, t)
    f_t = model.solution(x_t, t, s, labels)
    f_l = model.solution(x_t + velocity_t * (l - t).view(-1, 1, 1, 1), l, s, labels).detach()
    squared = (f_t - f_l).square().flatten(1).mean(1)
    weight = 1 / (squared / (t - l) ** 2 + objective.eps) ** p
    b = model.solution_form(t, s).b.abs()
    plain = (weight.detach() * squared / (2 * b * (t - l))).mean()
    assert torch.allclose(found, gradients(model, plain), rtol=1e-9, atol=1e-12)


# Guidance


@pytest.mark.parametrize("is_flow_matching", [True, False])
@pytest.mark.parametrize(
    ("objective", "dropped", "fixed_shapes", "flow_matching", "consistency"),
    # The labels of each call without gradient: guidance, and for consistency F(x_l, l, s).
    [
        (GUIDED, [2], False, [[3, 3]], [[3, 3, 0, 1], [0, 1, 3]]),
        (replace(GUIDED, mix_ratio=1.0), [2], False, [[3, 3]], [[3, 3], [0, 1, 3]]),
        (GUIDED, [0, 1, 2], False, [], [[3, 3, 3]]),
        (GUIDED, [2], True, [[3, 3, 3]], [[3, 3, 3, 0, 1, 3], [0, 1, 3]]),
        (UNGUIDED, [2], True, [], [[0, 1, 3]]),
    ],
    ids=["mixed", "not mixed", "all dropped", "fixed shapes", "unguided, fixed shapes"],
)
def test_the_network_is_called_for_the_rows_that_need_it_only(
    objective, dropped, fixed_shapes, flow_matching, consistency, is_flow_matching
):
    model = toy_model()
    model.execution = Execution(fixed_shapes=fixed_shapes)
    x_0, x_1, times = draws(3)
    null_mask = torch.tensor([row in dropped for row in range(3)])
    times = times.t if is_flow_matching else times
    terms_of(model, objective, times, x_0, x_1, torch.tensor([0, 1, 2]), null_mask)
    calls = model.network.calls
    expected = flow_matching if is_flow_matching else consistency
    assert [labels for has_grad, labels in calls if not has_grad] == expected
    (with_gradient,) = [labels for has_grad, labels in calls if has_grad]
    assert with_gradient == [3 if row in dropped else row for row in range(3)]


def test_dropped_labels_without_a_null_class_are_refused():
    x_0, x_1, times = draws(2)
    model = build_model("DiT-Nano-2", 2, 4, 3, cfg_drop_rate=0.0)
    with pytest.raises(ValueError, match="null"):
        model.velocity(x_0.float(), times.t.float())
    with pytest.raises(ValueError, match="null"):
        terms_of(model, UNGUIDED, times.t, x_0, x_1, torch.arange(2), torch.tensor([True, False]))


# Times


def test_consistency_times_are_ordered_and_apart_at_the_edges():
    t = torch.tensor([0.0, 0.5, 1.0, 0.5, 0.3])
    s = torch.tensor([0.9, 0.2, 1.0, 0.5, 0.0])
    for ratio in (1.0, 0.1, 1e-9):
        times = consistency_times(t, s, ratio)
        assert (times.t >= 1e-4).all()
        assert (times.s <= times.l + 1e-7).all()
        assert (times.t - times.l >= 0.99e-4).all()
    assert torch.allclose(consistency_times(t, s, 0.5).l[1], torch.tensor(0.35))


# One step on parts of a batch


def test_parts_of_a_batch_add_up_to_the_whole():
    model = toy_model()
    model.objective = GUIDED
    x_0, x_1, times = draws(8)
    labels, null_mask = torch.arange(8) % 3, torch.tensor([False, True] * 4)
    # Five rows for flow matching, then three for consistency.
    t, l, s = (torch.cat([times.t[:5], time[5:]]) for time in times)  # noqa: E741
    batch = Batch(x_0, x_1, t, l, s, 5, 5, 3, labels, null_mask)

    def step(parts: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        results = [model(part) for part in parts]
        terms = sum(torch.stack([part.loss, *part.metrics.values()]) for part in results)
        return terms.detach(), gradients(model, terms[0])

    cut = [batch.rows([0, 1, 5], 2), batch.rows([2, 3, 4], 3), batch.rows([6, 7], 0)]
    torch.testing.assert_close(step(cut), step([batch]))


def test_both_consistency_passes_of_a_unet_drop_the_same_and_leave_the_global_state_alone():
    """With l = t and x_l = x_t, two passes with one set of masks are one and the same."""
    torch.manual_seed(0)
    model = build_model("UNet", 3, 8, 10, 0.0, dropout=0.5).train()
    outputs = []
    model.network.register_forward_hook(lambda *call: outputs.append(call[2].detach()))
    x_0, x_1 = torch.randn(2, 2, 3, 8, 8)
    t, s = torch.tensor([0.7, 0.4]), torch.tensor([0.3, 0.1])
    for seed in (5, 6):
        before = torch.get_rng_state()
        terms_of(model, UNGUIDED, Times(t, t, s), x_0, x_1, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
    one, same, other, other_same = outputs
    assert torch.equal(one, same)
    assert torch.equal(other, other_same)
    assert not torch.equal(one, other)


# Building


@pytest.mark.parametrize("size", dit.SIZES)
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_every_size_takes_every_patch_that_divides_the_data(size, patch):
    with torch.device("meta"):
        model = build_model(f"DiT-{size}-{patch}", 3, 16, 10, 0.1)
        assert model.network.pos_embed.shape == (1, (16 // patch) ** 2, dit.SIZES[size].width)
        if size == "Nano":
            x = torch.empty(2, 3, 16, 16)
            assert model.velocity(x, torch.empty(2)).shape == x.shape


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("DiT-B", 3, 8, 10, 0.1), "DiT-B.*Nano, Ti, S, B, M, L, XL"),
        (("DiT-Q-2", 3, 8, 10, 0.1), "DiT-Q-2"),
        (("VGG", 3, 8, 10, 0.1), "VGG.*UNet.*DiT-SIZE-PATCH"),
        (("UNet", 3, 6, 10, 0.0), "data_size.* 4"),
        (("DiT-Nano-2", 3, 8, 10, 0.1, "Cubic"), "noising_type 'Cubic'"),
        (("DiT-Nano-2", 3, 8, 10, 0.1, "Linear", "euler"), "coefficient_type 'euler'"),
    ],
)
def test_unknown_names_and_unfit_sizes_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        build_model(*arguments)


def test_times_of_the_wrong_shape_are_refused():
    model = toy_model()
    with pytest.raises(ValueError, match=r"\[2\].*\[3\]"):
        model.velocity(torch.zeros(2, 2, 4, 4, dtype=torch.float64), torch.rand(3))
