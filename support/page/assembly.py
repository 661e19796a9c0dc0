"""A model in one HTML file: its graph, the runtime for it, and the page around them."""

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from support.page.runtime import PACKAGE, VERSION, Runtime

HERE = Path(__file__).parent
WORKER = ("stream.js", "engine.js", "worker.js")  # joined to one script, here and in tests


def assemble_page(
    title: str, facts: Sequence[str], model: Mapping[str, Any], graph: bytes, runtime: Runtime
) -> str:
    """The page's text. `model` is the description that its scripts read."""
    return Template((HERE / "page.html").read_text()).substitute(
        title=html.escape(title),
        facts="".join(f"<p>{html.escape(fact)}</p>" for fact in facts),
        runtime_name=f"{PACKAGE} {VERSION}",
        style=(HERE / "page.css").read_text(),
        model=json.dumps({"title": title, **model}).replace("<", "\\u003c"),
        worker=worker_source(),
        page=(HERE / "page.js").read_text(),
        graph=_pack(graph),
        ort=_pack(as_expression(runtime.script.decode()).encode()),
        wasm=_pack(runtime.wasm),
    )


def as_expression(module: str) -> str:
    """An ES module as an expression: the object of its exports.

    The worker of a page that is a local file cannot be a module, nor import one. The script gets an
    address for its own, but fetches nothing from it.
    """
    body, exports = module.replace("import.meta.url", '"http://localhost/"').rsplit("export{", 1)
    pairs = [name.split(" as ") for name in exports[: exports.index("}")].split(",")]
    members = ", ".join(f"{pair[-1]}: {pair[0]}" for pair in pairs)
    return f"(() => {{{body}\nreturn {{{members}}};}})()"


def worker_source() -> str:
    """The worker's scripts in one. They use onnxruntime's module as `ort`."""
    return "\n".join((HERE / name).read_text() for name in WORKER)


def _pack(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def name_of(source: str, subfolder: str = "") -> str:
    """The name of a run, of an exported folder, or of a checkpoint with its run."""
    path = Path(source, subfolder)
    parts = [part for part in path.absolute().parts if part != "ckpts"]
    return f"{parts[-2]}-{path.stem}" if path.suffix in (".pt", ".safetensors") else parts[-1]
