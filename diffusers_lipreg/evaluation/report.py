"""Report an evaluation: report.json with every number, and tables of them on the terminal and in report.html."""

from __future__ import annotations

import base64
import io
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jinja2
import torch
import transformers
from PIL.Image import Resampling

from .. import __version__
from ..dreambooth.images import open_image
from ..errors import RunError
from .encoders import short_name
from .generation import SubjectFiles
from .scores import SIDES, mean_over_subjects

# Kim, Park, Kim, ICLR 2026 (arXiv 2505.19519), tables of results: DINO, CLIP-T, CLIP-I, plain and with the penalty.
PAPER = {
    "SD1.5 DreamBooth": ((0.6028, 0.2793, 0.7881), (0.6394, 0.2976, 0.7948)),
    "SD1.5 Custom Diffusion": ((0.5568, 0.3154, 0.7539), (0.5638, 0.3158, 0.7550)),
    "SD1.5 DreamBooth-LoRA": ((0.5776, 0.3108, 0.7739), (0.6038, 0.2975, 0.7915)),
    "SDXL Custom Diffusion": ((0.5337, 0.3239, 0.7485), (0.5493, 0.3251, 0.7540)),
    "SDXL DreamBooth-LoRA": ((0.6562, 0.3099, 0.7970), (0.6819, 0.3014, 0.8103)),
    "SD3 Custom Diffusion": ((0.6168, 0.3031, 0.7929), (0.6271, 0.2955, 0.8023)),
    "SD3 DreamBooth-LoRA": ((0.6043, 0.3098, 0.7823), (0.6217, 0.3103, 0.7949)),
}
THUMBNAIL = 144  # pixels


class Table(NamedTuple):
    """A table of the report."""

    head: Sequence[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [list(self.head), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def check_place(folder: Path) -> None:
    """Refuse a folder with a report.json or report.html that no evaluation wrote."""
    try:
        ours = "diffusers-lipreg" in json.loads((folder / "report.json").read_text(encoding="utf-8"))["versions"]
    except Exception:  # there is none, or the file holds anything else
        ours = False
    for name in ("report.json", "report.html"):
        if (folder / name).exists() and not ours:
            raise RunError(
                f"--output_dir {folder}: {name} in it is not of an evaluation. Move it, or name another folder."
            )


def summarize(args: Namespace, subjects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of report.json: the flags, every subject, and for a data set the means over subjects."""
    libraries = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    report: dict[str, Any] = {
        "flags": vars(args),
        "versions": {"diffusers-lipreg": __version__, **libraries},
        "subjects": dict(subjects),
    }
    if args.dataset is not None:
        found = list(subjects.values())
        report["mean"] = {
            side: {column: mean_over_subjects([s["scores"][side][column] for s in found]) for column in columns}
            for side, columns in found[0]["scores"].items()
        }
        drifts = [subject["drift"]["output"]["output_drift_percent"] for subject in found]
        report["mean_output_drift_percent"] = mean_over_subjects(drifts)
    return report


def number(value: float | None, error: float | None = None) -> str:
    """Return a value, and its standard error if there is one, as tables show them."""
    if value is None:
        return "–"
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.1g}"


def score_table(sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of scores of a subject, or of the means over subjects with their intervals."""

    def cell(score: Any) -> str:
        if isinstance(score, Mapping):
            return "{:.3f} [{:.3f}, {:.3f}]".format(score["mean"], *score["interval"])
        return "–" if score is None else f"{score:.3f}"

    rows = [[column, *(cell(sides[side].get(column)) for side in SIDES)] for column in sides["personalized"]]
    return Table(["", *SIDES.values()], rows)


def drift_table(subject: Mapping[str, Any]) -> Table:
    """Return the table of what drifted for a subject: name, value, and meaning of each number."""
    drift = subject["drift"]
    output, path_kl = drift["output"], drift["path_kl"]
    rows = []
    for part, change in drift["parameters"].items():
        value = f"{number(change['drift_relative'])} (‖Δθ‖ = {number(change['drift_norm'])})"
        rows.append([f"weights of {part}", value, "‖θ − θ₀‖ / ‖θ₀‖ of the tensors that changed"])
    value = number(output["output_drift_percent"], output["output_drift_percent_se"])
    rows.append(["output drift, %", value, "mean squared change of predictions, in percent of their mean square"])
    value = number(path_kl["nats"], path_kl.get("nats_se"))
    rows.append(["path-KL, nats per image", value, path_kl.get("reason", "bounds KL(base ‖ personalized)")])
    for column, change in subject["unrelated_change"].items():
        meaning = "1 − cosine" if column != "pixels" else "mean squared difference of values in [0, 1]"
        value = number(change["mean"], change["mean_se"])
        rows.append([f"unrelated prompts, {column}", value, f"{meaning}, same noise"])
    return Table(["What drifted", "", ""], rows)


def paper_table() -> Table:
    rows = [[name, *(f"{a:.4f} → {b:.4f}" for a, b in zip(*both, strict=True))] for name, both in PAPER.items()]
    return Table(["The paper: plain → with the penalty", "DINO", "CLIP-T", "CLIP-I"], rows)


def text(report: Mapping[str, Any]) -> str:
    """Return what to print: scores, then the drift of the only subject or the paper's table."""
    if "mean" not in report:
        (subject,) = report["subjects"].values()
        return f"{score_table(subject['scores'])}\n\n{drift_table(subject)}"
    drift = report["mean_output_drift_percent"]
    lines = [
        str(score_table(report["mean"])),
        "output drift {:.3g} % [{:.3g}, {:.3g}]".format(drift["mean"], *drift["interval"]),
        f"Means over {len(report['subjects'])} subjects, with 95 % bootstrap intervals over subjects.",
        f"\n{paper_table()}",
        "As published. Encoders and protocol may differ from those here.",
    ]
    return "\n".join(lines)


def html(report: Mapping[str, Any], files: Mapping[str, SubjectFiles]) -> str:
    """Return report.html: one file, which needs neither the network nor scripts."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    functions = (short_name, number, score_table, drift_table, paper_table, figures, image_rows, thumbnail)
    environment.globals |= {function.__name__: function for function in functions}
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report, files=files)


def figures(drift: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bars of each figure: name, value, standard error."""
    found = {
        f"Weights of {part}: relative drift by block": [
            (block, values["drift_relative"], None) for block, values in change["by_block"].items()
        ]
        for part, change in drift["parameters"].items()
    }
    found["Output drift by timestep, % ± standard error"] = [
        (f"t = {point['timestep']:g}", point["output_drift_percent"], point["output_drift_percent_se"])
        for point in drift["output"]["by_timestep"]
    ]
    found["Lipschitz slope ‖Δε‖ / ‖Δθ‖ between base and personalized"] = [
        (f"{point['fraction']:g} of the drift", point["slope"], None) for point in drift["slopes"]
    ]
    return found


def image_rows(subject: Mapping[str, Any], files: SubjectFiles, shown: int | None) -> dict[str, Any]:
    """Return prompts with the `shown` first images of the base and the personalized pipeline, by title."""
    titles = [f"Prompts with {subject['text']}", f"The class alone: {subject['class_noun']}", "Unrelated prompts"]
    folders = [files.folders[side] for side in ("base", "personalized")]
    return {
        title: [
            (row[0].prompt, *([image.path(folder) for image in row[:shown]] for folder in folders)) for row in rows
        ]
        for title, rows in zip(titles, files.images, strict=True)
    }


def thumbnail(path: Path) -> str:
    """Return a small copy of an image as a data URI."""
    image = open_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
