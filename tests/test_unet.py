"""The UNet beyond its golden numbers: dropout masks, conditions, autocast, other image sizes."""

import math

import goldens
import pytest
import torch
from torch.nn import functional as F

import unet
from unet import UNet

SEED = torch.tensor(7)


def outputs(network: UNet, **settings) -> torch.Tensor:
    """The network's output for two random images at random times."""
    generator = torch.Generator().manual_seed(0)
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


# Dropout


def test_nothing_is_dropped_or_drawn_in_evaluation_mode(network):
    network.eval()
    before = torch.get_rng_state()
    assert torch.equal(outputs(network), outputs(network, dropout_seed=SEED))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_one_kernel_of_other_devices_drops_as_the_cpu_does():
    h = torch.randn(1000, requires_grad=True)
    mask = unet._draw_mask(h.shape, h.detach(), 0.3, torch.Generator())
    dropped = torch.ops.aten.native_dropout_backward(h, mask.bool(), 1 / 0.7)
    expected = unet._dropout(h.clone(), 0.3, mask)
    torch.testing.assert_close(dropped, expected)
    gradients = (torch.autograd.grad(y.square().sum(), h)[0] for y in (dropped, expected))
    torch.testing.assert_close(*gradients)


def convolved(network: UNet, **settings) -> dict[str, torch.Tensor]:
    """The input of each block's second convolution, by name: what dropout made."""
    layers = {n: m for n, m in network.named_modules() if n.endswith(".conv1")}
    found: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, name=name: found.update({name: given[0].detach()})
        )
        for name, layer in layers.items()
    ]
    outputs(network, **settings)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("seed", [None, SEED])
def test_every_block_drops_three_tenths_of_its_own_and_scales_up_the_rest(network, seed):
    dropped = convolved(network, dropout_seed=seed)
    whole = convolved(network.eval())["enc.8x8_block0.conv1"]
    first = dropped["enc.8x8_block0.conv1"]
    torch.testing.assert_close(first, (whole / 0.7).where(first != 0, 0.0))
    assert len(dropped) == 33
    for name, h in dropped.items():
        deviation = math.sqrt(0.3 * 0.7 / h.numel())
        assert abs((h == 0).double().mean().item() - 0.3) < 5 * deviation, name
    one, other = (dropped[f"enc.8x8_block{n}.conv1"] == 0 for n in (1, 2))
    deviation = math.sqrt(0.09 * 0.91 / one.numel())
    assert abs((one & other).double().mean().item() - 0.09) < 5 * deviation


def test_a_pass_without_gradient_takes_the_masks_of_the_one_before_it(network, monkeypatch):
    drawn = []
    draw_mask = unet._draw_mask
    outputs(network, dropout_seed=torch.tensor(8))  # replaces masks that another test left
    monkeypatch.setattr(unet, "_draw_mask", lambda *given: drawn.append(1) or draw_mask(*given))
    with torch.no_grad():
        expected = outputs(network, dropout_seed=SEED)
    with_gradient = outputs(network, dropout_seed=SEED)
    assert len(drawn) == 2 * 33
    with torch.no_grad():
        without = outputs(network, dropout_seed=SEED)
        assert len(drawn) == 2 * 33
        assert torch.equal(without, expected) and torch.equal(with_gradient, expected)
        outputs(network, dropout_seed=SEED)  # the masks are kept for one pass only
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


# Conditions and precision


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


def test_labels_are_refused(network):
    with pytest.raises(ValueError, match="labels"):
        outputs(network, labels=torch.zeros(2, dtype=torch.long))


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


# Other sizes


def test_levels_are_named_by_their_pixels_and_the_middle_one_attends():
    with torch.device("meta"):
        network = UNet(data_size=64, data_channels=1)
    levels = {name.split("_")[0] for name in [*network.enc, *network.dec]}
    assert levels == {"64x64", "32x32", "16x16"}
    attending = [name.split(".")[1] for name, _ in network.named_modules() if "qkv" in name]
    assert attending == [*(f"32x32_block{n}" for n in range(4)), "16x16_in0", "32x32_block4"]
    assert network.dec["64x64_aux_conv"].weight.shape == (1, 256, 3, 3)


def test_the_smallest_size_works():
    network, x = UNet(data_size=4, data_channels=1).eval(), torch.zeros(2, 1, 4, 4)
    with torch.no_grad():
        assert network(x, torch.ones(2), torch.ones(2)).shape == x.shape
