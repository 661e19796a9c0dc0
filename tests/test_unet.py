import math

import goldens
import pytest
import torch
from torch.nn import functional as F

import unet
from unet import UNet

# B batch, C channels, H height, W width, N pixels (H x W)

PREFIX = "network."


def on_meta(**settings) -> UNet:
    with torch.device("meta"):
        return UNet(**settings)


SEED = torch.tensor(7)


def outputs(network: UNet, seed: int = 0, **settings) -> torch.Tensor:
    """What `network` makes of two random images at random times."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    t, fraction = torch.rand(2, 2, generator=generator)
    return network(x, t, t * fraction, **settings)


@pytest.fixture(scope="module")
def shared_small_network() -> UNet:
    """The whole network on 8 x 8 pixels, where a pass takes a sixteenth of the time."""
    network = UNet(data_size=8)
    goldens.fill_weights(network)
    return network


@pytest.fixture
def network(shared_small_network) -> UNet:
    return shared_small_network.train()


# The network of the released checkpoints


# The standard deviation of n uniform draws has itself the relative deviation sqrt(0.2 / n): their
# kurtosis is 1.8, so their mean square has sqrt((1.8 - 1) / n). The mean has 1 / sqrt(n) of the
# standard deviation. Golden numbers average three seeds (4/3 is the variance of a difference) and
# have five digits. At five deviations some tensor of the 170 fails once in five thousand seeds.
DEVIATIONS = 5 * math.sqrt(4 / 3)


def test_initial_weights_spread_as_in_the_reference():
    torch.manual_seed(0)
    golden = goldens.initial_std()["UNet"]
    tensors = UNet().state_dict()
    assert [PREFIX + name for name in tensors] == list(golden)
    for name, tensor in tensors.items():
        mean, std, _ = golden[PREFIX + name]
        n = tensor.numel()
        fixed = std == 0 or name.endswith("resample_filter")
        std_error = 0 if fixed else DEVIATIONS * math.sqrt(0.2 / n)
        mean_error = 0 if fixed else DEVIATIONS * std / math.sqrt(n)
        assert tensor.std(correction=0).item() == pytest.approx(std, rel=std_error + 1e-4), name
        assert tensor.mean().item() == pytest.approx(mean, abs=mean_error + 1e-4 * abs(mean)), name
        if not fixed:
            # Uniform: the largest of so many draws is all but sqrt(3) standard deviations.
            assert tensor.abs().max().item() == pytest.approx(math.sqrt(3) * std, rel=0.06), name


def test_resampling_filter_is_the_outer_product_over_64(network):
    filters = list(network.buffers())
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    assert len(filters) == 8
    for stored in filters:
        assert torch.equal(stored[0, 0], row[:, None] * row / 64)


# Dropout


def test_nothing_is_dropped_or_drawn_in_evaluation_mode(network):
    network.eval()
    before = torch.get_rng_state()
    assert torch.equal(outputs(network), outputs(network, dropout_seed=SEED))
    assert torch.equal(torch.get_rng_state(), before)


def inputs_of(network: UNet, name: str, **settings) -> torch.Tensor:
    """What the layer `name` is given in one pass."""
    given = []
    hook = network.get_submodule(name).register_forward_pre_hook(
        lambda _, args: given.append(args[0].detach())
    )
    outputs(network, **settings)
    hook.remove()
    return given[0]


def test_the_one_kernel_of_other_devices_drops_as_the_cpu_does():
    h = torch.randn(1000, requires_grad=True)
    mask = unet._draw_mask(h.shape, h.detach(), 0.3, torch.Generator())
    dropped = torch.ops.aten.native_dropout_backward(h, mask.bool(), 1 / 0.7)
    expected = unet._dropout(h.clone(), 0.3, mask)
    torch.testing.assert_close(dropped, expected)
    gradients = (torch.autograd.grad(y.square().sum(), h)[0] for y in (dropped, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("seed", [None, SEED])
def test_dropout_takes_three_tenths_before_conv1_and_scales_up_the_rest(network, seed):
    dropped = inputs_of(network, "enc.8x8_block0.conv1", dropout_seed=seed)
    whole = inputs_of(network.eval(), "enc.8x8_block0.conv1")
    gone = dropped == 0
    deviation = math.sqrt(0.3 * 0.7 / gone.numel())
    assert abs(gone.double().mean().item() - 0.3) < 5 * deviation
    torch.testing.assert_close(dropped[~gone], whole[~gone] / 0.7)


def test_blocks_have_masks_of_their_own(network):
    first, second = (
        inputs_of(network, f"enc.8x8_block{n}.conv1", dropout_seed=SEED) == 0 for n in (1, 2)
    )
    together = (first & second).double().mean().item()
    assert abs(together - 0.09) < 5 * math.sqrt(0.09 * 0.91 / first.numel())


def test_every_block_drops(network):
    names = [name for name, _ in network.named_modules() if name.endswith(".conv1")]
    assert len(names) == 33
    dropped = {}
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: dropped.update({name: (args[0] == 0).any()}),
        )
    outputs(network, dropout_seed=SEED)
    for name in names:
        network.get_submodule(name)._forward_pre_hooks.clear()
    assert all(dropped[name] for name in names)


def test_a_pass_without_gradient_takes_the_masks_of_the_one_before_it(network, monkeypatch):
    drawn = []
    draw_mask = unet._draw_mask

    def counted(*given):
        drawn.append(given)
        return draw_mask(*given)

    outputs(network, dropout_seed=torch.tensor(8))  # in place of what a test before has left
    monkeypatch.setattr(unet, "_draw_mask", counted)
    with torch.no_grad():
        expected = outputs(network, dropout_seed=SEED)
    with_gradient = outputs(network, dropout_seed=SEED)
    assert len(drawn) == 2 * 33
    with torch.no_grad():
        without = outputs(network, dropout_seed=SEED)
        assert len(drawn) == 2 * 33
        assert torch.equal(without, expected) and torch.equal(with_gradient, expected)
        outputs(network, dropout_seed=SEED)  # nothing was kept for longer
    assert len(drawn) == 3 * 33


@pytest.mark.parametrize(("count", "seed"), [(2, 8), (1, 7)])
def test_a_pass_with_another_seed_or_size_draws_its_own_masks(network, count, seed):
    x, t = torch.ones(2, 3, 8, 8), torch.ones(2)
    other = (x[:count], t[:count], t[:count])
    with torch.no_grad():
        expected = network(*other, dropout_seed=torch.tensor(seed))
    network(x, t, t, dropout_seed=SEED)
    with torch.no_grad():
        assert torch.equal(network(*other, dropout_seed=torch.tensor(seed)), expected)


# Conditions


def test_no_augmentation_labels_mean_labels_of_zero(network):
    zeros = torch.zeros(2, 6)
    network.eval()
    assert torch.equal(outputs(network), outputs(network, augment_labels=zeros))
    assert not torch.equal(outputs(network), outputs(network, augment_labels=zeros + 1))


def test_every_parameter_gets_a_gradient_with_and_without_augmentation_labels(network):
    for labels in (None, torch.ones(2, 6)):
        network.zero_grad()
        outputs(network, augment_labels=labels, dropout_seed=SEED).square().mean().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any() or (labels is None and name == "map_augment.weight"), name
    network.zero_grad()


def test_images_of_a_batch_do_not_mix(network):
    network.eval()
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2)
    both = network(x, t, t)
    torch.testing.assert_close(network(x[1:], t[1:], t[1:]), both[1:], rtol=1e-4, atol=1e-5)


# Parts


def test_attention_weights_are_those_of_the_definition():
    torch.manual_seed(0)
    block = unet._Block(8, 8, 3, dropout=0.0, attention=True).double()
    B, C, H, W = 2, 8, 3, 5
    y = torch.randn(B, C, H, W, dtype=torch.float64)
    qkv = block.qkv(y).flatten(2)
    # Channel 3 c + j is part j (query, key, value) of feature c.
    query, key, value = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]
    expected = torch.zeros(B, C, H * W, dtype=torch.float64)
    for b in range(B):
        for n in range(H * W):
            scores = torch.stack([query[b, :, n] @ key[b, :, m] for m in range(H * W)])
            weights = (scores / math.sqrt(C)).exp()
            expected[b, :, n] = value[b] @ (weights / weights.sum())
    torch.testing.assert_close(block._attend(y), expected.reshape(B, C, H, W))


def test_attention_weights_are_float32_under_autocast(network, monkeypatch):
    types = set()
    attention = F.scaled_dot_product_attention

    def recorded(*parts):
        attended = attention(*parts)
        types.update(tensor.dtype for tensor in (*parts, attended))
        return attended

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs(network)
    assert types == {torch.float32}


def passing_convolution(resample: unet.Resampling) -> torch.nn.Module:
    """A 1 x 1 convolution that changes nothing, after resampling."""
    convolution = unet._Convolution(2, 2, 1, resample).double()
    torch.nn.init.eye_(convolution.weight[:, :, 0, 0])
    torch.nn.init.zeros_(convolution.bias)
    return convolution


def test_going_down_averages_four_by_four_pixels_with_zeros_outside():
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = [1, 3, 3, 1]
    expected = torch.zeros(1, 2, 2, 3, dtype=torch.float64)
    for row in range(2):
        for column in range(3):
            for a in range(4):
                for b in range(4):
                    i, j = 2 * row + a - 1, 2 * column + b - 1
                    if 0 <= i < 4 and 0 <= j < 6:
                        share = weights[a] * weights[b] / 64
                        expected[:, :, row, column] += share * x[:, :, i, j]
    torch.testing.assert_close(passing_convolution("down")(x), expected)


def test_going_up_is_four_times_the_adjoint_of_going_down():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 8, 12, dtype=torch.float64, generator=generator)
    y = torch.randn(1, 2, 4, 6, dtype=torch.float64, generator=generator)
    down, up = passing_convolution("down")(x), passing_convolution("up")(y)
    torch.testing.assert_close((up * x).sum(), 4 * (y * down).sum())


# Other sizes


def test_levels_are_named_by_their_pixels_and_the_middle_one_attends():
    network = on_meta(data_size=64, data_channels=1)
    levels = {name.split("_")[0] for name in [*network.enc, *network.dec]}
    assert levels == {"64x64", "32x32", "16x16"}
    attending = [name.split(".")[1] for name, _ in network.named_modules() if "qkv" in name]
    assert attending == [
        *(f"32x32_block{index}" for index in range(4)),
        "16x16_in0",
        "32x32_block4",
    ]
    assert network.enc["64x64_conv"].weight.shape == (128, 1, 3, 3)
    assert network.dec["64x64_aux_conv"].weight.shape == (1, 256, 3, 3)


def test_the_smallest_size_works():
    network = UNet(data_size=4, data_channels=1).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 1, 4, 4), torch.ones(2), torch.ones(2)).shape == (2, 1, 4, 4)


def test_labels_are_refused(network):
    with pytest.raises(ValueError, match="UNet"):
        outputs(network, labels=torch.zeros(2, dtype=torch.long))
