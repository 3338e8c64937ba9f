"""Images as users hold them: NumPy arrays, OpenCV's and Pillow's of every mode, and items that are not a pair."""

from __future__ import annotations

import io
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from loader_files import loader
from PIL import Image

from dlb_fast.data import EvalLoader, MapDataset, ResidentLoader, SampleError, load_into_memory
from dlb_fast.data.datasets.source import as_image
from dlb_fast.data.decode.decode import ImageDecoder, is_pillow

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 3, 9, 7), dtype=np.uint8)


class Held:
    """Images and targets in memory, and nothing else."""

    def __init__(self, images):
        self.images, self.targets = images, [i % 3 for i in range(len(images))]

    def __len__(self):
        return len(self.images)


def first_of_every_loader(images):
    data, options = Held(images), {"shuffle": False, "dtype": torch.uint8}
    with loader(data, 8, transform=None, **options) as source:
        yield next(iter(source)).images
    yield next(iter(ResidentLoader(data, 8, **options))).images
    yield next(iter(EvalLoader(data, 4, dtype=torch.uint8))).images
    yield next(iter(EvalLoader(data, 4, transform=lambda image, rng: image, dtype=torch.uint8))).images


def frozen(images):
    images = images.copy()
    images.flags.writeable = False
    return images


@pytest.mark.parametrize("kind", ["tensor", "array", "read-only array", "mirrored array"])
def test_images_in_memory_are_n_c_h_w_whatever_holds_them(kind):
    images = {
        "tensor": torch.from_numpy(PIXELS),
        "array": PIXELS,
        "read-only array": frozen(PIXELS),
        "mirrored array": PIXELS[:, ::-1, :, ::-1],
    }[kind]
    if kind in ("tensor", "array"):
        got = list(first_of_every_loader(images))
    else:  # torch cannot hold the whole of it without a copy; sample by sample it can
        with loader(Held(images), 8, transform=None, shuffle=False, dtype=torch.uint8) as source:
            got = [next(iter(source)).images]
    for batch in got:
        assert batch.shape == (4, 3, 9, 7)
        assert np.array_equal(batch.numpy(), np.asarray(images[:4]))


def test_a_mirrored_view_of_an_array_is_an_image():
    bgr = PIXELS[0].transpose(1, 2, 0)
    with loader([0] * 8, 4, transform=None, dtype=torch.uint8, load=lambda d, i: (bgr[:, :, ::-1], 0)) as source:
        assert np.array_equal(next(iter(source)).images[0].permute(1, 2, 0), bgr[:, :, ::-1])


COLOURS = Image.fromarray(PIXELS[0].transpose(1, 2, 0))
SIXTEEN = Image.fromarray((np.arange(63, dtype=np.uint16) * 1000).reshape(9, 7))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "I;16"])
def test_a_pil_image_is_what_the_decoder_makes_of_its_file(mode):
    image = SIXTEEN if mode == "I;16" else COLOURS.convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    decoded = torch.from_numpy(ImageDecoder()(file.getvalue())).permute(2, 0, 1)
    got = as_image(image)
    assert got.dtype == torch.uint8 and got.shape[0] == (1 if mode in ("L", "LA", "1", "I;16") else 3)
    assert torch.equal(got.expand(3, -1, -1), decoded)


def test_nothing_is_a_pil_image_while_another_thread_imports_pillow(monkeypatch):
    """`sys.modules` holds the module before its classes exist; a good image was then taken for a damaged one."""
    monkeypatch.setitem(sys.modules, "PIL.Image", types.ModuleType("PIL.Image"))
    assert not is_pillow(PIXELS[0])


def test_a_transparent_palette_image_is_rgb():
    image = COLOURS.quantize(8)
    image.info["transparency"] = 0
    assert torch.equal(as_image(image), as_image(image.convert("RGBA").convert("RGB")))


def test_pixels_without_a_known_range_are_refused():
    with pytest.raises(ValueError, match="image of mode F with 32-bit pixels"):
        as_image(COLOURS.convert("F"))
    for odd in (np.zeros((4, 4), np.uint16), np.zeros((4, 4), bool), torch.zeros(1, 4, 4, dtype=torch.int64)):
        with pytest.raises(TypeError, match="must be uint8 or floating, got torch"):
            as_image(odd)
    with pytest.raises(TypeError, match=r"must be a tensor \(c, h, w\), an array .* got NoneType"):
        as_image(None)


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ({"image": 1, "label": 2}, r"got dict with the keys 'image', 'label'; pass load=lambda dataset, i: \(image"),
        ((PIXELS[0], 1, 2), "got tuple of 3; pass load="),
        (None, "got NoneType; pass load="),
        ((PIXELS[0], np.array([0.1, 0.9])), r"got the target ndarray of shape \(2,\).*soft targets"),
        ((PIXELS[0], torch.tensor([0.1, 0.9])), r"got the target Tensor of shape \(2,\).*soft targets"),
        ((PIXELS[0], "cat"), "got the target 'cat'; number the class names"),
    ],
)
def test_an_item_that_is_not_a_pair_is_described(item, match):
    with (
        loader([0] * 8, 4, transform=None, load=lambda d, i: item) as source,
        pytest.raises(SampleError, match=r"expected a pair \(image, class index\).*" + match) as caught,
    ):
        next(iter(source))
    assert "Repair or remove the file" not in str(caught.value)
    with pytest.raises(TypeError, match=match):
        MapDataset([0], lambda d, i: item)[0]
    with pytest.raises(TypeError, match=match):
        _ = MapDataset([0], lambda d, i: item).targets


def test_an_unreadable_sample_asks_for_the_file_only_where_there_is_one():
    of_file, of_none = SampleError("a/b.jpg", 17, 3, "empty file"), SampleError("sample 17", 17, 3, "KeyError: 2")
    assert "Repair or remove the file (`dlb-fast verify-data`" in str(of_file)
    assert str(of_none).endswith("Check what the dataset or `load` returns for it.")
    assert str(pickle.loads(pickle.dumps(of_none))) == str(of_none)


class Pictures:
    """PIL images with targets, as torchvision's datasets give them without a transform."""

    targets, classes = (0, 1, 0), ("a", "b")

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return COLOURS, self.targets[index]


def test_pil_images_are_loaded_into_memory():
    loaded = load_into_memory(Pictures())
    assert np.array_equal(loaded.images[1], PIXELS[0]) and loaded.targets.tolist() == [0, 1, 0]


def test_targets_of_a_map_dataset_are_not_rounded():
    rounded = MapDataset([(COLOURS, 0.9)])
    for read in (lambda: rounded[0], lambda: rounded.targets):
        with pytest.raises(TypeError, match="MapDataset: a target must be an integer class label, got 0.9"):
            read()
    with pytest.raises(TypeError, match="MapDataset: targets must be integer class labels, got float64"):
        MapDataset([(COLOURS, 0)], targets=[0.5]).targets  # noqa: B018
