"""A config for the published code: its keys alone, or a refusal that names what it cannot say."""

import pytest
import yaml
from commands import ROOT

import published
import train
from config import FIELDS, PUBLISHED_KEYS, config_from_dict, load_config
from published import DISPENSABLE, published_values, save_published_config
from support.system.files import UserError

PUBLISHED_MODELS = ["imagenet", "imagenet_b4_uncond", "imagenet_b2", "imagenet_xl2", "cifar"]
LATENTS = {"working_dir": "x", "dataset_type": "Imagenet", "model_type": "DiT-B-4"}
PIXELS = {"working_dir": "x", "dataset_type": "CIFAR10", "model_type": "UNet"}


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_what_is_written_means_the_same_and_has_the_published_keys_alone(name, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    source = ROOT / "configs" / f"{name}.yaml"
    train.main(["--config", str(source), "--save-published-config", str(path)])
    values = yaml.safe_load(path.read_text())
    assert set(values) == PUBLISHED_KEYS
    assert load_config(path) == load_config(source)
    assert capsys.readouterr().out.startswith(f"{path}: 35 keys")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({**LATENTS, "optimizer": "RAdam"}, "optimizer 'RAdam' (there always 'AdamW')"),
        ({**PIXELS, "optimizer": "AdamW"}, "optimizer 'AdamW' (there always 'RAdam')"),
        ({**PIXELS, "ema_every_steps": 1}, "ema_every_steps 1 (there always 16)"),
        ({**PIXELS, "augment_probability": 0}, "augment_probability 0.0 (there always 0.12)"),
        ({**PIXELS, "unet_dropout": 0.1}, "unet_dropout 0.1 (there always 0.3)"),
        ({**LATENTS, "warmup_steps": 5}, "warmup_steps 5 (there always null)"),
        ({**LATENTS, "gradient_clip": 1}, "gradient_clip 1.0 (there always null)"),
        ({**LATENTS, "model_type": "DiT-S-2"}, "model_type 'DiT-S-2' (there: DiT-B-4, DiT-B-2, "),
        ({**LATENTS, "model_type": "DiT-B-8"}, "model_type 'DiT-B-8' (there: "),
        ({**PIXELS, "dataset_type": "Digits", "data_size": 8}, "dataset_type 'Digits' (there: "),
        ({**PIXELS, "dataset_type": "ImageFolder"}, "dataset_type 'ImageFolder' (there: "),
    ],
)
def test_what_it_has_no_word_for_is_refused_by_name(values, said):
    with pytest.raises(UserError) as refusal:
        published_values(config_from_dict(values, "c.yaml"))
    assert str(refusal.value).startswith(f"the published code has no word for: {said}")


def test_several_are_named_at_once():
    config = config_from_dict({**PIXELS, "optimizer": "AdamW", "gradient_clip": 2}, "c.yaml")
    with pytest.raises(UserError, match=r"optimizer .*; gradient_clip 2\.0"):
        published_values(config)


def test_every_key_is_published_or_dispensable_or_refused_where_it_asks_for_more():
    rest = set(FIELDS) - PUBLISHED_KEYS - DISPENSABLE
    assert rest >= {"optimizer", "ema_every_steps", "augment_probability", "warmup_steps"}
    assert set(FIELDS) > PUBLISHED_KEYS | DISPENSABLE


def test_what_changes_no_result_is_left_out_and_listed(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    options = [f"--config={ROOT / 'configs' / 'imagenet.yaml'}", f"--save-published-config={path}"]
    settings = ["accumulation_steps=4", "precision=bf16", "keep_last=2", "warmup_steps=0"]
    train.main([*options, *(f"--set={setting}" for setting in settings)])
    said = capsys.readouterr().out.splitlines()
    assert said[1] == (
        "left out, as it has no word for them: accumulation_steps 4 (there 1), keep_last 2 (there "
        "null), precision 'bf16' (there 'tf32')"
    )
    assert set(yaml.safe_load(path.read_text())) == PUBLISHED_KEYS
    with pytest.raises(UserError, match="is there already; name another file"):
        train.main(options)


def test_what_never_happens_here_is_due_after_the_end_there():
    nothing = dict.fromkeys(("eval_steps", "eval_demo_steps", "logging_steps"), 0)
    settings = {**LATENTS, **nothing, "total_steps": 50, "ckpt_saving_steps": None}
    config = config_from_dict({**settings, "num_workers": 0, "prefetch_factor": None}, "c.yaml")
    values = published_values(config)
    assert [values[key] for key in nothing] == [51, 51, 51]
    assert values["ckpt_saving_steps"] == 50
    assert (values["num_workers"], values["prefetch_factor"]) == (1, 2)
    assert "dataset_path" not in values
    assert values["p"] == 1.0


def test_latents_of_another_number_of_classes_are_refused(tmp_path, monkeypatch):
    config = load_config(ROOT / "configs" / "imagenet.yaml")
    monkeypatch.setattr(published, "count_classes", lambda config: 3)
    with pytest.raises(UserError, match=r"latents of 3 classes; the published code takes .* 1,000"):
        save_published_config(config, tmp_path / "config.yaml")
    assert list(tmp_path.iterdir()) == []
