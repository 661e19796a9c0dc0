"""A model in one HTML file: the graph, what runs it, and the page around them."""

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from support.page import ziggurat
from support.page.runtime import PACKAGE, VERSION, Runtime

HERE = Path(__file__).parent
WORKER = ("stream.js", "engine.js", "worker.js")  # together one module, and so is a test's in Node
# Where onnxruntime's script believes to come from; it fetches nothing, as it is given all it needs.
NOWHERE = "http://localhost/"


@dataclass(frozen=True)
class PagedModel:
    """What a page says of its model, and needs to sample from it."""

    title: str
    facts: Sequence[str]  # lines on what it is
    shape: tuple[int, int, int]  # [C, H, W]
    classes: Sequence[str]  # by name; none where it takes no label
    labels: Sequence[str]  # the same as Python's `sample` takes them, as written there
    num_classes: int
    steps: Mapping[int, Mapping[str, Sequence[float]]]  # times, and alpha and beta at them
    samplers: Mapping[str, str]  # what each does

    def described(self) -> dict[str, Any]:
        """What the page's scripts are told."""
        return {
            "title": self.title,
            "shape": self.shape,
            "isConditional": bool(self.classes),
            "classes": self.classes,
            "labels": self.labels,
            "numClasses": self.num_classes,
            "steps": self.steps,
            "samplers": self.samplers,
            "ziggurat": ziggurat.tables(),
        }


def assemble_page(model: PagedModel, graph: bytes, runtime: Runtime) -> str:
    """The page's text."""
    facts = "".join(f"<p>{html.escape(fact)}</p>" for fact in model.facts)
    return Template((HERE / "page.html").read_text()).substitute(
        title=html.escape(model.title),
        facts=facts,
        runtime_name=f"{PACKAGE} {VERSION}",
        style=(HERE / "page.css").read_text(),
        model=json.dumps(model.described()).replace("<", "\\u003c"),
        worker=worker_source(),
        page=(HERE / "page.js").read_text(),
        graph=_packed(graph),
        ort=_packed(as_expression(runtime.script.decode()).encode()),
        wasm=_packed(runtime.wasm),
    )


def as_expression(module: str) -> str:
    """An ES module as an expression, the object of what it exports.

    A worker of a page that is a file cannot be a module, nor import one.
    """
    body, exports = module.replace("import.meta.url", f'"{NOWHERE}"').rsplit("export{", 1)
    names = exports[: exports.index("}")].split(",")
    pairs = (name.split(" as ") for name in names)
    return (
        f"(() => {{{body}\nreturn {{{', '.join(f'{pair[-1]}: {pair[0]}' for pair in pairs)}}};}})()"
    )


def worker_source() -> str:
    """The scripts that draw, in one; they take onnxruntime's module as `ort`."""
    return "\n".join((HERE / name).read_text() for name in WORKER)


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def name_of(source: str, subfolder: str = "") -> str:
    """The name of a run, of an exported folder, or of a checkpoint with its run."""
    path = Path(source, subfolder)
    parts = [part for part in path.absolute().parts if part != "ckpts"]
    return f"{parts[-2]}-{path.stem}" if path.suffix in (".pt", ".safetensors") else parts[-1]
