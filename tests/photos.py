"""Folders of generated photos."""

from benchmarks.photos import encoded, photo

__all__ = ["encoded", "photo", "write_photos"]


def write_photos(root, splits=("train", "test"), classes=("ant", "bee"), count=8, size=(60, 45), extension="jpg"):
    """ROOT/<split>/<class>/<number>.jpg, all different, of alternating orientation."""
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                width, height = size if number % 2 else size[::-1]
                image = photo(width, height, seed=10_000 * s + 100 * c + number)
                (folder / f"{number}.{extension}").write_bytes(encoded(image, quality=92))
    return root
