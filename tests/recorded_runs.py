"""Folders of runs as training leaves them, for the report to read."""

import json
from pathlib import Path

import numpy as np
from commands import ROOT
from PIL import Image


def write_run(folder: Path, seed: int = 0, shift: float = 0.0, lines: int = 20) -> Path:
    """A run of digits.yaml as training leaves it: metrics, held-out losses, pictures, scores."""
    for name in ("figs", "evals", "ckpts"):
        (folder / name).mkdir(parents=True)
    text = (ROOT / "configs" / "digits.yaml").read_text()
    text = text.replace("seed: 42", f"seed: {seed}").replace("runs/digits ", f"{folder} ")
    (folder / "config.yaml").write_text(text)
    values = 0.3 + shift + 0.01 * np.random.default_rng(seed).standard_normal(lines)
    constant = {"Learning_Rate": 2e-3, "Images_Per_Second": 500.0, "Time": "2026-11-25T04:26:20"}
    rows = [
        {"step": step, "images": 128 * step, "Vel_MSE": float(value) - step / 1e4, **constant}
        for step, value in zip(range(50, 50 * lines + 1, 50), values, strict=True)
    ]
    write_lines(folder / "metrics.jsonl", rows)
    losses = {"velocity": [0.4, 0.3, 0.2, 0.1], "consistency": [0.5, 0.4, 0.3, 0.2]}
    held_out = [{"step": step, "weights": losses, "average": losses} for step in (250, 500)]
    write_lines(folder / "held_out.jsonl", held_out)
    for step in (250, 500):
        pixels = np.full((8, 8, 3), step % 251 % 100 + 20 * seed, np.uint8)
        Image.fromarray(pixels).save(folder / "figs" / f"{step}.png")
    (folder / "ckpts" / "500.pt").write_bytes(bytes(3_000_000))
    (folder / "ckpts" / "500.json").write_text(json.dumps({"device": "abacus", "torch": "2.0"}))
    scores = [score(step, nfe, FD=9 / nfe + seed) for step in (250, 500) for nfe in (1, 2)]
    write_lines(folder / "evals" / "eval_results.jsonl", scores)
    (folder / "log.txt").write_text("2026-11-25 04:26:20 resumed at step 100 from ckpts/100.pt\n")
    return folder


def score(step: int, nfe: int, num_images: int = 600, **values: float) -> dict:
    """The record of a sample file's scores."""
    origin = {"step": step, "NFE": nfe, "num_images": num_images}
    made_by = {"reference": {"sha256": "a"}, "graph": {"sha256": "b"}}
    return {"file": f"{step}_{nfe}NFE_0.npz", "scores": values, **origin, **made_by}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
