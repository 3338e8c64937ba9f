"""A small folder of images to try the other examples with: python digits_folder.py FOLDER [IMAGES]

Writes scikit-learn's handwritten digits, 8 x 8 pixels, as FOLDER/train/CLASS/NUMBER.png and FOLDER/val/...
"""

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def main(folder: str, images: str = "1797") -> None:
    digits = load_digits()
    for number in range(int(images)):
        split = "val" if number % 5 == 0 else "train"
        path = Path(folder, split, f"digit_{digits.target[number]}", f"{number:04d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15.9).astype("uint8")).convert("RGB").save(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
