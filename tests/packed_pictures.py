"""Pictures of class folders, packed into each of the other forms that are read."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq


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


def parquet_tables(folder, target, count=2, classes=None):
    """The Hub's: a struct of bytes and path, and the classes' names among the metadata."""
    classes = classes or sorted({name for name, _ in pictures_in(folder)})
    pictures = pictures_in(folder)
    share = -(-len(pictures) // count)
    for number in range(count):
        own = pictures[number * share : (number + 1) * share]
        table = pa.table(
            {
                "image": [{"bytes": path.read_bytes(), "path": path.name} for _, path in own],
                "label": [classes.index(name) for name, _ in own],
            }
        )
        names = {"names": classes, "_type": "ClassLabel"}
        said = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(said)})
        name = f"train-{number:05}-of-{count:05}.parquet"
        pq.write_table(table, target / name, row_group_size=4)
    return target


def arrow_table(folder, target):
    """As `datasets` saves it to the disk: a stream; here with plain bytes and other columns."""
    (target / "parquet").mkdir()
    table = pq.read_table(parquet_tables(folder, target / "parquet", count=1))
    plain = pa.array([cell["bytes"].as_py() for cell in table["image"]], pa.binary())
    table = table.set_column(0, "image", plain).append_column("width", table["label"])
    with pa.ipc.new_stream(target / "data.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return target / "data.arrow"


SOURCES = {
    "parquet": parquet_tables,
    "arrow": arrow_table,
    "tar of folders": tar_of_folders,
    "tar of tars": tar_of_tars,
    "tar shards": tar_shards,
}
