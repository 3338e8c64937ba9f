"""Per-view transforms: right pixels, the same from the batched form, and driven by nothing but the view's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dlb_fast.data import (
    CenterCrop,
    Compose,
    Cutout,
    Flip,
    PadCrop,
    RandAugment,
    RandomResizedCrop,
    Resize,
    ViewRng,
    ViewRngs,
    eval_transform,
    train_transform,
)
from dlb_fast.data.transforms.crops import resize
from dlb_fast.data.transforms.rand_augment import operations


def image(channels=3, height=12, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def views(transform, picture, count=400, **options):
    return [transform(picture, ViewRng(0, 0, i, 0, **options)) for i in range(count)]


BATCHED = [
    PadCrop(2),
    PadCrop(0),
    PadCrop(3, size=8),
    Flip(),
    Flip(0.3),
    Flip(alternate=True),
    Cutout(5),
    Cutout(4, fill=(10, 20, 30)),
    Compose([PadCrop(4), Flip(), Cutout(3, fill=99)]),
]


@pytest.mark.parametrize("transform", BATCHED, ids=repr)
def test_the_batched_form_equals_the_single_one_bit_for_bit(transform):
    images = torch.stack([image(seed=s) for s in range(64)])
    epochs, ids, uses = np.arange(64) % 3, np.arange(64) * 7, np.arange(64) % 2
    expected = torch.stack(
        [transform(images[k], ViewRng(4, int(epochs[k]), int(ids[k]), int(uses[k]))) for k in range(64)]
    )
    got = transform.batch(images.clone(), ViewRngs(4, epochs, ids, uses))
    assert got.dtype == torch.uint8 and torch.equal(got, expected)
    channels_last = images.clone().contiguous(memory_format=torch.channels_last)
    assert torch.equal(transform.batch(channels_last, ViewRngs(4, epochs, ids, uses)), expected)


@pytest.mark.parametrize(
    "transform", [*BATCHED, RandomResizedCrop(6), Resize(7), CenterCrop(9), RandAugment(2, 20)], ids=repr
)
def test_the_input_is_never_written(transform):
    picture = image()
    before = picture.clone()
    for use in range(4):
        transform(picture, ViewRng(0, 0, use, 0))
    assert torch.equal(picture, before)


def test_pad_crop_places_every_window_alike():
    picture = image()
    padded = torch.zeros(3, 16, 14, dtype=torch.uint8)
    padded[:, 2:14, 2:12] = picture
    windows = {padded[:, y : y + 12, x : x + 10].numpy().tobytes(): (y, x) for y in range(5) for x in range(5)}
    places = [windows[view.contiguous().numpy().tobytes()] for view in views(PadCrop(2), picture, 2500)]
    counts = np.array([places.count((y, x)) for y in range(5) for x in range(5)])
    assert counts.sum() == 2500 and counts.min() > 60 and counts.max() < 150  # 100 expected, standard deviation 10


def test_pad_crop_that_does_not_fit():
    with pytest.raises(ValueError, match="a crop of 20 x 20 does not fit into 12 x 10 padded by 2"):
        PadCrop(2, size=20)(image(), ViewRng(0, 0, 0, 0))


def test_flip_by_chance():
    picture = image()
    flipped = [torch.equal(view, picture.flip(2)) for view in views(Flip(0.25), picture, 2000)]
    assert all(f or torch.equal(v, picture) for f, v in zip(flipped, views(Flip(0.25), picture, 2000), strict=True))
    assert 0.21 < np.mean(flipped) < 0.29
    assert torch.equal(Flip(1.0)(picture, ViewRng(0, 0, 0, 0)), picture.flip(2))
    assert torch.equal(Flip(0.0)(picture, ViewRng(0, 0, 0, 0)), picture)


def test_alternating_flip_shows_both_in_every_epoch_and_changes_the_order():
    picture, flip = image(), Flip(alternate=True)

    def flipped(epoch, sample, use, seed=0):
        return torch.equal(flip(picture, ViewRng(seed, epoch, sample, use)), picture.flip(2))

    for sample in range(50):
        for epoch in range(4):
            assert flipped(epoch, sample, 0) != flipped(epoch, sample, 1)
            assert flipped(epoch, sample, 0) != flipped(epoch + 1, sample, 0)
    assert 0.3 < np.mean([flipped(0, sample, 0) for sample in range(200)]) < 0.7
    assert [flipped(0, s, 0) for s in range(50)] != [flipped(0, s, 0, seed=1) for s in range(50)]


def test_cutout_fills_one_square_around_any_pixel():
    picture = torch.full((1, 9, 9), 200, dtype=torch.uint8)
    holes = [(view == 7) for view in views(Cutout(3, fill=7), picture)]
    assert {int(hole.sum()) for hole in holes} == {4, 6, 9}  # in corners, on edges, inside
    for hole in holes[:50]:
        rows, columns = hole[0].any(1), hole[0].any(0)
        assert torch.equal(hole[0], rows[:, None] & columns[None])
    assert torch.stack(holes).any(0).all()


def test_random_resized_crop_draws_like_torchvision():
    crop = RandomResizedCrop(8)
    height, width = 60, 80
    boxes = [crop.box(height, width, ViewRng(0, 0, i, 0)) for i in range(3000)]
    areas, aspects = [], []
    for top, left, h, w in boxes:
        assert 0 <= top <= height - h and 0 <= left <= width - w and h >= 1 and w >= 1
        areas.append(h * w / (height * width))
        aspects.append(w / h)
    assert min(areas) > 0.06 and max(areas) <= 1 and min(aspects) > 0.70 and max(aspects) < 1.42
    assert 0.42 < np.mean(areas) < 0.54  # uniform in (0.08, 1), a little less where wide crops do not fit
    assert all(view.shape == (3, 8, 8) for view in views(crop, image(), 20))


def test_random_resized_crop_falls_back_to_the_middle_and_takes_a_fixed_share_of_draws():
    wide = RandomResizedCrop(8, scale=(1.0, 1.0))
    rng = ViewRng(0, 0, 0, 0)
    assert wide.box(10, 100, rng) == (0, 43, 10, 13) and rng.counter == 22
    assert wide.box(100, 10, ViewRng(0, 0, 0, 0)) == (43, 0, 13, 10)
    rng = ViewRng(0, 0, 0, 0)
    RandomResizedCrop(8).box(60, 80, rng)
    assert rng.counter == 22


def test_resize_equals_pillow():
    Image = pytest.importorskip("PIL.Image")
    smooth = (torch.linspace(0, 255, 50)[:, None, None] * torch.linspace(0.2, 1, 40)[None, :, None]).expand(50, 40, 3)
    picture = smooth.round().to(torch.uint8).permute(2, 0, 1)
    for size in ((25, 20), (17, 31), (80, 70)):
        pillow = np.asarray(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(size[::-1], Image.BILINEAR))
        difference = resize(picture, size).permute(1, 2, 0).numpy().astype(int) - pillow
        assert np.abs(difference).max() <= 1 and np.abs(difference).mean() < 0.1


def test_resize_keeps_the_aspect_of_the_shorter_side():
    assert Resize(6)(image(3, 12, 18)).shape == (3, 6, 9)
    assert Resize(6)(image(3, 18, 12)).shape == (3, 9, 6)
    assert Resize((5, 7))(image()).shape == (3, 5, 7)


def test_center_crop():
    picture = image(1, 9, 7)
    assert torch.equal(CenterCrop(5)(picture), picture[:, 2:7, 1:6])
    padded = CenterCrop(11)(picture)
    assert padded.shape == (1, 11, 11) and torch.equal(padded[:, 1:10, 2:9], picture)
    assert int(padded.to(torch.int64).sum()) == int(picture.to(torch.int64).sum())


def test_recipes():
    assert eval_transform(8)(image(3, 30, 50), None).shape == (3, 8, 8)
    assert train_transform("small", 12)(image(3, 12, 12), ViewRng(0, 0, 0, 0)).shape == (3, 12, 12)
    assert train_transform("imagenet", 6)(image(3, 30, 50), ViewRng(0, 0, 0, 0)).shape == (3, 6, 6)
    with pytest.raises(ValueError, match='must be "small" or "imagenet"'):
        train_transform("cifar", 32)


def test_views_do_not_depend_on_global_generators():
    transform, picture = Compose([PadCrop(4), Flip(), Cutout(3)]), image()
    torch.manual_seed(0)
    first = transform(picture, ViewRng(1, 2, 3, 1))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, transform(picture, ViewRng(1, 2, 3, 1)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: PadCrop(-1), ValueError, "padding must be at least 0"),
        (lambda: PadCrop(1.5), TypeError, "padding must be an integer"),
        (lambda: Flip(1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: Flip(0.3, alternate=True), ValueError, "p must be 0.5, got 0.3"),
        (lambda: Cutout(0), ValueError, "size must be at least 1"),
        (lambda: Cutout(3, fill=300), ValueError, r"fill must be in \[0, 255\], got 300"),
        (lambda: Cutout(3, fill=[]), ValueError, r"fill must be in \[0, 255\], got \[\]"),
        (lambda: Cutout(3, fill=-1), ValueError, "Cutout: fill must be at least 0, got -1"),
        (lambda: Cutout(3, fill=0.5), TypeError, "Cutout: fill must be an integer, got 0.5"),
        (lambda: views(Cutout(3, fill=[1, 2]), image(3), 1), ValueError, r"each of the 3 channels, got \[1, 2\]"),
        (
            lambda: Cutout(3, fill=[1, 2, 3]).batch(image(1)[None], ViewRngs(0, 0, np.arange(1), 0)),
            ValueError,
            "fill: expected one grey value or one for each of the 1 channels",
        ),
        (lambda: RandomResizedCrop(8, scale=(0.0, 1.0)), ValueError, "scale must be 0 < low <= high"),
        (lambda: RandomResizedCrop(8, ratio=(2, 1)), ValueError, "ratio must be 0 < low <= high"),
        (lambda: Resize((1, 2, 3)), ValueError, r"must be an int or \(height, width\)"),
        (lambda: Compose([3]), TypeError, "expected callables"),
    ],
)
def test_bad_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()


# RandAugment


def test_rand_augment_is_pillows_operation_at_the_magnitude_of_its_level():
    Image, Ops = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    picture = image(3, 40, 31)
    pillow = Image.fromarray(picture.permute(1, 2, 0).numpy())
    sheared = pillow.transform(pillow.size, Image.AFFINE, (1, 0, 0, -0.3, 1, 0), Image.NEAREST)
    names = list(operations())
    found = {}
    for sample in range(200):
        rng = ViewRng(0, 0, sample, 0)
        chosen, negative = names[rng.integer(len(names))], rng.integer(2)
        found[chosen, bool(negative)] = RandAugment(1, 30)(picture, ViewRng(0, 0, sample, 0)).permute(1, 2, 0).numpy()
    for key, expected in {
        ("shear_y", True): sheared,
        ("rotate", False): pillow.rotate(30),
        ("posterize", True): Ops.posterize(pillow, 4),
        ("solarize", False): Ops.solarize(pillow, 0),
    }.items():
        assert np.array_equal(found[key], np.asarray(expected)), key


def test_rand_augment_draws_every_operation_and_a_fixed_share_of_numbers():
    picture = image(3, 16, 16)
    seen = {view.numpy().tobytes() for view in views(RandAugment(1, 12), picture, 300)}
    assert 20 <= len(seen) <= 23  # five unsigned operations, nine with two signs (a flat histogram may stay as it is)
    rng = ViewRng(0, 0, 0, 0)
    RandAugment(3)(picture, rng)
    assert rng.counter == 6
    assert torch.equal(RandAugment(0)(picture, ViewRng(0, 0, 0, 0)), picture)
    assert all(view.shape == (1, 8, 8) for view in views(RandAugment(2, 30), image(1, 8, 8), 50))
    with pytest.raises(ValueError, match="magnitude must be at most 30, got 31"):
        RandAugment(magnitude=31)
    with pytest.raises(ValueError, match="must have 1 or 3 channels, got 4"):
        RandAugment()(image(4), ViewRng(0, 0, 0, 0))
