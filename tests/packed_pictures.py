"""Pictures of class folders, packed into each of the other forms that are read."""

import io
import json
import tarfile


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def pictures_in(folder):
    """(class, path) of each picture, class by class."""
    places = sorted(place for place in folder.iterdir() if place.is_dir())
    return [(place.name, path) for place in places for path in sorted(place.iterdir())]


def tar_of_folders(folder, target, prefix="./photos/"):
    """A tar of class folders, in reverse order."""
    with tarfile.open(target / "photos.tar", "w") as archive:
        for name, path in reversed(pictures_in(folder)):
            add(archive, f"{prefix}{name}/{path.name}", path.read_bytes())
        add(archive, f"{prefix}README", b"of photographs")
        add(archive, f"{prefix}._README.png", b"hidden")
    return target / "photos.tar"


def tar_of_tars(folder, target):
    """As ILSVRC2012_img_train.tar is: a tar of a tar for each class."""
    with tarfile.open(target / "train.tar", "w", format=tarfile.GNU_FORMAT) as outer:
        for name in sorted({name for name, _ in pictures_in(folder)}):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for path in (path for of, path in pictures_in(folder) if of == name):
                    add(archive, path.name, path.read_bytes())
            add(outer, f"{name}.tar", inner.getvalue())
    return target / "train.tar"


def tar_shards(folder, target, count=3):
    """WebDataset's: pictures dealt out to shards, labels in .cls or in .json."""
    classes = sorted({name for name, _ in pictures_in(folder)})
    for number in range(count):
        with tarfile.open(target / f"photos-{number:04}.tar", "w") as archive:
            for name, path in pictures_in(folder)[number::count]:
                label, key = classes.index(name), f"{name}_{path.stem}"
                add(archive, f"{key}{path.suffix}", path.read_bytes())
                if number % 2:
                    add(archive, f"{key}.json", json.dumps({"label": label}).encode())
                else:
                    add(archive, f"{key}.cls", str(label).encode())
    return target


SOURCES = {"tar of folders": tar_of_folders, "tar of tars": tar_of_tars, "tar shards": tar_shards}
