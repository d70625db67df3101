"""Summarize an evaluation: report.json with every number, and the tables that the terminal and report.html show."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers

from .. import __version__
from .generation import Sampling
from .prompts import Subject
from .scores import bootstrap_interval

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
PAPER_COLUMNS = ("DINO", "CLIP-T", "CLIP-I")
SIDES = {"personalized": "personalized", "base": "base", "real": "photos among themselves"}
Rows = list[list[str]]


def subject_info(subject: Subject) -> dict[str, Any]:
    """Return the entries of a subject in the report that are not numbers."""
    return {
        "subject": subject.text,
        "class_noun": subject.class_noun,
        "photos": str(subject.photos),
        "personalized": subject.personalized,
        "templates": list(subject.templates),
    }


def summarize(args: Namespace, sampling: Sampling, subjects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of report.json: settings, every subject, and for a data set the means over subjects."""
    dtype = str(sampling.dtype).removeprefix("torch.")
    images = {"scheduler": args.scheduler, "images_per_prompt": args.images_per_prompt, "dtype": dtype}
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    report: dict[str, Any] = {
        "base": args.base,
        "personalized": args.personalized,
        "sampling": sampling._asdict() | images,
        "encoders": {"dino": args.dino, "clip": args.clip},
        "versions": {"diffusers-lipreg": __version__} | versions,
        "subjects": dict(subjects),
    }
    if args.dataset is not None:
        found = list(subjects.values())
        report["mean"] = {
            side: {column: _over_subjects([s["scores"][side][column] for s in found]) for column in columns}
            for side, columns in found[0]["scores"].items()
        }
        drifts = [subject["drift"]["output"]["output_drift_percent"] for subject in found]
        report["mean_output_drift_percent"] = _over_subjects(drifts)
        report["paper"] = {
            f"{name}{suffix}": dict(zip(PAPER_COLUMNS, values, strict=True))
            for name, both in PAPER.items()
            for suffix, values in zip(("", " + penalty"), both, strict=True)
        }
    return report


def _over_subjects(values: Sequence[float | None]) -> dict[str, Any]:
    """Return the mean over subjects and its 95 % bootstrap interval."""
    known = [value for value in values if value is not None]  # a single photo has no score among the photos
    if not known:
        return {"mean": None, "interval": None, "subjects": 0}
    return {"mean": sum(known) / len(known), "interval": bootstrap_interval(known), "subjects": len(known)}


def number(value: float | None, digits: int = 3) -> str:
    """Return a value, rounded to significant digits, as tables show it."""
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text else text


def with_error(value: float | None, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error, 1)}"


def score_rows(report: Mapping[str, Any]) -> Rows:
    """Return the table of scores, of the only subject or the mean over all, with a row for each column of the report."""
    sides = report["mean"] if "mean" in report else next(iter(report["subjects"].values()))["scores"]

    def cell(score: Any) -> str:
        if isinstance(score, Mapping) and score["mean"] is not None:
            return "{:.3f} [{:.3f}, {:.3f}]".format(score["mean"], *score["interval"])
        return f"{score:.3f}" if isinstance(score, float) else "–"

    return [[column, *(cell(sides[side].get(column)) for side in SIDES)] for column in sides["personalized"]]


def paper_rows(report: Mapping[str, Any]) -> Rows:
    return [[name, *(f"{values[column]:.4f}" for column in PAPER_COLUMNS)] for name, values in report["paper"].items()]


def subject_rows(report: Mapping[str, Any]) -> Rows:
    """Return the trade-off: the scores of the personalized pipeline and the output drift, by subject."""
    return [
        [
            name,
            *(number(value) for value in subject["scores"]["personalized"].values()),
            number(subject["drift"]["output"]["output_drift_percent"]),
        ]
        for name, subject in report["subjects"].items()
    ]


def drift_rows(subject: Mapping[str, Any]) -> Rows:
    """Return the table of drift of one subject: name, value, and meaning of each number."""
    drift = subject["drift"]
    output, path_kl = drift["output"], drift["path_kl"]
    rows = []
    for part, change in drift["parameters"].items():
        value = f"{number(change['drift_relative'])} (‖Δθ‖ = {number(change['drift_norm'])})"
        rows.append([f"weights of {part}", value, "‖θ − θ₀‖ / ‖θ₀‖ of the tensors that changed"])
    value = with_error(output["output_drift_percent"], output["output_drift_percent_se"])
    rows.append(["output drift, %", value, "mean squared change of predictions, in percent of their mean square"])
    value = with_error(path_kl["nats"], path_kl.get("nats_se"))
    rows.append(["path-KL, nats per image", value, path_kl.get("reason", "bounds KL(base ‖ personalized)")])
    for column, change in subject["unrelated_change"].items():
        meaning = "1 − cosine" if column != "pixels" else "mean squared difference of values in [0, 1]"
        value = with_error(change["mean"], change["mean_se"])
        rows.append([f"unrelated prompts, {column}", value, f"{meaning}, same noise"])
    for column, value in subject["class_resemblance"]["personalized"].items():
        before = subject["class_resemblance"]["base"][column]
        meaning = f"images of “a {subject['class_noun']}” against the photos: {value:.3f}, of the base {before:.3f}"
        rows.append([f"class resemblance, {column}", f"{value - before:+.3f}", meaning])
    for column, value in subject["diversity"]["personalized"].items():
        before = number(subject["diversity"]["base"][column])
        rows.append([f"diversity, {column}", number(value), f"1 − cosine between images of one prompt; base {before}"])
    return rows


def table(report: Mapping[str, Any]) -> str:
    """Return the text to print: scores, then the drift of the only subject or the paper's table."""
    lines = [_text_table(["", *SIDES.values()], score_rows(report))]
    if "mean" in report:
        drift = report["mean_output_drift_percent"]
        lines.append("output drift {:.3g} % [{:.3g}, {:.3g}]".format(drift["mean"], *drift["interval"]))
        lines.append(f"Means over {len(report['subjects'])} subjects, with 95 % bootstrap intervals over subjects.")
        lines.append("\nThe paper's results, as published (encoders and protocol may differ):")
        lines.append(_text_table(["", *PAPER_COLUMNS], paper_rows(report)))
    else:
        (subject,) = report["subjects"].values()
        lines.append(_text_table(["", "", ""], drift_rows(subject)))
    return "\n".join(lines)


def _text_table(head: Sequence[str], rows: Rows) -> str:
    lines = [list(head), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
