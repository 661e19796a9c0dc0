"""The evaluator scores each file once, with the numbers of plain numpy, whatever it is given."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import standins
from PIL import ExifTags, Image
from test_scores import plain_inception_score, plain_precision_recall
from toy_graph import write_toy_graph

import evaluator
from support.data.images import centre_crop
from support.scores import graph as feature_graph
from support.scores import references
from support.scores.npz import read_archive
from support.system.files import UserError, sha256_of

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["IS", "FD", "sFD", "prec", "recall"]


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

    def add(self, name, seed=1, **shape):
        np.savez(open(self.samples / name, "wb"), some_pixels(seed, **shape))  # noqa: SIM115
        return self.samples / name

    def arguments(self, *more):
        flags = {
            "--ref_batch": self.reference,
            "--sample_batch_dir": self.samples,
            "--inception": self.graph,
        }
        return [str(word) for pair in flags.items() for word in pair] + list(map(str, more))

    def run(self, *more):
        return evaluator.main(self.arguments(*more))

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
def count_measured(monkeypatch):
    """Names of the image sets that went through the graph."""
    measured = []
    real = references.measure

    def counting(images, *rest):
        measured.append(Path(images.name).name)
        return real(images, *rest)

    monkeypatch.setattr(references, "measure", counting)
    monkeypatch.setattr(evaluator, "measure", counting)
    return measured


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


def plain_frechet(a, b):
    covariances = [np.cov(values, rowvar=False) for values in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    squared = ((a.mean(axis=0, dtype=float) - b.mean(axis=0, dtype=float)) ** 2).sum()
    return squared + np.trace(sum(covariances)) - 2 * np.trace(root)


# The numbers.


@pytest.mark.slow
def test_scores_are_those_of_plain_numpy(place, toy):
    samples = some_pixels(1, 400)
    reference = some_pixels(0, 300)
    np.savez(place.reference, reference)
    np.savez(place.samples / "a.npz", samples)
    assert place.run() == 0
    pools, spatials, weights = plain_features(toy, samples)
    reference_pools, reference_spatials, _ = plain_features(toy, reference)
    p = np.exp(pools.astype(float) @ weights)
    p /= p.sum(axis=1, keepdims=True)
    (record,) = place.records
    scores = record["scores"]
    assert list(scores) == COLUMNS
    assert scores["IS"] == pytest.approx(plain_inception_score(p, 5000), rel=1e-4)
    assert scores["FD"] == pytest.approx(plain_frechet(pools, reference_pools), rel=1e-4)
    assert scores["sFD"] == pytest.approx(plain_frechet(spatials, reference_spatials), rel=1e-4)
    expected = plain_precision_recall(pools.astype(float), reference_pools.astype(float))
    assert (scores["prec"], scores["recall"]) == pytest.approx(expected, abs=0.002)
    assert 0 < scores["prec"] < 1


def test_line_has_the_name_and_every_score_in_full_precision(place):
    place.add("a.npz")
    place.run()
    (record,) = place.records
    scores = ", ".join(f"{column}: {record['scores'][column]!r}" for column in COLUMNS)
    assert place.text == f"a.npz # {scores}\n"


def test_record_says_what_made_the_scores(place, toy):
    path = place.add("a.npz")
    place.run()
    (record,) = place.records
    assert record["num_images"] == 60
    assert record["image_shape"] == [8, 8, 3]
    assert record["sha256"] == sha256_of(path)
    assert record["reference"]["sha256"] == sha256_of(place.reference)
    assert record["graph"] == {"name": "toy.pb", "sha256": sha256_of(toy), "widths": [16, 112, 10]}
    assert set(record["versions"]) == {"soflow", "tensorflow", "numpy", "python"}
    assert record["seconds"] > 0


def test_few_images_are_said_on_screen_and_in_the_record(place, capsys):
    place.add("a.npz")
    place.run()
    notes = [
        "samples: 60 images; FD and sFD are biased upwards",
        "samples: fewer images than features + 1 = 113",
        "reference: 70 images; FD and sFD are biased upwards",
        "reference: fewer images than features + 1 = 113",
    ]
    assert place.records[0]["notes"] == notes
    printed = capsys.readouterr().out
    assert all(note in printed for note in notes)
    remark = "FD, sFD are biased upwards by fewer than 10,000 images: a.npz"
    assert printed_table(printed)[1] == [remark]
    assert printed.count("biased upwards") == 3


def test_ten_thousand_images_are_no_longer_few_but_fewer_than_published_ones(place, capsys):
    np.savez(place.reference, some_pixels(0, 10_000, size=4))
    np.savez(place.samples / "a.npz", some_pixels(1, 10_000, size=4))
    place.run()
    assert place.records[0]["notes"] == [
        "samples: 10,000 images; FD and sFD are above those of 50,000",
        "reference: 10,000 images; FD and sFD are above those of 50,000",
    ]
    rows, remarks = printed_table(capsys.readouterr().out)
    assert rows["a.npz"]["images"] == "10000"
    assert remarks == []


def test_table_tells_images_step_and_nfe_by_the_record_beside_or_else_by_the_name(place, capsys):
    records = {
        "1000_2NFE_42": None,
        "2000": None,
        "best": {"num_images": 60, "NFE": 4, "checkpoint": "/runs/a/ckpts/3000.pt"},
        "4000": {"num_images": 60, "NFE": 1, "finished_steps": 4000, "seed": 3},
        "5000_1NFE_0": {"num_images": 50, "NFE": 8, "finished_steps": 7},  # of another archive
        "odd": {"num_images": 60, "NFE": "many", "finished_steps": True, "checkpoint": ["x.pt"]},
        "torn": "{",
        "list": [1],
    }
    for name, record in records.items():
        place.add(f"{name}.npz")
        if record is not None:
            text = record if isinstance(record, str) else json.dumps(record)
            (place.samples / f"{name}.json").write_text(text)
    assert place.run() == 0
    rows, _ = printed_table(capsys.readouterr().out)
    origins = {name: (row["images"], row["step"], row["NFE"]) for name, row in rows.items()}
    assert origins == {
        "1000_2NFE_42.npz": ("60", "1000", "2"),
        "2000.npz": ("60", "2000", "-"),
        "best.npz": ("60", "3000", "4"),
        "4000.npz": ("60", "4000", "1"),
        "5000_1NFE_0.npz": ("60", "5000", "1"),
        **dict.fromkeys(["odd.npz", "torn.npz", "list.npz"], ("60", "-", "-")),
    }
    steps = {record["file"]: (record["step"], record["NFE"]) for record in place.records}
    assert steps["best.npz"] == (3000, 4)
    assert steps["odd.npz"] == (None, None)


def test_float16_distances_are_said_everywhere_and_a_file_is_scored_again_by_them(
    place, count_measured, capsys
):
    place.add("a.npz", count=300)
    place.run()
    assert printed_table(capsys.readouterr().out)[0]["a.npz"]["distances"] == "exact"
    count_measured.clear()
    place.run("--distances", "float16")
    assert count_measured == ["a.npz"]  # the reference's features do not depend on it
    printed = capsys.readouterr().out
    assert "prec and recall by float16 distances" in printed
    assert printed_table(printed)[0]["a.npz"]["distances"] == "float16"
    exact, float16 = place.records
    assert [exact["distances"], float16["distances"]] == ["exact", "float16"]
    assert {**exact["scores"], "prec": 0, "recall": 0} == {
        **float16["scores"],
        "prec": 0,
        "recall": 0,
    }
    count_measured.clear()
    place.run("--distances", "float16")
    assert count_measured == []
    place.run()
    assert count_measured == ["a.npz"]
    assert place.records[-1]["scores"] == exact["scores"]
    with read_archive(place.caches[0]) as cache:
        assert "squared_radii_exact" in cache
        assert "squared_radii_float16" in cache


def test_overflow_of_float16_is_said_and_not_kept(place, monkeypatch):
    real = references.measure

    def large(images, graph, *rest):
        measured = real(images, graph, *rest)
        return dataclasses.replace(measured, features=measured.features * 1000)

    monkeypatch.setattr(references, "measure", large)
    monkeypatch.setattr(evaluator, "measure", large)
    place.add("a.npz")
    assert place.run("--distances", "float16") == 0
    notes = [note for note in place.records[0]["notes"] if "overflow" in note]
    assert notes == [
        f"{whose} images overflow float16; prec and recall mean nothing"
        for whose in ("samples: 60", "reference: 70")
    ]
    assert place.caches == []
    assert place.run() == 0
    assert not [note for note in place.records[1]["notes"] if "overflow" in note]


def test_table_names_files_that_were_scored_against_something_else(place, capsys):
    place.add("a.npz")
    place.run()
    (place.samples / "a.npz").unlink()
    np.savez(place.reference, some_pixels(3, 70))
    place.add("b.npz")
    place.run()
    remarks = printed_table(capsys.readouterr().out)[1]
    assert remarks[-1] == "by another reference or graph, or not known by which: a.npz"


def test_distances_are_called_fid_only_with_the_inception_graph(place, toy, monkeypatch, capsys):
    place.add("a.npz")
    place.run()
    monkeypatch.setattr(feature_graph, "INCEPTION_WIDTHS", (16, 112, 10))
    place.add("b.npz")
    place.run()
    assert [sorted(record["scores"])[:2] for record in place.records] == [["FD", "IS"]] * 2
    monkeypatch.setattr(feature_graph, "INCEPTION_BYTES", range(10_000))
    place.add("c.npz")
    capsys.readouterr()
    place.run()
    assert ", FID: " in place.text.splitlines()[-1]
    assert ", sFID: " in place.text.splitlines()[-1]
    printed = capsys.readouterr().out
    rows, remarks = printed_table(printed)
    columns = ["images", "step", "NFE", "IS", "FID", "sFID", "FD", "sFD", "prec", "recall"]
    assert list(rows["a.npz"]) == [*columns, "distances"]
    assert [row["FID"] == "-" for row in rows.values()] == [True, True, False]
    assert remarks[0].startswith("FID, sFID, FD, sFD are biased upwards")


def test_batch_size_does_not_change_the_scores(place):
    place.add("a.npz")
    place.run("--batch_size", "7", "--no_cache")
    (place.samples / "eval_results.txt").unlink()
    place.run("--no_cache")
    os.utime(place.samples / "a.npz", (1, 1))
    place.run("--no_cache")
    first, last = place.records
    assert first["scores"] == pytest.approx(last["scores"], rel=1e-4)
    assert place.caches == []


def test_grey_images_count_as_rgb(place):
    grey = some_pixels(1, channels=1)
    np.savez(place.samples / "grey.npz", grey)
    np.savez(place.samples / "rgb.npz", grey.repeat(3, axis=3))
    assert place.run() == 0
    first, last = place.records
    assert first["scores"] == last["scores"]


def test_graph_of_2015_with_its_old_operations_is_run(place, tmp_path, toy):
    old = write_toy_graph(tmp_path / "old.pb", of_2015=True)
    place.add("a.npz")
    assert place.run("--inception", old) == 0


# Statistics in the reference.


def test_statistics_in_the_reference_are_used(place, toy):
    pools, spatials, _ = plain_features(toy, some_pixels(3, 200))
    statistics = {
        "mu": pools.mean(axis=0),
        "sigma": np.cov(pools, rowvar=False),
        "mu_s": spatials.mean(axis=0),
        "sigma_s": np.cov(spatials, rowvar=False),
    }
    np.savez(place.reference, some_pixels(0, 70), **statistics)
    samples = some_pixels(1, 200)
    np.savez(place.samples / "a.npz", samples)
    assert place.run() == 0
    sample_pools, sample_spatials, _ = plain_features(toy, samples)
    (record,) = place.records
    assert record["scores"]["FD"] == pytest.approx(plain_frechet(sample_pools, pools), rel=1e-4)
    assert record["scores"]["sFD"] == pytest.approx(
        plain_frechet(sample_spatials, spatials), rel=1e-4
    )
    assert record["reference"]["statistics_from"] == "file"
    assert record["notes"][-1] == "reference: does not say whether this graph made its statistics"


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"mu": np.zeros(16)}, "has no sigma"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"mu: must be float \[16\], not float64 \[5\]"),
        ({"mu": np.zeros(16), "sigma": np.eye(16) * np.nan}, "sigma: .* not finite"),
        ({"graph_sha256": np.array("0" * 64)}, "statistics were made by another graph"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(place, arrays, line):
    place.add("a.npz")
    np.savez(place.reference, some_pixels(0), **arrays)
    with pytest.raises(UserError, match=rf"ref\.npz: .*{line}"):
        place.run()


# Order, skipping, scoring again.


def test_files_are_scored_in_natural_order_whatever_their_names(place):
    names = ["10.npz", "2.npz", " lead.npz", "a # IS: 3.npz", "a,b.npz", "ünï.npz", ".npz"]
    for name in names:
        place.add(name)
    (place.samples / "folder.npz").mkdir()
    (place.samples / "notes.txt").touch()
    assert place.run() == 0
    expected = [" lead.npz", ".npz", "2.npz", "10.npz", "a # IS: 3.npz", "a,b.npz", "ünï.npz"]
    names_in_records = [record["file"] for record in place.records]
    assert sorted(names_in_records) == sorted(expected)
    assert names_in_records.index("2.npz") < names_in_records.index("10.npz")
    before = place.text
    assert place.run() == 0
    assert place.text == before


def test_name_that_is_not_utf8_is_scored_once(place):
    path = os.fsencode(place.samples) + b"/\xff.npz"
    shutil.copy(place.add("a.npz"), path)
    assert place.run() == 0
    assert place.run() == 0
    assert (place.samples / "eval_results.txt").read_bytes().count(b"\xff.npz # IS") == 1


def test_what_is_scored_is_not_scored_again_and_nothing_is_deleted(place, count_measured, capsys):
    place.add("a.npz")
    place.add("b.npz")
    place.run()
    capsys.readouterr()
    count_measured.clear()
    assert place.run() == 0
    assert count_measured == []
    assert place.names == ["a.npz", "b.npz"]
    assert list(printed_table(capsys.readouterr().out)[0]) == ["a.npz", "b.npz"]
    assert (place.samples / "a.npz").exists()


def test_a_changed_file_is_scored_again_and_its_last_line_counts(place, capsys):
    place.add("a.npz")
    place.run()
    place.add("a.npz", seed=5)
    capsys.readouterr()
    place.run()
    assert place.names == ["a.npz", "a.npz"]
    last = place.records[-1]["scores"]
    assert place.records[0]["scores"] != last
    rows, _ = printed_table(capsys.readouterr().out)
    assert [rows["a.npz"][column] for column in COLUMNS] == [
        f"{last[column]:.4f}" for column in COLUMNS
    ]


def test_old_result_file_is_understood(place, capsys):
    place.add("25000.npz")
    place.add("50000.npz")
    place.add("a b # c.npz")
    (place.samples / "eval_results.txt").write_text(
        "\n25000.npz # IS: 9.5, FID: 3.25, sFID: 4.5, prec: 0.5, recall: 0.625\n\n"
        "something else\r\n"
        "a b # c.npz # IS: 1, FID: 2e-05, sFID: nan, prec: , recall: x\r\n"
        "deleted.npz # IS: 1.0, FID: 2.0, sFID: 3.0, prec: 0.1, recall: 0.2\n"
    )
    assert place.run() == 0
    assert [record["file"] for record in place.records] == ["50000.npz"]
    rows, remarks = printed_table(capsys.readouterr().out)
    cells = "- 25000 - 9.5000 3.2500 4.5000 - - 0.5000 0.6250 -"
    assert list(rows["25000.npz"].values()) == cells.split()
    assert list(rows["deleted.npz"].values())[3:5] == ["1.0000", "2.0000"]
    assert remarks[-1].endswith("not known by which: 25000.npz, a b # c.npz, deleted.npz")


def test_old_result_file_that_ends_in_the_middle_of_a_number_does_not_count(place):
    place.add("a.npz")
    place.add("b.npz")
    (place.samples / "eval_results.txt").write_text(
        "a.npz # IS: 1.0, FID: 2.0, sFID: 3.0, prec: 0.1, recall: 0.25\n"
        "b.npz # IS: 1.0, FID: 2.0, sFID: 3.0, prec: 0.1, recall: 0.2"
    )
    assert place.run() == 0
    assert [record["file"] for record in place.records] == ["b.npz"]
    assert place.names == ["a.npz", "b.npz", "b.npz"]


def test_another_reference_or_graph_scores_again(place, other_toy):
    place.add("a.npz")
    place.run()
    place.run("--inception", other_toy)
    np.savez(place.reference, some_pixels(4))
    place.run("--inception", other_toy)
    place.run("--inception", other_toy)
    assert place.names == ["a.npz"] * 3
    assert len(place.caches) == 2
    assert len({record["scores"]["FD"] for record in place.records}) == 3


def test_delete_evaluated_deletes_what_it_scored_and_never_the_reference(place):
    place.add("a.npz")
    place.run()
    place.add("b.npz")
    os.link(place.reference, place.samples / "ref.npz")
    place.run("--delete_evaluated")
    assert sorted(path.name for path in place.samples.glob("*.npz")) == ["a.npz", "ref.npz"]
    assert place.names == ["a.npz", "b.npz", "ref.npz"]
    assert place.run() == 0
    assert len(place.names) == 3


def test_file_that_changes_while_it_is_scored_is_not_recorded(place, monkeypatch, capsys):
    path = place.add("a.npz")
    real = evaluator.measure

    def changing(images, graph):
        os.utime(path, (1, 1))
        return real(images, graph)

    monkeypatch.setattr(evaluator, "measure", changing)
    assert place.run() == 1
    assert "changed while it was being scored" in capsys.readouterr().err
    assert not (place.samples / "eval_results.jsonl").exists()


# The cache.


def test_reference_is_measured_once_and_then_read_from_the_cache(place, count_measured):
    place.add("1.npz")
    place.add("2.npz")
    place.run()
    assert count_measured == ["ref.npz", "1.npz", "2.npz"]
    scores = place.records[0]["scores"]
    (place.samples / "eval_results.jsonl").unlink()
    (place.samples / "eval_results.txt").unlink()
    count_measured.clear()
    place.run()
    assert count_measured == ["1.npz", "2.npz"]
    assert place.records[0]["scores"] == scores
    assert len(place.caches) == 1


def test_changed_reference_is_noticed_though_size_and_time_are_the_same(place, count_measured):
    place.add("a.npz")
    place.run()
    status = place.reference.stat()
    np.savez(place.reference, some_pixels(9, 70))
    os.utime(place.reference, ns=(status.st_atime_ns, status.st_mtime_ns))
    count_measured.clear()
    place.run()
    assert count_measured == ["ref.npz", "a.npz"]
    assert len(place.caches) == 1


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_cache_is_rebuilt(place, count_measured, damage, capsys):
    place.add("a.npz")
    place.run()
    scores = place.records[0]["scores"]
    (cache,) = place.caches
    whole = cache.read_bytes()
    cache.write_bytes(whole[:9999] if damage == "cut" else place.reference.read_bytes())
    place.add("a.npz")
    count_measured.clear()
    assert place.run() == 0
    assert count_measured == ["ref.npz", "a.npz"]
    assert place.records[-1]["scores"] == scores
    assert "cache computed again" in capsys.readouterr().err
    assert len(cache.read_bytes()) == len(whole)


# Killed, interrupted, watching.


def run_in_process(place, *more):
    code = (
        "import sys, evaluator; status = evaluator.main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    command = [sys.executable, "-c", code, *place.arguments(*more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_with_the_next_file_and_imports_no_torch(place):
    for number in range(12):
        place.add(f"{number}.npz", count=3000, size=16)
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
    expected = [f"{number}.npz" for number in range(12)]
    assert [record["file"] for record in place.records] == expected
    assert place.names == expected
    assert f"\n{scored}.npz # IS".encode() in output
    assert b"\n0.npz # IS" not in output


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


def test_watch_scores_what_appears_once_it_is_whole(place, monkeypatch, capsys):
    place.add("1.npz")
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
    assert place.run("--watch", "7") == 0
    assert steps == [["1.npz"], ["1.npz"], ["1.npz"], ["1.npz", "2.npz"]]
    assert list(printed_table(capsys.readouterr().out)[0]) == ["1.npz", "2.npz"]


def test_watch_tells_of_a_damaged_file_once(place, monkeypatch, capsys):
    (place.samples / "bad.npz").write_bytes(b"half")
    naps = iter([None] * 3)

    def sleep(_):
        if next(naps, "over") == "over":
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluator.time, "sleep", sleep)
    assert place.run("--watch") == 1
    assert capsys.readouterr().err.count("error:") == 1


# References of one's own.


def make_reference(place, source, *more):
    output = place.folder / "own.npz"
    flags = ["--write_ref", output, "--images", source, "--inception", place.graph, *more]
    assert evaluator.main(list(map(str, flags))) == 0
    with np.load(output) as archive:
        return dict(archive)


def test_own_reference_from_an_npz_scores_like_its_images(place, toy):
    place.add("a.npz")
    place.run()
    own = make_reference(place, place.reference)
    np.testing.assert_array_equal(own["arr_0"], some_pixels(0, 70))
    pools, spatials, _ = plain_features(toy, own["arr_0"])
    for name, expected in {
        "mu": pools.mean(axis=0),
        "sigma": np.cov(pools, rowvar=False),
        "mu_s": spatials.mean(axis=0),
        "sigma_s": np.cov(spatials, rowvar=False),
    }.items():
        np.testing.assert_allclose(own[name], expected, rtol=1e-3, atol=1e-6)
    assert str(own["graph_sha256"]) == sha256_of(toy)
    assert int(own["count"]) == 70
    assert own["image_shape"].tolist() == [8, 8, 3]
    place.reference = place.folder / "own.npz"
    place.run()
    first, last = place.records
    assert last["scores"] == pytest.approx(first["scores"], rel=1e-6)
    assert last["reference"]["statistics_from"] == "file"


def test_own_reference_may_keep_fewer_images_but_counts_all(place):
    own = make_reference(place, place.reference, "--ref_images", 10)
    np.testing.assert_array_equal(own["arr_0"], some_pixels(0, 70)[::7])
    assert int(own["count"]) == 70
    whole = make_reference(place, place.reference)
    np.testing.assert_array_equal(own["mu"], whole["mu"])


def test_own_reference_of_another_graph_is_refused(place, other_toy):
    place.add("a.npz")
    make_reference(place, place.reference)
    place.reference = place.folder / "own.npz"
    with pytest.raises(UserError, match=r"own\.npz: its statistics were made by toy\.pb"):
        place.run("--inception", other_toy)


def test_own_reference_from_pictures_of_classes_grey_ones_as_rgb(place):
    pixels = some_pixels(2, 6)
    for index, name in enumerate(["b/1.png", "b/0.png", "a/0.png", "a/1.png", "c.png", "d.png"]):
        path = place.folder / "pictures" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels[index]).convert("L" if name == "c.png" else "RGB").save(path)
    own = make_reference(place, place.folder / "pictures")["arr_0"]
    np.testing.assert_array_equal(own[[5, 4, 2, 3, 1]], pixels[[0, 1, 2, 3, 5]])
    assert (own[0][..., 0] == own[0][..., 1]).all()


def test_pictures_of_different_sizes_need_a_crop(place):
    (place.folder / "pictures").mkdir()
    for index, size in enumerate((8, 12, 20, 40)):
        picture = Image.fromarray(some_pixels(index, 1, size)[0])
        picture.save(place.folder / "pictures" / f"{index}.png")
    flags = ["--write_ref", "x.npz", "--images", place.folder / "pictures"]
    with pytest.raises(UserError, match=r"1\.png: is \[12, 12, 3\], 0\.png is \[8, 8, 3\].*crop"):
        evaluator.main(list(map(str, [*flags, "--inception", place.graph])))
    own = make_reference(place, place.folder / "pictures", "--image_size", 8)["arr_0"]
    np.testing.assert_array_equal(own[3], centre_crop(some_pixels(3, 1, 40)[0], 8))


def test_own_reference_turns_pictures_upright_unless_told_not_to_and_records_it(place):
    folder, turned = place.folder / "pictures", Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    folder.mkdir()
    for index, pixels in enumerate(some_pixels(0, 4)):
        Image.fromarray(pixels).save(folder / f"{index}.png", exif=turned)
    for flags, exif, step in (([], "apply", -1), (["--exif", "ignore"], "ignore", 1)):
        own = make_reference(place, folder, *flags)
        np.testing.assert_array_equal(own["arr_0"], some_pixels(0, 4)[:, ::step, ::step])
        assert str(own["exif"]) == exif
    with pytest.raises(UserError, match=r"ref\.npz: --exif is for folders of pictures"):
        make_reference(place, place.reference, "--exif", "ignore")


def test_own_reference_says_which_files_of_a_folder_are_left_out(place, capsys):
    folder = place.folder / "pictures"
    (folder / "below").mkdir(parents=True)
    for index, pixels in enumerate(some_pixels(0, 4)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    for name in ("a.heic", "below/b.HEIC", "notes.txt"):
        (folder / name).touch()
    make_reference(place, folder)
    assert "left out, not read: 3 files (2 .heic, 1 .txt)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("missing", r"missing: no such file or folder \(--images\)"),
        ("0.png", r"0\.png: --images takes a folder of pictures, not a single one"),
        ("empty", "empty: holds no pictures"),
        ("one", "one: too few images, 1 of at least 4"),
    ],
)
def test_images_that_are_none_are_named(place, source, line):
    for name in ("0.png", "one/0.png"):
        (place.folder / "one").mkdir(exist_ok=True)
        Image.fromarray(some_pixels(0, 1)[0]).save(place.folder / name)
    (place.folder / "empty").mkdir()
    with pytest.raises(UserError, match=line):
        make_reference(place, place.folder / source)


def test_own_reference_replaces_an_own_one_and_nothing_else(place):
    make_reference(place, place.reference)
    make_reference(place, place.reference)
    content = place.reference.read_bytes()
    flags = ["--images", place.folder / "own.npz", "--inception", place.graph]
    for name in ("ref.npz", "samples"):
        with pytest.raises(UserError, match=rf"{name}: (exists and was not|is a folder)"):
            evaluator.main(list(map(str, ["--write_ref", place.folder / name, *flags])))
    assert place.reference.read_bytes() == content


def test_own_reference_from_cifar10_holds_its_training_images_in_order(place, monkeypatch):
    pixels = standins.write_cifar10(place.folder, monkeypatch)
    folder = place.folder / standins.CIFAR_FOLDER
    np.testing.assert_array_equal(make_reference(place, folder)["arr_0"], pixels)


# Bad input: one clear line, the other files scored, and the status says so.


# What else can be wrong in an archive is refused by its reader.
BAD_ARCHIVES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "floats": lambda path: np.savez(path, some_pixels(1) / 255),
    "three": lambda path: np.savez(path, some_pixels(1, 3)),
    "rgba": lambda path: np.savez(path, some_pixels(1, channels=4)),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_bad_sample_file_is_named_and_the_others_are_scored(place, kind, capsys):
    place.add("1.npz")
    place.add("3.npz")
    BAD_ARCHIVES[kind](place.add("2.npz"))
    assert place.run() == 1
    assert place.names == ["1.npz", "3.npz"]
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("error:") and "2.npz" in line]) == 1
    assert lines[-1] == "not scored: 2.npz"


def test_samples_and_reference_of_different_size_are_refused_with_both_named(place, capsys):
    place.add("a.npz", size=16)
    assert place.run() == 1
    error = capsys.readouterr().err
    assert "a.npz: images are 16 x 16 RGB" in error
    assert "ref.npz are 8 x 8 RGB" in error


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_bad_reference_is_named(place, kind):
    place.add("a.npz")
    BAD_ARCHIVES[kind](place.reference)
    with pytest.raises(UserError, match=r"ref\.npz"):
        place.run()


def test_folder_without_archives_or_no_folder_is_named(place):
    with pytest.raises(UserError, match=r"samples: holds no \.npz to score"):
        place.run()
    place.samples.rmdir()
    with pytest.raises(UserError, match="samples: no such folder"):
        place.run()
    place.samples.touch()
    with pytest.raises(UserError, match="samples: is a file, not a folder"):
        place.run()


def rewritten(toy, change):
    import tensorflow as tf

    graph_def = tf.compat.v1.GraphDef.FromString(toy.read_bytes())
    change({node.name: node for node in graph_def.node}, graph_def)
    return graph_def.SerializeToString()


def with_operation(name):
    def change(nodes, _):
        nodes["between"].op = name

    return change


def without_pool(nodes, graph_def):
    graph_def.node.remove(nodes["pool_3"])


def dangling_input(nodes, _):
    nodes["between"].input[0] = "nowhere"


def logits_without_weights(nodes, _):
    del nodes["softmax/logits/MatMul"].input[1]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xff" * 1000, "not a frozen graph"),
        (b"", "lacks ExpandDims, pool_3, mixed_6/conv, softmax/logits/MatMul"),
        (b"hello", "not a frozen graph"),
        (without_pool, "lacks pool_3"),
        (with_operation("ReadFile"), r"operation ReadFile \(between\) could reach outside"),
        # These are not marked as reaching beyond the graph.
        (with_operation("DebugIdentity"), "DebugIdentity .* could reach outside"),
        (with_operation("Copy"), "Copy .* could reach outside"),
        (with_operation("ImmutableConst"), "ImmutableConst .* could reach outside"),
        (with_operation("NoSuchOperation"), "not a usable graph"),
        (dangling_input, "not a usable graph"),
        (logits_without_weights, "lacks softmax/logits/MatMul"),
    ],
)
def test_graph_that_cannot_serve_is_named(place, toy, content, line):
    place.add("a.npz")
    bad = place.folder / "bad.pb"
    bad.write_bytes(rewritten(toy, content) if callable(content) else content)
    with pytest.raises(UserError, match=rf"bad\.pb: .*{line}") as caught:
        place.run("--inception", bad)
    assert "\n" not in str(caught.value)


def test_absent_graph_or_another_digest_is_refused(place, toy):
    place.add("a.npz")
    with pytest.raises(UserError, match=r"absent\.pb: no such graph"):
        place.run("--inception", place.folder / "absent.pb")
    with pytest.raises(UserError, match=r"toy\.pb: SHA-256 is .*, not 00"):
        place.run("--inception_sha256", "00")
    assert place.run("--inception_sha256", sha256_of(toy).upper()) == 0


def test_graph_is_looked_for_here_then_beside_the_script_then_downloaded(
    tmp_path, toy, monkeypatch
):
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    beside.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(feature_graph, "URL", toy.as_uri())
    assert feature_graph.find_graph(None, beside).resolve().parent == here  # downloaded
    assert (here / feature_graph.DEFAULT_NAME).read_bytes() == toy.read_bytes()
    (here / feature_graph.DEFAULT_NAME).unlink()
    shutil.copy(toy, beside / feature_graph.DEFAULT_NAME)
    assert feature_graph.find_graph(None, beside).parent == beside
    shutil.copy(toy, here / feature_graph.DEFAULT_NAME)
    assert feature_graph.find_graph(None, beside).resolve().parent == here


def test_offline_the_line_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(feature_graph, "URL", "http://127.0.0.1:9/graph.pb")
    with pytest.raises(UserError, match="refused") as caught:
        feature_graph.find_graph(None, tmp_path)
    assert "fetch http://127.0.0.1:9/graph.pb yourself" in str(caught.value)
    assert f"put it here as {feature_graph.DEFAULT_NAME}" in str(caught.value)
    assert os.listdir(tmp_path) == []


# Places that cannot be written.


def in_namespace(script, place):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system denies the namespaces that such places need")
    command = " ".join([sys.executable, str(ROOT / "evaluator.py"), *place.arguments()])
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script.format(place.folder, command)],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_read_only_place_of_the_reference_means_no_cache_and_no_failure(place):
    place.add("a.npz")
    script = (
        "mount --bind {0}/samples {0}/samples && mount --bind {0} {0} && "
        "mount -o remount,bind,ro {0} && mount -t tmpfs none /mnt && cp {0}/samples/a.npz /mnt && "
        "{1} --sample_batch_dir /mnt && cat /mnt/eval_results.txt"
    )
    result = in_namespace(script, place)
    assert result.returncode == 0, result.stderr
    assert "Read-only file system" in result.stderr
    assert result.stderr.count("no cache") == 1
    assert result.stdout.splitlines()[-1].startswith("a.npz # IS")
    assert place.caches == []


def test_read_only_folder_of_samples_is_one_line_before_any_work(place):
    place.add("a.npz")
    script = "mount --bind {0} {0} && mount -o remount,bind,ro {0} && {1}"
    result = in_namespace(script, place)
    assert result.returncode == 1
    assert result.stderr == (
        f"error: {place.samples}: not a writable folder (Read-only file system)\n"
    )


# The command line.


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give --ref_batch and --sample_batch_dir, or --write_ref and --images"),
        (["--ref_batch", "r.npz"], "give --ref_batch and --sample_batch_dir"),
        (["--write_ref", "r", "--images", "i", "--watch"], "--watch: not used with --write_ref"),
        (
            ["--ref_batch", "r", "--sample_batch_dir", "e", "--image_size", "8"],
            "--image_size: not used with scoring",
        ),
        (["--write_ref", "r", "--images", "i", "--batch_size", "0"], "whole number above 0, not 0"),
    ],
)
def test_commands_that_ask_for_nothing_or_too_much_are_refused(arguments, line, capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluator.main(arguments)
    assert exit_.value.code == 2
    assert line in capsys.readouterr().err


def test_options_are_understood_with_hyphens_too(place):
    place.add("a.npz")
    arguments = [word.replace("_", "-", 2) for word in place.arguments("--no_cache")[::2]]
    assert "--sample-batch-dir" in arguments
    values = place.arguments()[1::2]
    pairs = [f"{option}={value}" for option, value in zip(arguments, values, strict=False)]
    assert evaluator.main([*pairs, "--no-cache"]) == 0
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
