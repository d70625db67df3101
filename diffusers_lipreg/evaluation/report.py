"""report.json with every number, and report.html, one file with tables, plots and images that needs no network."""

from __future__ import annotations

import base64
import io
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from .. import __version__
from ..dreambooth.data import open_image
from .generation import ImageSpec, Sampling, write_whole
from .plots import bars, number
from .prompts import Subject
from .results import Images
from .scores import bootstrap_interval, short_name

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
THUMBNAIL = 144  # pixels
Rows = list[list[str]]


def subject_info(subject: Subject) -> dict[str, Any]:
    """Return what the report says of a subject besides its numbers."""
    return {
        "subject": subject.text,
        "class_noun": subject.class_noun,
        "photos": str(subject.photos),
        "personalized": subject.personalized,
        "templates": list(subject.templates),
    }


def summarize(args: Namespace, sampling: Sampling, dtype: str, subjects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report: how it was made, every subject, and for a data set the means over subjects."""
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
        report["mean"] = {
            side: {
                column: _over_subjects([s["scores"][side][column] for s in subjects.values()]) for column in columns
            }
            for side, columns in next(iter(subjects.values()))["scores"].items()
        }
        drifts = [s["drift"]["output"]["output_drift_relative"] for s in subjects.values()]
        report["mean_output_drift_relative"] = _over_subjects(drifts)
        report["paper"] = {
            f"{name}{suffix}": dict(zip(PAPER_COLUMNS, values, strict=True))
            for name, both in PAPER.items()
            for suffix, values in zip(("", " + penalty"), both, strict=True)
        }
    return report


def _over_subjects(values: Sequence[float | None]) -> dict[str, Any]:
    """Return the macro mean, and the 95 % bootstrap interval over subjects."""
    there = [value for value in values if value is not None]  # photos among themselves need two
    if not there:
        return {"mean": None, "interval": None, "subjects": 0}
    return {"mean": sum(there) / len(there), "interval": bootstrap_interval(there), "subjects": len(there)}


def score_rows(report: Mapping[str, Any]) -> Rows:
    """Return the table of scores: a row for each column of the report, of the one subject or the mean over all."""
    sides = report["mean"] if "mean" in report else next(iter(report["subjects"].values()))["scores"]

    def cell(found: Any) -> str:
        if isinstance(found, Mapping) and found["mean"] is not None:
            return "{:.3f} [{:.3f}, {:.3f}]".format(found["mean"], *found["interval"])
        return f"{found:.3f}" if isinstance(found, float) else "–"

    return [[column, *(cell(sides[side].get(column)) for side in SIDES)] for column in sides["personalized"]]


def paper_rows(report: Mapping[str, Any]) -> Rows:
    return [[name, *(f"{values[column]:.4f}" for column in PAPER_COLUMNS)] for name, values in report["paper"].items()]


def subject_rows(report: Mapping[str, Any]) -> Rows:
    """Return the trade-off: for each subject every score of the personalized pipeline, and the output drift."""
    return [
        [
            name,
            *(number(value) for value in subject["scores"]["personalized"].values()),
            number(subject["drift"]["output"]["output_drift_relative"]),
        ]
        for name, subject in report["subjects"].items()
    ]


def drift_rows(subject: Mapping[str, Any]) -> Rows:
    """Return the table of what drifted, of one subject: what, how much, and what the number is."""

    def with_error(value: float | None, error: float | None) -> str:
        return number(value) if error is None else f"{number(value)} ± {number(error, 1)}"

    drift, rows = subject["drift"], []
    for part, change in drift["parameters"].items():
        value = f"{number(change['drift_relative'])} (‖Δθ‖ = {number(change['drift'])})"
        rows.append([f"weights of {part}", value, "‖θ − θ₀‖ / ‖θ₀‖ of the tensors that changed"])
    output, path_kl = drift["output"], drift["path_kl"]
    value = with_error(output["output_drift_relative"], output["standard_error"])
    rows.append(["output drift", value, "mean squared change of predictions, over their mean square"])
    value = with_error(path_kl["nats"], path_kl.get("standard_error"))
    rows.append(["path-KL, nats per image", value, path_kl.get("reason", "bounds KL(base ‖ personalized)")])
    for column, change in subject["unrelated_change"].items():
        what = "1 − cosine" if column != "pixels" else "mean squared difference of values in [0, 1]"
        value = with_error(change["mean"], change["standard_error"])
        rows.append([f"unrelated prompts, {column}", value, f"{what}, same noise"])
    for column, value in subject["class_resemblance"]["personalized"].items():
        before = subject["class_resemblance"]["base"][column]
        what = f"images of “a {subject['class_noun']}” against the photos: {value:.3f}, of the base {before:.3f}"
        rows.append([f"class resemblance, {column}", f"{value - before:+.3f}", what])
    for column, value in subject["diversity"]["personalized"].items():
        what = f"1 − cosine between images of one prompt; base {number(subject['diversity']['base'][column])}"
        rows.append([f"diversity, {column}", number(value), what])
    return rows


def table(report: Mapping[str, Any]) -> str:
    """Return the text to print: scores, and drift or the paper's table."""
    lines = [_text_table(["", *SIDES.values()], score_rows(report))]
    if "mean" in report:
        drift = report["mean_output_drift_relative"]
        lines.append("output drift {:.3g} [{:.3g}, {:.3g}]".format(drift["mean"], *drift["interval"]))
        lines.append(f"Means over {len(report['subjects'])} subjects, with 95 % bootstrap intervals over subjects.")
        lines.append("\nThe paper's, as published (its encoders and protocol may differ from ours):")
        lines.append(_text_table(["", *PAPER_COLUMNS], paper_rows(report)))
    else:
        (subject,) = report["subjects"].values()
        lines.append(_text_table(["", "", ""], drift_rows(subject)))
    return "\n".join(lines)


def _text_table(head: Sequence[str], rows: Rows) -> str:
    lines = [list(head), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write_report(
    output_dir: Path, report: Mapping[str, Any], photos: Mapping[str, Sequence[Path]], images: Mapping[str, Images]
) -> None:
    """Write report.json and report.html."""
    texts = {
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.html": html(report, photos, images),
    }
    for name, text in texts.items():
        write_whole(output_dir / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def html(report: Mapping[str, Any], photos: Mapping[str, Sequence[Path]], images: Mapping[str, Images]) -> str:
    """Return the page."""
    several = "mean" in report
    name = f"{len(report['subjects'])} subjects" if several else next(iter(report["subjects"].values()))["subject"]
    interval = "Means over subjects, with 95 % bootstrap intervals over subjects. " if several else ""
    sections = [
        f"<h1>{escape(name)}: personalized against base</h1>",
        _setup(report),
        f"<h2>Scores</h2>{_table(['', *SIDES.values()], score_rows(report))}<p class='note'>{interval}{SCORES_NOTE}</p>",
    ]
    if several:
        columns = ["", *report["mean"]["personalized"], "output drift"]
        sections.append(f"<h2>The paper’s table</h2>{_table(['', *PAPER_COLUMNS], paper_rows(report))}")
        sections.append(f"<p class='note'>{PAPER_NOTE}</p>")
        sections.append(f"<h2>Scores against drift, by subject</h2>{_table(columns, subject_rows(report))}")
    for key, subject in report["subjects"].items():
        if several:
            sections.append(f'<h2 id="{escape(key)}">{escape(key)}: {escape(subject["subject"])}</h2>')
        sections += [_drift(subject), _images(subject, photos[key], images[key], 1 if several else None)]
    return PAGE.format(title=escape(name), style=STYLE, body="\n".join([*sections, NOTES]))


def _table(head: Sequence[str], rows: Rows) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    return f"<table>{top}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _setup(report: Mapping[str, Any]) -> str:
    s = report["sampling"]
    sampler = s["scheduler"] or "the pipeline's own sampler"
    size = f"{s['resolution']} pixels" if s["resolution"] else "the pipeline's own size"
    versions = ", ".join(f"{library} {version}" for library, version in report["versions"].items())
    return (
        f"<p>Base <code>{escape(short_name(report['base']))}</code>, personalized "
        f"<code>{escape(short_name(report['personalized']))}</code>. "
        f"{s['images_per_prompt']} images of each prompt, {s['num_inference_steps']} steps of {escape(sampler)}, guidance "
        f"{s['guidance_scale']:g}, {size}, {s['dtype']}, seed {s['seed']}. <small>{escape(versions)}</small></p>"
    )


def _drift(subject: Mapping[str, Any]) -> str:
    drift = subject["drift"]
    plots = []
    for part, change in drift["parameters"].items():
        rows = [(block, values["drift_relative"], None) for block, values in change["by_block"].items()]
        plots.append((f"Weights of {part}: relative drift by block", rows))
    bins = drift["output"]["by_timestep"]
    rows = [(f"t = {b['timestep']:g}", b["output_drift_relative"], b["standard_error"]) for b in bins]
    plots.append(("Output drift by timestep, relative, ± standard error", rows))
    rows = [(f"{point['fraction']:g} of the drift", point["slope"], None) for point in drift["slopes"]]
    plots.append(("Lipschitz slope ‖Δε‖ / ‖Δθ‖ on the way", rows))
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{bars(rows)}</figure>" for title, rows in plots
    )
    return f"<h3>What drifted</h3>{_table(['', '', ''], drift_rows(subject))}<div class='plots'>{figures}</div>"


def _images(subject: Mapping[str, Any], photos: Sequence[Path], images: Images, first: int | None) -> str:
    """Return photos, then base and personalized side by side; of each prompt all images or the `first` ones."""
    strip = "".join(_thumbnail(path, path.name) for path in photos)
    base, personalized = images.base, images.personalized
    sets = [
        (f"Prompts with {subject['subject']}", base.subject, personalized.subject, first),
        (f"The class alone: {subject['class_noun']}", base.of_class, personalized.of_class, first or 4),
        ("Unrelated prompts", base.unrelated, personalized.unrelated, first),
    ]
    parts = [f"<h3>Images</h3><p class='note'>The subject's photos:</p><div class='strip'>{strip}</div>"]
    for title, before, after, count in sets:
        rows = "".join(_image_row(b[:count], a[:count]) for b, a in zip(before, after, strict=True))
        head = f"<tr><th>{escape(title)}</th><th>base</th><th>personalized, same noise</th></tr>"
        parts.append(f"<table class='images'><thead>{head}</thead><tbody>{rows}</tbody></table>")
    return "".join(parts)


def _image_row(before: Sequence[ImageSpec], after: Sequence[ImageSpec]) -> str:
    cells = [f"<td>{escape(before[0].prompt)}</td>"]
    for side in (before, after):
        strip = "".join(_thumbnail(image.path, f"{image.prompt}, {image.number}") for image in side)
        cells.append(f"<td><div class='strip'>{strip}</div></td>")
    return f"<tr>{''.join(cells)}</tr>"


def _thumbnail(path: Path, title: str) -> str:
    image = open_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(title)}" title="{escape(title)}">'


PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: personalized against base</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --mark: #2a6f97; --ground: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a0a0a0; --line: #3a3a3a; --mark: #6fb3d6; --ground: #16181a; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 1040px;
  margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2rem; } small, .note { color: var(--soft); font-size: .87rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin-top: 1.2rem; }
figure { margin: 0; } figcaption { font-size: .87rem; font-weight: 600; margin-bottom: .4rem; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg .end { text-anchor: end; } svg .fill { fill: var(--mark); } svg .line { stroke: var(--ink); }
.images { margin-top: 1rem; width: 100%; } .images td:first-child { width: 13rem; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; } .strip img { width: 88px; height: 88px; object-fit: cover; }
"""

SCORES_NOTE = """DINO and CLIP-I compare images with the subject’s photos, CLIP-T with the prompt. The first two are highest
for a copy of a photo: read them beside drift and diversity. DreamBooth’s authors call differences of about 0.1 in DINO and
0.05 in CLIP-T visible."""

PAPER_NOTE = "As published; its encoders and protocol may differ from those here, so small differences say nothing."

NOTES = """<h2>How this was measured</h2>
<ul class="note">
<li>Scores are raw cosines of normalized embeddings, averaged over all pairs; the unique token is not in CLIP-T’s text; pairs
of a photo with itself do not count. DINO sees images resized to 256/224 of the model’s size, cropped in the center.</li>
<li>Diversity is 1 − the mean cosine between images of one prompt. It is not LPIPS, and not comparable to it.</li>
<li>Output drift is measured on chains of the base’s own denoising steps on the unrelated prompts, one sample in each bin of
timesteps. The standard error is that over chains.</li>
<li>The Lipschitz slope is taken on the straight way from the base to the personalized weights: equal bars mean that
predictions change in proportion to the weights.</li>
<li>Path-KL sums w<sub>t</sub> ‖Δε‖² over the steps of the base’s chains, guided as the images are, without a last step that
adds no noise. It bounds the divergence for stochastic (DDPM) samplers. For deterministic ones the difference of images from
the same noise bounds the squared Wasserstein distance.</li>
</ul>"""
