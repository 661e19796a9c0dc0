"""Verification: published scores of published images, beside our scores of the same images.

With a network, or with the files, anyone can check that our scores are those of papers.
"""

import urllib.request
from pathlib import Path
from typing import NamedTuple

from support.data import cifar10
from support.scores.graph import DEFAULT_NAME, URL, FeatureGraph, choose_backend, find_graph
from support.scores.image_sets import archive_images, array_images
from support.scores.references import load_reference, write_reference
from support.scores.scoring import score_samples, stamp_of
from support.scores.table import Results, Yardstick
from support.system.files import UserError, download, make_folder, reporting_os_errors, sha256_of
from support.system.locks import fetch_once

ADM_SAMPLES = "admnet_guided_upsampled_imagenet256.npz"
ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
DISTANCES = "float16"  # behind the published precision and recall


class Published(NamedTuple):
    """A published score, and how far from it a correct one may be."""

    value: float
    tolerance: float


class Check(NamedTuple):
    """Images, what they are compared with, and the published scores by column."""

    samples: str  # names of files
    reference: str
    published: dict[str, Published]


# Tolerances:
#
# IS and distances on ImageNet: 0.1 %. Our two backends agree to 0.01 %; the published scores were
# made on another GPU with another version of TensorFlow, which we allow ten times as much.
# Precision and recall: 0.001, because GPUs round float16 distances differently. It is too little
# for exact distances, which change both by 0.002 to 0.004.
# CIFAR-10: half a unit of the last published digit, and as much again for the backend.
CHECKS = {
    "imagenet": Check(
        ADM_SAMPLES,
        ADM_REFERENCE,
        {
            "IS": Published(215.8370361328125, 0.216),
            "FID": Published(3.9425574129223264, 0.0039),
            "sFID": Published(6.140433703346162, 0.0061),
            "prec": Published(0.8265, 0.001),
            "recall": Published(0.5309, 0.001),
        },
    ),
    "cifar10": Check(
        "cifar10_training_images.npz",
        "cifar10_test_images.npz",
        {"IS": Published(11.24, 0.01), "FID": Published(3.15, 0.01)},
    ),
}
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
URLS = {
    DEFAULT_NAME: URL,
    ADM_SAMPLES: f"{ADM}/imagenet/256/{ADM_SAMPLES}",
    ADM_REFERENCE: f"{ADM}/ref_batches/imagenet/256/{ADM_REFERENCE}",
}
LOADERS = {  # of the images in the files that have no URL
    CHECKS["cifar10"].samples: cifar10.load_training_set,
    CHECKS["cifar10"].reference: cifar10.load_test_set,
}


def verify(name: str, folder: Path, inception: str | None, backend: str, batch_images: int) -> int:
    """Score the images of a check and print the comparison; 0 if all scores agree, otherwise 1.

    `folder` has the files, or gets them. The results lie in a folder in it, by backend; scores that
    are there are not made again.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (--verify_files)")
    backend = choose_backend() if backend == "auto" else backend
    check = CHECKS[name]
    gather(folder, [*([] if inception else [DEFAULT_NAME]), check.samples, check.reference])
    graph_path = find_graph(inception or folder / DEFAULT_NAME)
    samples_path, reference_path = folder / check.samples, folder / check.reference
    samples, references = archive_images(samples_path), archive_images(reference_path)
    results = Results.open(make_folder(folder / f"verification_{backend}"))
    sha256 = sha256_of(reference_path)
    yardstick = Yardstick(sha256, sha256_of(graph_path), DISTANCES)
    if not results.has(check.samples, stamp_of(samples_path), yardstick):
        graph = FeatureGraph(graph_path, references.image_shape, batch_images, backend)
        if not graph.is_inception:
            raise UserError(f"{graph_path}: not the Inception graph, which published scores are by")
        print(
            f"scoring {samples.num_images:,} images by {backend} on {graph.engine.device}",
            flush=True,
        )
        reference = load_reference(reference_path, references, sha256, graph, DISTANCES)
        results.add(score_samples(samples_path, samples, reference, graph))
    return report(results.records[check.samples], check.published)


def gather(folder: Path, names: list[str]) -> None:
    """Download or write those of the files that are not in `folder`."""

    def missing() -> list[str]:
        return [name for name in names if name in URLS and not (folder / name).exists()]

    def fetch() -> None:
        total_bytes = sum(_bytes_at(URLS[name]) for name in missing())
        names = ", ".join(missing())
        print(f"fetching {names} into {folder}: {total_bytes / 1e9:.3g} GB in all", flush=True)
        for name in missing():
            download(URLS[name], folder / name)

    urls = " ".join(URLS[name] for name in missing())
    fetch_once(folder, missing, fetch, f"download them yourself and put them there: {urls}")
    for name in names:
        if name in LOADERS and not (folder / name).exists():
            images = array_images(name, LOADERS[name](folder).pixels)
            write_reference(folder / name, images, None)


def _bytes_at(url: str) -> int:
    """The size of a file on a server, which a person wants to know before it is fetched."""
    request = urllib.request.Request(url, method="HEAD")
    with (
        reporting_os_errors(f"{url}: cannot be fetched"),
        urllib.request.urlopen(request, timeout=30) as response,
    ):
        return int(response.headers.get("Content-Length") or 0)


def report(record: dict, published: dict[str, Published]) -> int:
    """Print a record's scores beside the published ones; 0 if all agree, otherwise 1."""
    graph, reference = record["graph"], record["reference"]
    print(graph["sha256"], graph["name"])
    print(record["sha256"], record["file"])
    print(reference["sha256"], Path(reference["name"]).name)
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    print(f"{record['backend']} on {record['device']}; {versions}; {DISTANCES} distances")
    print(f"{'score':8}{'published':>20}{'ours':>20}{'difference':>13}{'tolerance':>11}  verdict")
    differing = []
    for column, (value, tolerance) in published.items():
        ours = record["scores"][column]
        agrees = abs(ours - value) <= tolerance
        differing += [] if agrees else [column]
        numbers = f"{value!r:>20}{ours:>20.12g}{ours - value:>+13.2g}{tolerance:>11g}"
        print(f"{column:8}{numbers}  {'agrees' if agrees else 'DIFFERS'}")
    verdict = f"different: {', '.join(differing)}" if differing else "all scores agree"
    print(*record["notes"], verdict, sep="\n")
    return 1 if differing else 0
