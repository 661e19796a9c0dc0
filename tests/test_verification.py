"""`evaluator.py --verify` fetches files once, scores them once, and compares with published scores.

Stand-ins on localhost take the place of the published files, and a toy graph that of Inception.
"""

import functools
import http.server
import json
import threading

import numpy as np
import pytest
from refusals import refusal
from toy_graph import write_toy_graph

import evaluator
from support.data.images import LabelledImages
from support.scores import graph as feature_graph
from support.scores import verification
from support.scores.graph import DEFAULT_NAME
from support.scores.verification import CHECKS, Published
from support.system.files import sha256_of

NAMES = [DEFAULT_NAME, CHECKS["imagenet"].samples, CHECKS["imagenet"].reference]
SCORES = ["IS", "FID", "sFID", "prec", "recall"]


def pixels(seed, count):
    return np.random.RandomState(seed).randint(0, 200 + seed, (count, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of the stand-ins."""
    folder = tmp_path_factory.mktemp("published")
    write_toy_graph(folder / DEFAULT_NAME)
    np.savez(folder / NAMES[1], pixels(1, 60))
    np.savez(folder / NAMES[2], pixels(0, 70))
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, but the file called `cut` without its last bytes; lists what is fetched."""

    cut = ""

    def log_message(self, *given):
        pass

    def do_GET(self):
        name = self.path.rsplit("/", 1)[1]
        self.fetched.append(name)
        with self.send_head() as file:
            self.wfile.write(file.read()[: -9 if name == self.cut else None])


@pytest.fixture
def server(published, monkeypatch):
    """The handler of a server that has taken the place of the published addresses."""
    monkeypatch.setattr(feature_graph, "INCEPTION_WIDTHS", (16, 112, 10))
    monkeypatch.setattr(feature_graph, "INCEPTION_BYTES", range(100_000))
    handler = type("Handler", (Handler,), {"fetched": []})
    serving = functools.partial(handler, directory=published)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serving) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        for name in NAMES:
            url = f"http://127.0.0.1:{running.server_port}/{name}"
            monkeypatch.setitem(verification.URLS, name, url)
        yield handler
        running.shutdown()


def publish(monkeypatch, scores, name="imagenet"):
    """Take the place of the published scores."""
    known = {column: Published(value, 1e-3 * abs(value)) for column, value in scores.items()}
    monkeypatch.setitem(verification.CHECKS, name, CHECKS[name]._replace(published=known))


def verify(folder, *more):
    return evaluator.main(["--verify", *more, "--verify_files", str(folder), "--backend", "torch"])


def records(folder):
    return [json.loads(line) for line in (folder / "eval_results.jsonl").read_text().splitlines()]


@pytest.fixture
def right(published, server, tmp_path):
    """The scores of the stand-ins, as the evaluator gives them in any other folder."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.npz").symlink_to(published / NAMES[1])
    flags = ["--ref_batch", published / NAMES[2], "--sample_batch_dir", tmp_path / "samples"]
    flags += ["--inception", published / DEFAULT_NAME, "--distances=float16", "--backend=torch"]
    assert evaluator.main(list(map(str, flags))) == 0
    return {column: records(tmp_path / "samples")[0]["scores"][column] for column in SCORES}


def test_files_are_fetched_once_and_scored_once_by_however_many_starts(
    right, server, published, tmp_path, monkeypatch, capsys
):
    publish(monkeypatch, right)
    server.cut = NAMES[1]
    assert verification.URLS[NAMES[1]] in refusal(verify, tmp_path)
    assert not (tmp_path / NAMES[1]).exists()
    size = sum((published / name).stat().st_size for name in NAMES)
    assert f" {size / 1e9:.3g} GB" in capsys.readouterr().out
    server.cut = ""
    assert verify(tmp_path) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(verification, "FeatureGraph", lambda *_: pytest.fail("scored again"))
    assert verify(tmp_path) == 0
    second = capsys.readouterr().out
    assert first.endswith(second), "the same table"
    assert server.fetched == [*NAMES[:2], *NAMES[1:]], "only what was cut short comes twice"
    assert len(records(tmp_path / "verification_torch")) == 1
    assert all(f"{sha256_of(published / name)} {name}\n" in second for name in NAMES)


@pytest.mark.parametrize("wrong", SCORES)
def test_score_that_differs_is_named_and_the_status_is_1(
    right, published, tmp_path, monkeypatch, capsys, wrong
):
    for name in NAMES:
        (tmp_path / name).symlink_to(published / name)
    publish(monkeypatch, {**right, wrong: 1.002 * right[wrong] + 0.002})
    assert verify(tmp_path) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert [column for column in SCORES if column in last.replace(",", "").split()] == [wrong]


@pytest.mark.parametrize("name", NAMES)
def test_file_cut_short_is_named(server, published, tmp_path, name):
    for other in NAMES:
        content = (published / other).read_bytes()
        (tmp_path / other).write_bytes(content[: -9 if other == name else None])
    assert refusal(verify, tmp_path).startswith(f"{tmp_path / name}: ")
    assert server.fetched == []


def test_without_a_network_it_says_what_to_put_where(server, tmp_path, monkeypatch):
    monkeypatch.setitem(verification.URLS, NAMES[1], "http://127.0.0.1:9/by-hand.npz")
    said = refusal(verify, tmp_path)
    assert all(url in said for url in (str(tmp_path), *(verification.URLS[n] for n in NAMES)))
    assert server.fetched == []


def test_missing_folder_and_graph_that_is_not_inception_are_refused(
    server, published, tmp_path, monkeypatch
):
    assert refusal(verify, tmp_path / "absent").startswith(f"{tmp_path / 'absent'}: ")
    monkeypatch.setattr(feature_graph, "INCEPTION_BYTES", range(9))
    assert refusal(verify, published).startswith(f"{published / DEFAULT_NAME}: ")
    assert server.fetched == []


def test_cifar10_compares_training_images_with_test_images(
    server, published, tmp_path, monkeypatch, capsys
):
    check = CHECKS["cifar10"]
    sets = {check.samples: pixels(1, 60), check.reference: pixels(0, 70)}
    loaders = {name: lambda folder, of=of: LabelledImages(of, None) for name, of in sets.items()}
    monkeypatch.setattr(verification, "LOADERS", loaders)
    graph = ("cifar10", "--inception", str(published / DEFAULT_NAME))
    assert verify(tmp_path, *graph) == 1
    assert capsys.readouterr().out.splitlines()[-1].split(": ")[1] == "IS, FID"
    monkeypatch.setattr(verification, "LOADERS", {})  # what they gave is in files by now
    (record,) = records(tmp_path / "verification_torch")
    publish(monkeypatch, {key: record["scores"][key] for key in ("IS", "FID")}, "cifar10")
    assert verify(tmp_path, *graph) == 0
    assert (record["num_images"], record["reference"]["num_images"]) == (60, 70)
    assert server.fetched == []


def test_verifying_is_not_combined_with_other_work(tmp_path):
    with pytest.raises(SystemExit) as end:
        verify(tmp_path, "--write_ref=r.npz")
    assert end.value.code == 2
