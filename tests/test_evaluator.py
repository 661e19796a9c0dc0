"""The evaluator scores each file once, with the numbers of plain numpy, whatever it is given."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import standins
from PIL import ExifTags, Image
from plain_scores import (
    plain_frechet,
    plain_inception_score,
    plain_kernel_distance,
    plain_precision_recall,
)
from toy_graph import write_toy_graph

import evaluator
from support.data.images import LabelledImages, centre_crop
from support.scores import graph as feature_graph
from support.scores import image_sets, references, scoring
from support.scores.graph import BACKENDS
from support.scores.npz import read_archive
from support.system.files import UserError, sha256_of

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["IS", "FD", "sFD", "KD", "prec", "recall"]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return write_toy_graph(tmp_path_factory.mktemp("graph") / "toy.pb")


@pytest.fixture(scope="session")
def other_toy(tmp_path_factory):
    return write_toy_graph(tmp_path_factory.mktemp("graph") / "other.pb", features=8, seed=1)


def some_pixels(seed, count=60, size=8, channels=3):
    random_state = np.random.RandomState(seed)
    contrast = random_state.uniform(20, 60, (count, 1, 1, 1))
    pixels = random_state.normal(110 + seed, contrast, (count, size, size, channels))
    return pixels.clip(0, 255).astype(np.uint8)


class Place:
    """A reference and a folder of samples, and the command that scores them."""

    def __init__(self, folder: Path, graph: Path):
        self.folder, self.graph = folder, graph
        self.reference, self.samples = folder / "ref.npz", folder / "samples"
        self.samples.mkdir()
        np.savez(self.reference, some_pixels(0, 70))

    def add(self, name="a.npz", seed=1, **shape):
        np.savez(open(self.samples / name, "wb"), some_pixels(seed, **shape))  # noqa: SIM115
        return self.samples / name

    def arguments(self, *more):
        flags = ["--ref_batch", self.reference, "--sample_batch_dir", self.samples]
        return list(map(str, [*flags, "--inception", self.graph, *more]))

    def run(self, *more):
        return evaluator.main(self.arguments(*more))

    def score(self, *more):
        """The record of the last file that the command scores."""
        assert self.run(*more) == 0
        return self.records[-1]

    def refusal(self, *more):
        """The one line with which the command is refused."""
        with pytest.raises(UserError) as caught:
            self.run(*more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @property
    def text(self):
        return (self.samples / "eval_results.txt").read_text()

    @property
    def names(self):
        return [line.split(" # ")[0] for line in self.text.splitlines()]

    @property
    def records(self):
        lines = (self.samples / "eval_results.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def caches(self):
        return sorted(self.folder.glob("*.cache"))


def printed_table(output):
    """The rows of the table that ends a command's output, by file and column; and its remarks."""
    header, *lines = output[output.rindex("\nfile ") + 1 :].splitlines()
    columns = header.split()[1:]
    split = [line.rsplit(None, len(columns)) for line in lines if ": " not in line]
    rows = {name: dict(zip(columns, cells, strict=True)) for name, *cells in split}
    return rows, [line for line in lines if ": " in line]


@pytest.fixture
def place(tmp_path, toy):
    return Place(tmp_path, toy)


@pytest.fixture
def through_measure(monkeypatch):
    """Has `measure` return what `change` makes of it; `change` is set by the test."""
    real, changes = references.measure, []

    def measure(images, *rest):
        measured = real(images, *rest)
        for change in changes:
            measured = change(images, measured) or measured
        return measured

    monkeypatch.setattr(references, "measure", measure)
    monkeypatch.setattr(scoring, "measure", measure)
    return changes.append


@pytest.fixture
def measured_names(through_measure):
    """Names of the image sets that went through the graph."""
    names = []
    through_measure(lambda images, measured: names.append(Path(images.name).name))
    return names


def plain_features(graph: Path, pixels):
    """Pool and spatial features and class weights by the graph as it stands, image by image."""
    import tensorflow as tf

    graph_def = tf.compat.v1.GraphDef.FromString(graph.read_bytes())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(graph_def, name="")
        weights = session.graph.get_operation_by_name("softmax/logits/MatMul").inputs[1]
        pools, spatials = [], []
        for image in pixels:
            feed = {"ExpandDims:0": image[None].astype(np.float32)}
            pool, spatial = session.run(["pool_3:0", "mixed_6/conv:0"], feed)
            pools.append(pool.ravel())
            spatials.append(spatial[0, :, :, :7].ravel())
        return np.stack(pools), np.stack(spatials), session.run(weights)


def statistics_of(pools, spatials):
    """The arrays of a reference file."""
    arrays = {"mu": pools.mean(axis=0), "sigma": np.cov(pools, rowvar=False)}
    return arrays | {"mu_s": spatials.mean(axis=0), "sigma_s": np.cov(spatials, rowvar=False)}


# The numbers.


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_those_of_plain_numpy(place, toy, backend):
    samples, reference = some_pixels(1, 400), some_pixels(0, 300)
    np.savez(place.reference, reference)
    np.savez(place.samples / "a.npz", samples)
    record = place.score("--backend", backend)
    scores = record["scores"]
    pools, spatials, weights = plain_features(toy, samples)
    reference_pools, reference_spatials, _ = plain_features(toy, reference)
    p = np.exp(pools.astype(float) @ weights)
    p /= p.sum(axis=1, keepdims=True)
    assert list(scores) == COLUMNS
    assert scores["IS"] == pytest.approx(plain_inception_score(p, 5000), rel=1e-4)
    assert scores["FD"] == pytest.approx(plain_frechet(pools, reference_pools), rel=1e-4)
    assert scores["sFD"] == pytest.approx(plain_frechet(spatials, reference_spatials), rel=1e-4)
    assert scores["KD"] == pytest.approx(plain_kernel_distance(pools, reference_pools), rel=1e-3)
    expected = plain_precision_recall(pools.astype(float), reference_pools.astype(float))
    assert (scores["prec"], scores["recall"]) == pytest.approx(expected, abs=0.002)
    assert 0 < scores["prec"] < 1
    assert record["backend"] == backend
    assert backend in record["versions"]


def test_line_and_record_say_what_the_scores_are_and_what_made_them(place, toy):
    path = place.add()
    record = place.score()
    adms = [column for column in COLUMNS if column != "KD"]
    scores = ", ".join(f"{column}: {record['scores'][column]!r}" for column in adms)
    assert place.text == f"a.npz # {scores}\n"
    assert (record["num_images"], record["image_shape"]) == (60, [8, 8, 3])
    assert record["sha256"] == sha256_of(path)
    assert record["reference"]["sha256"] == sha256_of(place.reference)
    assert record["graph"] == {"name": "toy.pb", "sha256": sha256_of(toy), "widths": [16, 112, 10]}
    assert set(record["versions"]) == {"soflow", "tensorflow", "numpy", "python"}
    assert record["seconds"] > 0


@pytest.mark.parametrize(
    ("counts", "size", "said"),
    [
        ((60, 70), 8, ["60 images", "113", "70 images", "113"]),
        ((10_000, 10_000), 4, ["50,000", "50,000"]),
    ],
)
def test_few_images_are_said_on_screen_and_in_the_record(place, capsys, counts, size, said):
    place.add(count=counts[0], size=size)
    np.savez(place.reference, some_pixels(0, counts[1], size))
    notes = place.score()["notes"]
    assert [word in note for word, note in zip(said, notes, strict=True)] == [True] * len(said)
    printed = capsys.readouterr().out
    assert all(note in printed for note in notes)
    rows, remarks = printed_table(printed)
    assert rows["a.npz"]["images"] == str(counts[0])
    is_few = counts[0] < 10_000
    assert [remark.endswith(": a.npz") for remark in remarks] == [True] * is_few


@pytest.mark.parametrize("count", [5000, 5001])
def test_samples_sorted_by_class_are_noted_where_it_changes_the_inception_score(place, count):
    labels = np.arange(count) // 1000
    for name, order in (("sorted", labels), ("mixed", labels[::-1]), ("other", labels[:3])):
        np.savez(place.samples / f"{name}.npz", some_pixels(1, count, 2), order)
    np.savez(place.reference, some_pixels(0, 70, 2))
    place.run()
    noted = [record["file"] for record in place.records if "by class" in str(record["notes"])]
    assert noted == ["sorted.npz"] * (count > 5000)


def test_intervals_come_from_the_bootstrap_and_features_are_kept_for_them(
    place, measured_names, capsys
):
    place.add()
    plain = place.score()
    assert "intervals" not in plain
    record = place.score("--bootstrap", 20)  # scored again, for the intervals
    assert record["scores"] == plain["scores"]
    assert record["bootstrap"] == 20
    assert 0 < record["intervals"]["FD"] < record["scores"]["FD"]
    assert record["intervals"]["KD"] > 0
    assert place.run("--bootstrap", 20) == 0  # it has them
    place.score("--bootstrap", 21)
    assert measured_names == ["ref.npz", "a.npz", "a.npz"]
    rows, _ = printed_table(capsys.readouterr().out)
    assert float(rows["a.npz"]["FD"].split("±")[1]) > 0
    assert place.run("--bootstrap", 22, "--delete_evaluated") == 0
    assert not list(place.samples.glob("a.npz*"))


def test_files_that_differ_in_seed_alone_have_their_mean_and_deviation_in_the_table(place, capsys):
    for seed in (1, 2, 3):
        place.add(f"10_1NFE_{seed}.npz", seed)
    place.add("10_2NFE_1.npz", 4)
    place.add("10_1NFE_4.npz", 4)
    (place.samples / "10_1NFE_4.json").write_text('{"num_images": 60, "labels": "7"}')
    place.run()
    rows, _ = printed_table(capsys.readouterr().out)
    (group,) = [name for name in rows if not name.endswith(".npz")]
    values = [record["scores"]["FD"] for record in place.records if record["NFE"] == 1][:3]
    assert "3 seeds" in group
    mean, deviation = map(float, rows[group]["FD"].split("±"))
    assert mean == pytest.approx(np.mean(values), abs=deviation / 10)
    assert deviation == pytest.approx(np.std(values, ddof=1), rel=0.05)


def test_files_are_said_to_differ_only_beyond_their_intervals(place, capsys):
    place.add("a.npz", 1)
    place.add("b.npz", 1)
    place.add("c.npz", 9)
    place.run("--bootstrap", 20)
    _, remarks = printed_table(capsys.readouterr().out)
    shown = [line for line in remarks if "a.npz" in line.split(": ")[0]]
    assert [line.split(": ")[1] for line in shown] == ["b.npz", "b.npz"]


def test_table_tells_images_step_and_nfe_by_the_record_beside_or_else_by_the_name(place, capsys):
    records = {
        "1000_2NFE_42": (None, "1000", "2"),
        "2000": (None, "2000", "-"),
        "best": ({"num_images": 60, "NFE": 4, "checkpoint": "/a/ckpts/3000.pt"}, "3000", "4"),
        "4000": ({"num_images": 60, "NFE": 1, "finished_steps": 4000, "seed": 3}, "4000", "1"),
        # of another archive
        "5000_1NFE_0": ({"num_images": 50, "NFE": 8, "finished_steps": 7}, "5000", "1"),
        "odd": ({"num_images": 60, "NFE": "x", "finished_steps": True, "checkpoint": []}, "-", "-"),
        "torn": ("{", "-", "-"),
        "list": ([1], "-", "-"),
    }
    for name, (record, _, _) in records.items():
        place.add(f"{name}.npz")
        if record is not None:
            text = record if isinstance(record, str) else json.dumps(record)
            (place.samples / f"{name}.json").write_text(text)
    assert place.run() == 0
    rows, _ = printed_table(capsys.readouterr().out)
    origins = {name: (row["images"], row["step"], row["NFE"]) for name, row in rows.items()}
    assert origins == {f"{name}.npz": ("60", *told) for name, (_, *told) in records.items()}
    steps = {record["file"]: (record["step"], record["NFE"]) for record in place.records}
    assert (steps["best.npz"], steps["odd.npz"]) == ((3000, 4), (None, None))


def test_float16_distances_are_said_everywhere_and_a_file_is_scored_again_by_them(
    place, measured_names, capsys
):
    place.add(count=300)
    exact = place.score()
    assert printed_table(capsys.readouterr().out)[0]["a.npz"]["distances"] == "exact"
    float16 = place.score("--distances", "float16")
    assert measured_names == ["ref.npz", "a.npz", "a.npz"]  # its features do not depend on it
    assert printed_table(capsys.readouterr().out)[0]["a.npz"]["distances"] == "float16"
    assert [exact["distances"], float16["distances"]] == ["exact", "float16"]
    same = {column: exact["scores"][column] for column in COLUMNS[:3]}
    assert float16["scores"].items() >= same.items()
    place.score("--distances", "float16")
    assert len(measured_names) == 3
    assert place.score()["scores"] == exact["scores"]
    with read_archive(place.caches[0]) as cache:
        assert {"squared_radii_exact", "squared_radii_float16"} < {*cache.names}


def test_overflow_of_float16_is_said_and_not_kept(place, through_measure):
    through_measure(lambda images, measured: measured._replace(features=measured.features * 1000))
    place.add()
    notes = [note for note in place.score("--distances", "float16")["notes"] if "overflow" in note]
    assert [note.split(" images")[0] for note in notes] == ["samples: 60", "reference: 70"]
    assert place.caches == []
    assert "overflow" not in str(place.score()["notes"])


def test_distances_are_called_fid_only_with_the_inception_graph(place, monkeypatch, capsys):
    place.add("a.npz")
    place.run()
    monkeypatch.setattr(feature_graph, "INCEPTION_WIDTHS", (16, 112, 10))
    place.add("b.npz")
    place.run()
    monkeypatch.setattr(feature_graph, "INCEPTION_BYTES", range(20_000))
    place.add("c.npz")
    capsys.readouterr()
    place.run()
    assert [[*record["scores"]][1:3] for record in place.records] == [
        *[["FD", "sFD"]] * 2,
        ["FID", "sFID"],
    ]
    rows, remarks = printed_table(capsys.readouterr().out)
    columns = ["images", "step", "NFE", "IS", "FID", "sFID", "FD", "sFD", "KID", "KD"]
    columns += ["prec", "recall"]
    assert list(rows["a.npz"]) == [*columns, "distances"]
    assert [row["FID"] == "-" for row in rows.values()] == [True, True, False]
    assert "FID, sFID, FD, sFD" in remarks[0]


def test_neither_batch_size_nor_repeating_grey_as_rgb_changes_the_scores(place):
    grey = some_pixels(1, channels=1)
    np.savez(place.samples / "a.npz", grey)
    first = place.score("--batch_size", "7")
    place.caches[0].unlink()
    np.savez(place.samples / "b.npz", grey.repeat(3, axis=3))
    last = place.score()
    assert first["scores"] == pytest.approx(last["scores"], rel=1e-4)
    assert len(place.records) == 2


def test_graph_of_2015_with_its_old_operations_is_run(place, tmp_path):
    old = write_toy_graph(tmp_path / "old.pb", of_2015=True)
    place.add()
    assert place.run("--inception", old) == 0


def test_a_folder_of_pictures_is_scored_as_one_set_and_the_record_says_so(place, measured_names):
    pixels = some_pixels(1)
    np.savez(place.samples / "a.npz", pixels)
    expected = place.score()["scores"]
    place.samples = place.folder / "pictures"
    place.samples.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(place.samples / f"{number:02}.png")
    record = place.score("--delete_evaluated")
    assert (record["file"], record["exif"], record["num_images"]) == ("pictures", "apply", 60)
    assert record["scores"] == pytest.approx(expected)
    place.run()
    assert measured_names.count("pictures") == 1
    (place.samples / "07.png").unlink()
    assert place.score()["num_images"] == 59


# Statistics in the reference.


@pytest.mark.parametrize("kept", [["mu", "sigma"], ["mu_s", "sigma_s"], None])
def test_statistics_in_the_reference_are_used_and_the_record_says_which(place, toy, kept):
    pools, spatials, _ = plain_features(toy, some_pixels(3, 200))
    own_pools, own_spatials, _ = plain_features(toy, some_pixels(0, 70))
    arrays = {**statistics_of(pools, spatials), "count": np.array(200)}
    arrays = {key: arrays[key] for key in (kept or arrays)}
    np.savez(place.reference, some_pixels(0, 70), **arrays)
    place.add(count=200)
    sample_pools, sample_spatials, _ = plain_features(toy, some_pixels(1, 200))
    record = place.score()
    for column, key, kind, of_samples, of_file, of_images in (
        ("FD", "mu", "pool", sample_pools, pools, own_pools),
        ("sFD", "mu_s", "spatial", sample_spatials, spatials, own_spatials),
    ):
        is_own = key in arrays
        expected = plain_frechet(of_samples, of_file if is_own else of_images)
        assert record["scores"][column] == pytest.approx(expected, rel=1e-4)
        source = {"origin": "file", "num_images": None if kept else 200}
        computed = {"origin": "images", "num_images": 70}
        assert record["reference"]["statistics"][kind] == (source if is_own else computed)
    assert record["notes"][-1].startswith("reference: ")


def test_a_reference_without_images_gives_what_needs_none(place, toy, capsys):
    place.add(count=200)
    expected = place.score()["scores"]
    arrays = statistics_of(*plain_features(toy, some_pixels(0, 70))[:2])
    for columns in (["FD", "sFD"], ["FD"]):
        keys = [*arrays][: 2 * len(columns)]
        np.savez(place.reference, **{key: arrays[key] for key in keys})
        record = place.score()
        assert list(record["scores"]) == ["IS", *columns]
        assert record["scores"]["FD"] == pytest.approx(expected["FD"], rel=1e-4)
        assert record["reference"]["num_images"] is None
        assert "prec" in str(record["notes"])
        assert "prec" not in printed_table(capsys.readouterr().out)[0]["a.npz"]
    place.add("b.npz", size=16)
    np.savez(place.reference, **arrays)
    assert place.run() == 1  # b is of another size than a


NEGATIVE = np.diag([*[1.0] * 15, -0.1])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(16)}, ["sigma"]),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, ["mu", "[16]", "[5]"]),
        ({"mu": np.zeros(16), "sigma": np.eye(5)}, ["sigma", "[16, 16]", "[5, 5]"]),
        ({"mu": np.zeros(16), "sigma": np.eye(16) * np.nan}, ["sigma: ", "finite"]),
        ({"mu": np.zeros(16), "sigma": np.triu(np.ones((16, 16)))}, ["sigma: ", "symmetric"]),
        ({"mu": np.zeros(16), "sigma": NEGATIVE}, ["sigma: ", "-0.1"]),
        ({"mu": np.zeros(16), "sigma": -np.eye(16)}, ["sigma: ", "-1"]),
        ({"mu_s": np.zeros(112), "sigma_s": -np.eye(112)}, ["sigma_s: ", "-1"]),
        ({"graph_sha256": np.array("0" * 64)}, ["another graph"]),
    ],
)
def test_statistics_that_do_not_fit_are_refused(place, arrays, words):
    place.add()
    np.savez(place.reference, some_pixels(0), **arrays)
    refusal = place.refusal()
    assert all(word in refusal for word in ["ref.npz", *words])


def test_rounding_of_a_covariance_is_no_reason_to_refuse_it(place, toy):
    pools, spatials, _ = plain_features(toy, some_pixels(0, 10))  # fewer than features
    arrays = {k: v.astype(np.float32) for k, v in statistics_of(pools, spatials).items()}
    np.savez(place.reference, some_pixels(0), **arrays)
    place.add()
    assert place.score()["scores"]["FD"] > 0


def test_keys_of_a_reference_that_mean_nothing_are_named(place, capsys):
    place.add()
    np.savez(place.reference, some_pixels(0), mean=np.zeros(16))
    place.run()
    assert f"{place.reference}: not used: mean\n" in capsys.readouterr().out
    np.savez(place.reference, mean=np.zeros(16), cov=np.eye(16))
    refusal = place.refusal()
    assert all(word in refusal for word in ("ref.npz", "arr_0", "mu", "sigma", "cov, mean"))


# Order, skipping, scoring again.


def test_files_are_scored_in_natural_order_whatever_their_names(place):
    names = [" lead.npz", ".npz", "2.npz", "10.npz", "a # IS: 3.npz", "a,b.npz", "ünï.npz"]
    for name in reversed(names):
        place.add(name)
    shutil.copy(place.samples / "2.npz", os.fsencode(place.samples) + b"/\xff.npz")
    (place.samples / "folder.npz").mkdir()
    (place.samples / "notes.txt").touch()
    assert place.run() == 0
    scored = [record["file"] for record in place.records]
    assert sorted(scored) == sorted([*names, "\udcff.npz"])
    assert scored.index("2.npz") < scored.index("10.npz")
    before = (place.samples / "eval_results.txt").read_bytes()
    assert before.count(b"\xff.npz # IS") == 1
    assert place.run() == 0
    assert (place.samples / "eval_results.txt").read_bytes() == before


def test_a_changed_file_is_scored_again_and_its_last_line_counts(place, capsys):
    place.add()
    place.run()
    place.add(seed=5)
    last = place.score()["scores"]
    assert place.names == ["a.npz", "a.npz"]
    assert place.records[0]["scores"] != last
    row = printed_table(capsys.readouterr().out)[0]["a.npz"]
    digits = {"KD": 6}
    assert [row[key] for key in COLUMNS] == [
        f"{last[key]:.{digits.get(key, 4)}f}" for key in COLUMNS
    ]


def test_another_reference_or_graph_scores_again_and_the_table_names_what_is_gone(
    place, other_toy, capsys
):
    place.add("a.npz")
    place.add("gone.npz")
    place.run()
    (place.samples / "gone.npz").unlink()
    place.run("--inception", other_toy)
    np.savez(place.reference, some_pixels(4))
    place.run("--inception", other_toy)
    assert printed_table(capsys.readouterr().out)[1][-1].endswith("graph: gone.npz")
    place.run("--inception", other_toy)
    assert place.names == ["a.npz", "gone.npz", "a.npz", "a.npz"]
    assert len(place.caches) == 2
    assert len({r["scores"]["FD"] for r in place.records if r["file"] == "a.npz"}) == 3


def test_delete_evaluated_deletes_what_it_scored_and_never_the_reference(place):
    place.add("a.npz")
    place.run()
    place.add("b.npz")
    os.link(place.reference, place.samples / "ref.npz")
    place.run("--delete_evaluated")
    assert sorted(path.name for path in place.samples.glob("*.npz")) == ["a.npz", "ref.npz"]
    assert place.names == ["a.npz", "b.npz", "ref.npz"]


def test_file_that_changes_while_it_is_scored_is_not_recorded(place, through_measure, capsys):
    path = place.add()
    through_measure(lambda images, _: images.name == str(path) and os.utime(path, (1, 1)))
    assert place.run() == 1
    assert "a.npz" in capsys.readouterr().err
    assert not (place.samples / "eval_results.jsonl").exists()


# The cache.


def test_everything_is_measured_once_and_the_reference_then_read_from_the_cache(
    place, measured_names, capsys
):
    place.add("1.npz")
    place.add("2.npz")
    for _ in range(2):
        scores = place.score()["scores"]
        assert measured_names == ["ref.npz", "1.npz", "2.npz"]
        assert place.names == ["1.npz", "2.npz"]
        assert list(printed_table(capsys.readouterr().out)[0]) == ["1.npz", "2.npz"]
    assert (place.samples / "1.npz").exists()
    for name in ("eval_results.jsonl", "eval_results.txt"):
        (place.samples / name).unlink()
    measured_names.clear()
    assert place.score()["scores"] == scores
    assert measured_names == ["1.npz", "2.npz"]
    assert len(place.caches) == 1


def test_changed_reference_is_noticed_though_size_and_time_are_the_same(place, measured_names):
    place.add()
    place.run()
    status = place.reference.stat()
    np.savez(place.reference, some_pixels(9, 70))
    os.utime(place.reference, ns=(status.st_atime_ns, status.st_mtime_ns))
    measured_names.clear()
    place.run()
    assert measured_names == ["ref.npz", "a.npz"]
    assert len(place.caches) == 1


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_cache_is_rebuilt(place, measured_names, damage, capsys):
    place.add()
    scores = place.score()["scores"]
    (cache,) = place.caches
    whole = cache.read_bytes()
    cache.write_bytes(whole[:9999] if damage == "cut" else place.reference.read_bytes())
    place.add()
    measured_names.clear()
    assert place.score()["scores"] == scores
    assert measured_names == ["ref.npz", "a.npz"]
    assert cache.name in capsys.readouterr().err
    assert len(cache.read_bytes()) == len(whole)


# Killed, interrupted, watching.


def run_in_process(place, *more, without="torch"):
    """The command in a process that cannot import one of the backends."""
    code = (
        f"import sys; sys.modules['{without}'] = None; import evaluator; "
        "sys.exit(evaluator.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *place.arguments(*more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_with_the_next_file_without_torch(place):
    expected = [f"{number}.npz" for number in range(12)]
    for name in expected:
        place.add(name, count=3000, size=16)
    np.savez(place.reference, some_pixels(0, 300, 16))
    process = run_in_process(place)
    records = place.samples / "eval_results.jsonl"
    while process.poll() is None and (not records.exists() or records.read_text().count("\n") < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    scored = records.read_text().count("\n")
    assert 2 <= scored < 12
    process = run_in_process(place)
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (0, b"")
    assert [record["file"] for record in place.records] == place.names == expected
    assert f"\n{scored}.npz # IS".encode() in output
    assert b"\n0.npz # IS" not in output


@pytest.mark.slow
def test_torch_scores_where_tensorflow_is_not_installed(place):
    place.add()
    process = run_in_process(place, without="tensorflow")
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (0, b"")
    assert place.records[0]["backend"] == "torch"
    assert b"torch" in output


@pytest.mark.parametrize("torn", [1, 30, 100])
def test_lines_torn_by_a_kill_are_passed_over_and_their_files_scored(place, torn):
    place.add("a.npz")
    place.add("b.npz")
    place.run()
    text, lines = place.samples / "eval_results.txt", place.samples / "eval_results.jsonl"
    whole_text, whole_records = text.read_bytes(), lines.read_bytes()
    # killed while the record of b was written
    text.write_bytes(whole_text[: whole_text.index(b"\n") + 1])
    lines.write_bytes(whole_records[: whole_records.index(b"\n") + 1 + torn])
    assert place.run() == 0
    assert place.names == ["a.npz", "b.npz"]
    # killed between the record of b and its line, or within the line
    for end in (0, torn):
        text.write_bytes(whole_text[: whole_text.index(b"\n") + 1 + end])
        lines.write_bytes(whole_records)
        assert place.run() == 0
        assert text.read_bytes().splitlines()[-1] == whole_text.splitlines()[-1]
        assert len(place.records) == 2


def test_watch_scores_what_appears_once_it_is_whole_and_tells_of_damage_once(
    place, monkeypatch, capsys
):
    place.add("1.npz")
    (place.samples / "bad.npz").write_bytes(b"half")
    steps = []

    def sleep(seconds):
        assert seconds == 7
        steps.append(place.names)
        if len(steps) == 1:
            (place.samples / "2.npz").write_bytes(b"half")
        elif len(steps) == 2:
            place.add("2.npz")  # changes during the wait: not touched yet
        elif len(steps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluator.time, "sleep", sleep)
    assert place.run("--watch", "7") == 1
    assert steps == [["1.npz"], ["1.npz"], ["1.npz"], ["1.npz", "2.npz"]]
    printed = capsys.readouterr()
    assert list(printed_table(printed.out)[0]) == ["1.npz", "2.npz"]
    assert printed.err.count("error:") == 1


# References of one's own.


def make_reference(place, source, *more):
    output = place.folder / "own.npz"
    flags = ["--write_ref", output, "--images", source, "--inception", place.graph, *more]
    assert evaluator.main(list(map(str, flags))) == 0
    with np.load(output) as archive:
        return dict(archive)


def write_pictures(folder: Path, pixels, **options):
    """Each image as a PNG: {number}.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png", **options)
    return folder


def test_own_reference_scores_like_its_images_and_may_keep_fewer_but_counts_all(
    place, toy, other_toy
):
    place.add()
    expected = place.score()["scores"]
    own = make_reference(place, place.reference)
    np.testing.assert_array_equal(own["arr_0"], some_pixels(0, 70))
    for name, values in statistics_of(*plain_features(toy, own["arr_0"])[:2]).items():
        np.testing.assert_allclose(own[name], values, rtol=1e-3, atol=1e-6)
    assert str(own["graph_sha256"]) == sha256_of(toy)
    assert int(own["count"]) == 70
    assert own["image_shape"].tolist() == [8, 8, 3]
    few = make_reference(place, place.reference, "--ref_images", 10)
    np.testing.assert_array_equal(few["arr_0"], some_pixels(0, 70)[::7])
    assert int(few["count"]) == 70
    np.testing.assert_array_equal(few["mu"], own["mu"])
    make_reference(place, place.reference)
    place.reference = place.folder / "own.npz"
    assert place.score()["scores"] == pytest.approx(expected, rel=1e-6)
    refusal = place.refusal("--inception", other_toy)
    assert all(word in refusal for word in ("own.npz", "toy.pb", "other.pb"))


def test_own_reference_from_pictures_of_classes_grey_ones_as_rgb(place):
    pixels, folder = some_pixels(2, 6), place.folder / "pictures"
    write_pictures(folder / "b", pixels[:2])
    write_pictures(folder / "a", pixels[2:4])
    write_pictures(folder, pixels[4:])
    Image.fromarray(pixels[5]).convert("L").save(folder / "1.png")
    own = make_reference(place, folder)["arr_0"]
    np.testing.assert_array_equal(own[[0, 2, 3, 4, 5]], pixels[[4, 2, 3, 0, 1]])
    assert (own[1][..., 0] == own[1][..., 1]).all()


def test_pictures_of_different_sizes_need_a_crop(place):
    folder = write_pictures(
        place.folder / "pictures",
        [some_pixels(i, 1, size)[0] for i, size in enumerate((8, 12, 20, 40))],
    )
    with pytest.raises(UserError, match=r"1\.png.*\[12, 12, 3\], 0\.png.*\[8, 8, 3\]"):
        make_reference(place, folder)
    own = make_reference(place, folder, "--image_size", 8)["arr_0"]
    np.testing.assert_array_equal(own[3], centre_crop(some_pixels(3, 1, 40)[0], 8))


def test_own_reference_turns_pictures_upright_unless_told_not_to_and_names_files_left_out(
    place, capsys
):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    folder = write_pictures(place.folder / "pictures", some_pixels(0, 4), exif=turned)
    (folder / "below").mkdir()
    for name in ("a.heic", "below/b.HEIC", "notes.txt"):
        (folder / name).touch()
    for flags, exif, step in (([], "apply", -1), (["--exif", "ignore"], "ignore", 1)):
        own = make_reference(place, folder, *flags)
        np.testing.assert_array_equal(own["arr_0"], some_pixels(0, 4)[:, ::step, ::step])
        assert str(own["exif"]) == exif
        assert "3 files (2 .heic, 1 .txt)\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"ref\.npz: --exif"):
        make_reference(place, place.reference, "--exif", "ignore")


@pytest.mark.parametrize("source", ["missing", "one/0.png", "empty", "one"])
def test_images_that_are_none_are_named(place, source):
    write_pictures(place.folder / "one", some_pixels(0, 1))
    (place.folder / "empty").mkdir()
    with pytest.raises(UserError, match=f"{place.folder / source}: "):
        make_reference(place, place.folder / source)


def test_own_reference_replaces_an_own_one_and_nothing_else(place):
    make_reference(place, place.reference)
    make_reference(place, place.reference)
    content = place.reference.read_bytes()
    flags = ["--images", place.folder / "own.npz", "--inception", place.graph]
    for name in ("ref.npz", "samples"):
        with pytest.raises(UserError, match=f"{name}: "):
            evaluator.main(list(map(str, ["--write_ref", place.folder / name, *flags])))
    assert place.reference.read_bytes() == content


def test_own_reference_from_cifar10_holds_its_training_images_in_order(place, monkeypatch):
    pixels = standins.write_cifar10(place.folder, monkeypatch)
    folder = place.folder / standins.CIFAR_FOLDER
    np.testing.assert_array_equal(make_reference(place, folder)["arr_0"], pixels)


# Bad input: one clear line, the other files scored, and the status says so.


# Other defects of archives are tested with their reader.
BAD_ARCHIVES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "three": lambda path: np.savez(path, some_pixels(1, 3)),
    "rgba": lambda path: np.savez(path, some_pixels(1, channels=4)),
    "size": lambda path: np.savez(path, some_pixels(1, size=16)),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_bad_file_is_named_and_the_others_are_scored(place, kind, capsys):
    place.add("1.npz")
    place.add("3.npz")
    BAD_ARCHIVES[kind](place.add("2.npz"))
    assert place.run() == 1
    assert place.names == ["1.npz", "3.npz"]
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error:") and "2.npz" in line]
    if kind == "size":
        assert all(word in error for word in ("[16, 16, 3]", "ref.npz", "[8, 8, 3]"))
    assert lines[-1] == "not scored: 2.npz"
    BAD_ARCHIVES[kind](place.reference)
    if kind != "size":
        assert "ref.npz" in place.refusal()


def test_folder_without_samples_or_no_folder_is_named(place):
    assert str(place.samples) in place.refusal()
    place.samples.rmdir()
    assert str(place.samples) in place.refusal()
    place.samples.touch()
    assert str(place.samples) in place.refusal()


def rewritten(toy, change):
    import tensorflow as tf

    graph_def = tf.compat.v1.GraphDef.FromString(toy.read_bytes())
    change({node.name: node for node in graph_def.node}, graph_def)
    return graph_def.SerializeToString()


def with_operation(name):
    return lambda nodes, _: setattr(nodes["between"], "op", name)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\xff" * 1000, ""),
        (b"", "ExpandDims, pool_3, mixed_6/conv, softmax/logits/MatMul"),
        (b"hello", ""),
        (lambda nodes, graph_def: graph_def.node.remove(nodes["pool_3"]), "pool_3"),
        (with_operation("ReadFile"), "ReadFile (between)"),
        # These are not marked as reaching outside the graph.
        *[(with_operation(name), name) for name in ("DebugIdentity", "Copy", "ImmutableConst")],
        (with_operation("NoSuchOperation"), "NoSuchOperation"),
        (lambda nodes, _: nodes["between"].input.__setitem__(0, "nowhere"), "nowhere"),
        (lambda nodes, _: nodes["softmax/logits/MatMul"].input.pop(), "softmax/logits/MatMul"),
        (lambda nodes, _: nodes["between"].input.__setitem__(0, "pool_3"), ""),  # a circle
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_that_cannot_serve_is_named(place, toy, content, word, backend):
    place.add()
    bad = place.folder / "bad.pb"
    bad.write_bytes(rewritten(toy, content) if callable(content) else content)
    refusal = place.refusal("--inception", bad, "--backend", backend)
    assert refusal.startswith(f"{bad}: ")
    assert word in refusal


@pytest.mark.parametrize("share", [0.2, 0.9, 0.99])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_cut_short_is_refused(place, toy, share, backend):
    place.add()
    cut = place.folder / "cut.pb"
    cut.write_bytes(toy.read_bytes()[: int(share * toy.stat().st_size)])
    assert place.refusal("--inception", cut, "--backend", backend).startswith(f"{cut}: ")
    assert not (place.samples / "eval_results.txt").exists()


def test_identical_images_are_scored_in_silence(place):
    with open(place.samples / "a.npz", "wb") as file:
        np.savez(file, np.repeat(some_pixels(1, 1), 30, axis=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = place.score("--bootstrap", 5, "--backend", "torch")
    assert record["scores"]["IS"] == pytest.approx(1)
    assert record["intervals"] == pytest.approx({"FD": 0, "KD": 0}, abs=1e-6)
    assert np.isfinite([*record["scores"].values()]).all()


def test_absent_graph_is_refused(place):
    place.add()
    assert "absent.pb" in place.refusal("--inception", place.folder / "absent.pb")


def test_graph_is_looked_for_here_then_beside_the_script_then_downloaded(
    tmp_path, toy, monkeypatch
):
    here, beside, name = tmp_path / "here", tmp_path / "beside", feature_graph.DEFAULT_NAME
    here.mkdir()
    beside.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(feature_graph, "URL", toy.as_uri())
    assert feature_graph.find_graph(None, beside=beside).resolve().parent == here  # downloaded
    assert (here / name).read_bytes() == toy.read_bytes()
    (here / name).rename(beside / name)
    assert feature_graph.find_graph(None, beside=beside).parent == beside
    shutil.copy(toy, here / name)
    assert feature_graph.find_graph(None, beside=beside).resolve().parent == here


def test_offline_the_line_says_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(feature_graph, "URL", "http://127.0.0.1:9/graph.pb")
    with pytest.raises(UserError, match="refused") as caught:
        feature_graph.find_graph(None, beside=tmp_path)
    assert str(caught.value).count("http://127.0.0.1:9/graph.pb") == 2
    assert feature_graph.DEFAULT_NAME in str(caught.value)
    assert os.listdir(tmp_path) == []


# Places that cannot be written.


def in_namespace(script, place):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system denies the namespaces that such places need")
    command = " ".join([sys.executable, str(ROOT / "evaluator.py"), *place.arguments()])
    script = script.format(place.folder, command)
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)


@pytest.mark.slow
def test_read_only_place_of_the_reference_means_no_cache_and_no_failure(place):
    place.add()
    script = (
        "mount --bind {0}/samples {0}/samples && mount --bind {0} {0} && "
        "mount -o remount,bind,ro {0} && mount -t tmpfs none /mnt && cp {0}/samples/a.npz /mnt && "
        "{1} --sample_batch_dir /mnt && cat /mnt/eval_results.txt"
    )
    result = in_namespace(script, place)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Read-only file system") == 1
    assert result.stdout.splitlines()[-1].startswith("a.npz # IS")
    assert place.caches == []


def test_read_only_folder_of_samples_is_one_line_before_any_work(place):
    place.add()
    result = in_namespace("mount --bind {0} {0} && mount -o remount,bind,ro {0} && {1}", place)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {place.samples}: ")
    assert result.stderr.count("\n") == 1


# The command line.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["--ref_batch", "--sample_batch_dir", "--write_ref", "--images"]),
        ("--ref_batch r.npz", ["--sample_batch_dir"]),
        ("--ref_batch r --sample_batch_dir s --bootstrap 1", ["--bootstrap 1", "2"]),
        ("--write_ref r --images i --watch", ["--watch: "]),
        ("--ref_batch r --sample_batch_dir e --image_size 8", ["--image_size: "]),
        ("--write_ref r --images i --batch_size 0", ["--batch_size: ", "'0'"]),
    ],
)
def test_commands_that_ask_for_nothing_or_too_much_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluator.main(arguments.split())
    assert exit_.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in words)


def test_options_are_understood_with_hyphens_too(place):
    place.add()
    words = place.arguments()
    pairs = [f"{o.replace('_', '-')}={v}" for o, v in zip(words[::2], words[1::2], strict=True)]
    assert evaluator.main([*pairs, "--delete-evaluated"]) == 0
    assert place.names == ["a.npz"]


def test_help_comes_without_tensorflow_and_shows_commands_that_work():
    code = (
        "import sys, evaluator\n"
        "try: evaluator.main(['--help'])\n"
        "finally: assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "python evaluator.py --ref_batch" in result.stdout


# Floors, and references without statistics.


def test_floors_give_the_scale_from_the_other_part_of_the_data_set_to_noise(place, capsys):
    other = place.folder / "other.npz"
    np.savez(other, some_pixels(3, 90))
    place.add("a.npz", count=40)
    place.run("--floors", other)
    rows, _ = printed_table(capsys.readouterr().out)
    distances = {record["file"]: record["scores"]["FD"] for record in place.records}
    assert list(distances) == ["a.npz", str(other), "Gaussian noise"]
    assert distances["Gaussian noise"] > 3 * distances[str(other)]
    assert [record["num_images"] for record in place.records] == [40, 40, 40]
    assert {row["images"] for row in rows.values()} == {"40"}
    place.run("--floors", other)  # they are scored once
    assert len(place.records) == 3
    place.add("a.npz", count=50)  # and again beside more images
    place.run("--floors", other)
    assert [record["num_images"] for record in place.records[3:]] == [50, 50, 50]


def test_the_other_part_of_fashion_mnist_is_what_the_reference_is_not(tmp_path, monkeypatch):
    parts = {}
    for name in ("load_training_set", "load_test_set"):
        parts[name] = LabelledImages(some_pixels(len(name), 9), np.zeros(9, np.int64))
    known = image_sets.DataSet(
        lambda folder: folder, *(lambda folder, part=part: part for part in parts.values())
    )
    monkeypatch.setattr(image_sets, "DATA_SETS", (known,))
    reference, other = image_sets.find_images(tmp_path), image_sets.other_part(tmp_path)
    found = [np.concatenate([*images.batches()]) for images in (reference, other)]
    for pixels, part in zip(found, parts.values(), strict=True):
        np.testing.assert_array_equal(pixels, part.pixels)


def test_a_reference_of_pixels_alone_needs_no_graph_and_scores_like_one_with_statistics(place):
    source, bare = place.folder / "images.npz", place.folder / "bare.npz"
    np.savez(source, some_pixels(0, 70))
    place.add()
    making = ["--write_ref", str(bare), "--images", str(source), "--pixels-only"]
    for _ in range(2):  # it replaces its own file
        assert evaluator.main(making) == 0
    expected = place.score()["scores"]
    assert place.score("--ref_batch", bare)["scores"] == expected
    with read_archive(bare) as archive:
        assert "mu" not in archive
