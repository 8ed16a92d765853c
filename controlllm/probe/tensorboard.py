"""The probe in TensorBoard: scalars over layers, histograms of drift, and the figures as images."""

import importlib.util
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlllm.errors import UserError

Json = dict[str, Any]
SCALE = 1.5
"""Pixels per unit of a figure."""


def refuse_missing() -> None:
    spec = importlib.util.find_spec("tensorboard")
    if spec is None or spec.origin is None:  # a folder of that name is no package
        raise UserError(
            "--tensorboard: tensorboard is not installed; install it with pip install 'controlllm[trackers]'"
        )


def write_events(folder: Path, result: Json, rows: Sequence[Json]) -> None:
    """Steps are the places of layers, from the embeddings (0) up."""
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        for index, layer in enumerate(result["layers"]):
            for name in ("angle", "cosine", "norm_ratio", "cka"):
                if layer[name] is not None:
                    writer.add_scalar(f"probe/{name}", layer[name], index)
            angles = [row["angle"] for row in rows if row["index"] == index and row["angle"] is not None]
            if angles:
                writer.add_histogram("probe/angle_of_tokens", np.array(angles), index)
        for site in result["sites"]:
            for name in ("alpha", "distance"):
                writer.add_scalar(f"probe/site_{name}", site[name], site["index"])
        for number, figure in enumerate(result["figures"]):
            title = re.sub(r"[^\w .:,-]", "", figure["title"])
            writer.add_image(f"probe/{number:02d} {title}", image(figure["svg"]), dataformats="HWC")


def image(svg: str) -> Any:
    """A figure as (height, width, 3) of uint8, in the light page's colours."""
    import numpy as np
    import vl_convert
    from PIL import Image

    inks = _light()
    drawn = re.sub(r"var\((--[\w-]+)\)", lambda found: inks[found[1]], svg).replace("currentColor", inks["--ink"])
    head, _, body = drawn.partition(">")
    page = f'<rect width="100%" height="100%" fill="{inks["--card"]}"/>'  # blended there, where no colour is rounded
    drawn = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ') + ">" + page + body
    return np.asarray(Image.open(io.BytesIO(vl_convert.svg_to_png(drawn, scale=SCALE))).convert("RGB"))


def _light() -> dict[str, str]:
    """The style sheet's first colours, which are the light ones."""
    sheet = Path(__file__).parent.parent.joinpath("templates", "report.css").read_text()
    first = sheet.partition("}")[0]
    return dict(re.findall(r"(--[\w-]+):\s*(#\w+);", first))
