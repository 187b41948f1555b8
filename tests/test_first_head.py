"""``fit_head`` and layer-wise rates: against naive distances, against timm, and on real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.optim
import torch
from conftest import build_pico
from test_comparison import run

from learngene_hub import Descendant, Learngene, Recipe, evaluate, expand, fit_head, load_images
from learngene_hub._first_head import PER_CLASS, solved
from learngene_hub.data import Images, normalise
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.factory import is_untouched
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.training import parameter_groups


def clouds(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (90, 5) of three classes, whose directions vary unequally, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(90) % 3
    centres = 2 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(90, 5, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 1.0, 0.5, 0.2])
    return centres[labels] + noise, labels


def test_means_say_the_nearest_class_mean() -> None:
    features, labels = clouds()
    weight, bias = solved(features, labels, 3, "means")
    means = torch.stack([features[labels == c].mean(0) for c in range(3)])
    nearest = torch.stack([((each - means) ** 2).sum(1).argmin() for each in features])  # a naive loop
    assert torch.equal((features.float() @ weight.T + bias).argmax(1), nearest)


def test_whitened_says_the_nearest_in_mahalanobis_distance() -> None:
    features, labels = clouds(1)
    weight, bias = solved(features, labels, 3, "whitened")
    means = torch.stack([features[labels == c].mean(0) for c in range(3)])
    said = (features.float() @ weight.T + bias).argmax(1)
    agreed = []
    for shrinkage in (0.02, 0.1, 0.5):  # it chose one of these
        covariance = torch.zeros(5, 5, dtype=torch.float64)
        for each, label in zip(features, labels, strict=True):
            apart = each - means[label]
            covariance += torch.outer(apart, apart) / (90 - 3)
        covariance = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / 5 * torch.eye(5)
        inverse = torch.linalg.inv(covariance)
        nearest = torch.stack([torch.stack([(e - m) @ inverse @ (e - m) for m in means]).argmin() for e in features])
        agreed.append(torch.equal(said, nearest))
    assert any(agreed)


def test_the_scale_makes_held_out_images_likely() -> None:
    """Eight times the chosen logits, and an eighth, are less likely on what was held out."""
    features, labels = clouds(2)
    held = torch.zeros(90, dtype=torch.bool)
    for c in range(3):
        held[(labels == c).nonzero().flatten()[4::5]] = True
    rest, unused = solved(features[~held], labels[~held], 3, "means")
    weight, bias = solved(features, labels, 3, "means")
    ratio = float(weight.norm() / rest.norm())
    losses = {
        factor: float(
            torch.nn.functional.cross_entropy(factor * (features[held].float() @ weight.T + bias), labels[held])
        )
        for factor in (0.125, 1.0, 8.0)
    }
    assert losses[1.0] < losses[0.125] and losses[1.0] < losses[8.0] and ratio > 0 and unused.shape == (3,)


@pytest.mark.parametrize("each", [3, 10])  # of a class; of fewer than five none is held out
def test_classes_that_lie_far_apart_do_not_make_the_head_sure_beyond_use(each: int) -> None:
    """Logits of hundreds read them as well, and after one update the loss is hundreds."""
    features, labels = clouds(3)
    few = torch.cat([(labels == c).nonzero().flatten()[:each] for c in range(3)])
    apart = features[few] + 1000.0 * torch.nn.functional.one_hot(labels[few], features.shape[1])
    weight, bias = solved(apart, labels[few], 3, "means")
    logits = apart.float() @ weight.T + bias
    assert (logits.argmax(1) == labels[few]).all()
    top = logits.topk(2).values
    assert 2.0 < float((top[:, 0] - top[:, 1]).min()) and float((top[:, 0] - top[:, 1]).max()) < 12.0


def test_a_class_without_images_and_one_image_of_each() -> None:
    features, labels = clouds(3)
    weight, bias = solved(features, labels, 4, "whitened")
    assert not weight[3].any() and bias[3] == 0
    few = torch.tensor([0, 1, 2])
    weight, bias = solved(features[few], labels[few], 3, "whitened")
    assert torch.isfinite(weight).all() and (features[few].float() @ weight.T + bias).argmax(1).tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def signs() -> tuple[Images, Images]:
    return tuple(load_images("signdigits", split=split, size=64, limit=200) for split in ("train", "test"))  # type: ignore[return-value]


def test_on_real_images_a_descendant_reads_hand_signs_before_any_training(signs: tuple[Images, Images]) -> None:
    train, test = signs
    model = expand(Learngene.from_pretrained("lsamd-base"), depth=4, width=128, num_labels=10, image_size=64)
    assert is_untouched(model) and evaluate(model, test).accuracy < 25
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fit_head(model, train, how="means") == 200
    with torch.no_grad():
        features = [
            model.forward_head(model.forward_features(normalise(i.pixels, IMAGENET)), pre_logits=True) for i in signs
        ]
    means = torch.stack([features[0][train.labels == c].mean(0) for c in range(10)])
    nearest = torch.cdist(features[1], means).argmin(1)
    naive = 100 * float((nearest == test.labels).double().mean())
    assert evaluate(model, test).accuracy == pytest.approx(naive, abs=0.51)  # one image may stand on the edge
    fit_head(model, train, how="whitened")
    assert evaluate(model, test).accuracy > 45 and not is_untouched(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"} and model.training is False


def test_many_images_of_a_class_are_not_all_looked_at_and_the_draw_is_the_seeds(pico_shape: ViTShape) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (260, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.arange(260) % 2, ("a", "b"), "noise")
    model = build_pico(pico_shape)
    assert fit_head(model, images, how="means", seed=1) == 2 * PER_CLASS
    first = model.head.weight.detach().clone()
    fit_head(model, images, how="means", seed=1)
    assert torch.equal(model.head.weight, first)
    fit_head(model, images, how="means", seed=2)
    assert not torch.equal(model.head.weight, first)


def test_what_has_no_such_head_or_labels_is_refused(signs: tuple[Images, Images], pico_shape: ViTShape) -> None:
    with pytest.raises(SettingsError, match="fresh, means, whitened"):
        fit_head(build_pico(pico_shape), signs[0], how="ridge")
    with pytest.raises(SettingsError, match="head='fresh' would work"):
        fit_head(torch.nn.Conv2d(3, 3, 1), signs[0])
    narrow = expand(Learngene.from_pretrained("lsamd-base"), depth=2, width=64, num_labels=5, image_size=64)
    with pytest.raises(DataError, match="5 outputs"):
        fit_head(narrow, signs[0])


def test_layer_wise_rates_are_those_of_timm(pico_shape: ViTShape) -> None:
    model = build_pico(pico_shape)
    groups = parameter_groups(model, Recipe(lr=1e-3, layer_decay=0.5))
    ours = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    theirs = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in theirs for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in theirs for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    assert set(ours) == set(scales) == set(names)
    for place, name in names.items():
        scale = 1.0 if name.startswith("norm.") else scales[place]  # BEiT's own code; timm has it with the last block
        assert ours[place][0] == pytest.approx(1e-3 * scale), name
        # timm leaves out what no_weight_decay names only where it is told; 1-D tensors never decay
        if not name.endswith(("pos_embed", "cls_token")):
            assert ours[place][1] == decays[place], name
    by_hand = {
        "patch_embed.proj.weight": 0.5**4,
        "blocks.0.attn.qkv.weight": 0.5**3,
        "blocks.2.mlp.fc1.weight": 0.5,
        "head.weight": 1.0,
    }
    for place, name in names.items():
        if name in by_hand:
            assert ours[place][0] == pytest.approx(1e-3 * by_hand[name]), name


def test_layer_decay_of_one_is_the_two_groups_of_before_and_a_cnn_has_no_blocks(pico_shape: ViTShape) -> None:
    assert [group["name"] for group in parameter_groups(build_pico(pico_shape), Recipe())] == ["decay", "no-decay"]
    with pytest.raises(SettingsError, match="no blocks"):
        parameter_groups(timm.create_model("resnet18"), Recipe(layer_decay=0.5))
    with pytest.raises(SettingsError, match="layer_decay is a factor"):
        Recipe(layer_decay=0.0)


def test_finetune_begins_with_class_means_where_the_head_was_never_trained(tmp_path: Path) -> None:
    asked = ("finetune", "lsamd-base", "--depth", "2", "--width", "64", "--data", "signdigits", "--limit", "60")
    asked += ("--epochs", "1", "--lr", "1e-7")
    begun = run(*asked, "--out", tmp_path / "a")
    assert begun.code == 0 and "class means of 60 images (means)" in begun.err
    fresh = run(*asked, "--out", tmp_path / "b", "--head", "fresh")
    assert fresh.code == 0 and "class means" not in fresh.err
    again = run(
        "finetune",
        tmp_path / "a",
        "--data",
        "signdigits",
        "--limit",
        "60",
        "--epochs",
        "1",
        "--lr",
        "1e-7",
        "--out",
        tmp_path / "c",
    )
    assert again.code == 0 and "class means" not in again.err  # trained once, the head stays
    heads = [Descendant.from_pretrained(tmp_path / name).timm_model.head.weight for name in "abc"]
    torch.testing.assert_close(heads[0], heads[2], atol=1e-5, rtol=0)
    assert float((heads[0] - heads[1]).detach().abs().max()) > 0.01
    refused = run(*asked, "--out", tmp_path / "d", "--head", "ridge")
    assert refused.code == 1 and "auto, fresh, means, whitened" in refused.err and not (tmp_path / "d").exists()
