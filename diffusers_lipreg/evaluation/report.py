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
from .generation import Drawing, Sampling, write_whole
from .plots import bars, decades, number, scatter
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
SIDES = {"personalized": "personalised", "base": "base", "real": "photos among themselves"}
THUMBNAIL = 144  # pixels


def summarize(args: Namespace, how: Sampling, dtype: str, subjects: Mapping[str, Any]) -> dict[str, Any]:
    """The report: how it was made, every subject, and means over subjects where there are several."""
    report: dict[str, Any] = {
        "base": args.base,
        "personalized": args.personalized,
        "sampling": how._asdict() | {"scheduler": args.scheduler, "images_per_prompt": args.images_per_prompt, "dtype": dtype},
        "encoders": {"dino": args.dino, "clip": args.clip},
        "versions": {"diffusers-lipreg": __version__}
        | {library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
        "subjects": dict(subjects),
    }
    if args.dataset is not None:
        report["mean"] = {
            side: {column: _over_subjects([s["scores"][side][column] for s in subjects.values()]) for column in columns}
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
    """The macro mean, and the 95 % bootstrap interval over subjects."""
    there = [value for value in values if value is not None]  # photos among themselves need two
    if not there:
        return {"mean": None, "interval": None, "subjects": 0}
    return {"mean": sum(there) / len(there), "interval": bootstrap_interval(there), "subjects": len(there)}


def score_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The table of scores: a row for each column of the report, of the one subject or the mean over all."""
    if "mean" in report:

        def cell(side: str, column: str) -> str:
            entry = report["mean"][side].get(column)
            if entry is None or entry["mean"] is None:
                return "–"
            low, high = entry["interval"]
            return f"{entry['mean']:.3f} [{low:.3f}, {high:.3f}]"

        columns = report["mean"]["personalized"]
    else:
        (subject,) = report["subjects"].values()

        def cell(side: str, column: str) -> str:
            value = subject["scores"][side].get(column)
            return "–" if value is None else f"{value:.3f}"

        columns = subject["scores"]["personalized"]
    return [[column, *(cell(side, column) for side in SIDES)] for column in columns]


def drift_rows(subject: Mapping[str, Any]) -> list[list[str]]:
    """The table of what drifted, of one subject: what, how much, and what that is."""
    drift, rows = subject["drift"], []
    for part, change in drift["parameters"].items():
        value = f"{number(change['drift_relative'])} (‖Δθ‖ = {number(change['drift'])})"
        rows.append([f"weights of {part}", value, "‖θ − θ₀‖ / ‖θ₀‖ of the tensors that changed"])
    output = drift["output"]
    value = _with_error(output["output_drift_relative"], output["standard_error"])
    rows.append(["output drift", value, "mean squared change of predictions, over their mean square"])
    value = _with_error(drift["path_kl"]["nats"], drift["path_kl"].get("standard_error"))
    rows.append(["path-KL, nats per image", value, drift["path_kl"].get("reason", "bounds KL(base ‖ personalised)")])
    for column, change in subject["unrelated_change"].items():
        what = "1 − cosine" if column != "pixels" else "mean squared difference of values in [0, 1]"
        value = _with_error(change["mean"], change["standard_error"])
        rows.append([f"unrelated prompts, {column}", value, f"{what}, same noise"])
    for column, value in subject["class_resemblance"]["personalized"].items():
        before = subject["class_resemblance"]["base"][column]
        what = f"images of “a {subject['class_noun']}” against the photos: {value:.3f}, of the base {before:.3f}"
        rows.append([f"class resemblance, {column}", f"{value - before:+.3f}", what])
    for column, value in subject["diversity"]["personalized"].items():
        before = subject["diversity"]["base"][column]
        what = f"1 − cosine between images of one prompt; base {number(before)}"
        rows.append([f"diversity, {column}", number(value), what])
    return rows


def _with_error(value: float | None, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error, 1)}"


def table(report: Mapping[str, Any]) -> str:
    """What is printed: scores, and drift or the paper's table."""
    lines = [_text_table(["", *SIDES.values()], score_rows(report))]
    if "mean" in report:
        drift = report["mean_output_drift_relative"]
        lines.append("output drift {:.3g} [{:.3g}, {:.3g}]".format(drift["mean"], *drift["interval"]))
        lines.append(f"Means over {len(report['subjects'])} subjects, with 95 % bootstrap intervals over subjects.")
        lines.append("\nThe paper's, as published (its encoders and protocol may differ from ours):")
        rows = [[name, *(f"{values[column]:.4f}" for column in PAPER_COLUMNS)] for name, values in report["paper"].items()]
        lines.append(_text_table(["", *PAPER_COLUMNS], rows))
    else:
        (subject,) = report["subjects"].values()
        lines.append(_text_table(["", "", ""], drift_rows(subject)))
    return "\n".join(lines)


def _text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows])


def write_report(
    output_dir: Path, report: Mapping[str, Any], photos: Mapping[str, Sequence[Path]], images: Mapping[str, Images]
) -> None:
    """Writes report.json and report.html."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_whole(output_dir / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
    page = html(report, photos, images)
    write_whole(output_dir / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def html(report: Mapping[str, Any], photos: Mapping[str, Sequence[Path]], images: Mapping[str, Images]) -> str:
    """The page."""
    several = "mean" in report
    name = f"{len(report['subjects'])} subjects" if several else next(iter(report["subjects"].values()))["subject"]
    sections = [f"<h1>{escape(name)}: personalised against base</h1>", _how(report), _scores(report)]
    if several:
        sections += [_paper(report), _trade_off(report)]
    for subject_name, subject in report["subjects"].items():
        if several:
            sections.append(f'<h2 id="{escape(subject_name)}">{escape(subject_name)}: {escape(subject["subject"])}</h2>')
        sections += [
            _drift(subject),
            _images(subject, photos[subject_name], images[subject_name], 1 if several else None),
        ]
    sections.append(NOTES)
    return PAGE.format(title=escape(name), style=STYLE, body="\n".join(sections))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    return f"<table>{top}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _how(report: Mapping[str, Any]) -> str:
    s = report["sampling"]
    sampler = s["scheduler"] or "the pipeline's own sampler"
    size = f"{s['resolution']} pixels" if s["resolution"] else "the pipeline's own size"
    versions = ", ".join(f"{library} {version}" for library, version in report["versions"].items())
    return (
        f"<p>Base <code>{escape(short_name(report['base']))}</code>, personalised "
        f"<code>{escape(short_name(report['personalized']))}</code>. "
        f"{s['images_per_prompt']} images of each prompt, {s['num_inference_steps']} steps of {escape(sampler)}, guidance "
        f"{s['guidance_scale']:g}, {size}, {s['dtype']}, seed {s['seed']}. <small>{escape(versions)}</small></p>"
    )


def _scores(report: Mapping[str, Any]) -> str:
    note = (
        "DINO and CLIP-I compare images with the subject's photos, CLIP-T with the prompt. The first two are highest for a "
        "copy of a photo: read them beside drift and diversity. DreamBooth’s authors call differences of about 0.1 in DINO "
        "and 0.05 in CLIP-T visible."
    )
    if "mean" in report:
        note = f"Means over {len(report['subjects'])} subjects, with 95 % bootstrap intervals over subjects. {note}"
    return f"<h2>Scores</h2>{_table(['', *SIDES.values()], score_rows(report))}<p class='note'>{note}</p>"


def _paper(report: Mapping[str, Any]) -> str:
    rows = [[name, *(f"{values[column]:.4f}" for column in PAPER_COLUMNS)] for name, values in report["paper"].items()]
    note = "As published; its encoders and protocol may differ from those here, so small differences say nothing."
    return f"<h2>The paper’s table</h2>{_table(['', *PAPER_COLUMNS], rows)}<p class='note'>{note}</p>"


def _trade_off(report: Mapping[str, Any]) -> str:
    column = next(iter(report["mean"]["personalized"]))
    points = [
        (subject["drift"]["output"]["output_drift_relative"], subject["scores"]["personalized"][column], name)
        for name, subject in report["subjects"].items()
    ]
    return f"<h2>Subject score against drift</h2>{scatter(points, 'output drift', column)}"


def _drift(subject: Mapping[str, Any]) -> str:
    drift = subject["drift"]
    plots = []
    for part, change in drift["parameters"].items():
        rows = [(block, values["drift_relative"], None) for block, values in change["by_block"].items()]
        plots.append((f"Weights of {part}: relative drift by block", bars(rows)))
    rows = [(f"t = {b['timestep']:g}", b["output_drift_relative"], b["standard_error"]) for b in drift["output"]["by_timestep"]]
    plots.append(("Output drift by timestep, relative, ± standard error", bars(rows)))
    rows = [(f"{point['fraction']:g} of the drift", point["slope"], None) for point in drift["slopes"]]
    plots.append(("Lipschitz slope ‖Δε‖ / ‖Δθ‖ on the way", bars(rows)))
    if drift["path_kl"]["nats"] is not None:
        points = [(float(step["timestep"]), step["nats"]) for step in drift["path_kl"]["by_step"]]
        plots.append(("Path-KL by step", decades(points, "timestep", "nats")))
    figures = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{plot}</figure>" for title, plot in plots)
    return f"<h3>What drifted</h3>{_table(['', '', ''], drift_rows(subject))}<div class='plots'>{figures}</div>"


def _images(subject: Mapping[str, Any], photos: Sequence[Path], images: Images, first: int | None) -> str:
    """Photos, then base and personalised side by side; of each prompt all images or the `first` ones."""
    strip = "".join(_thumbnail(path, path.name) for path in photos)
    base, tuned = images.base, images.personalized
    sets = [
        (f"Prompts with {subject['subject']}", base.subject, tuned.subject, first),
        (f"The class alone: {subject['class_noun']}", base.of_class, tuned.of_class, first or 4),
        ("Unrelated prompts", base.unrelated, tuned.unrelated, first),
    ]
    parts = [f"<h3>Images</h3><p class='note'>The subject's photos:</p><div class='strip'>{strip}</div>"]
    for title, before, after, count in sets:
        rows = "".join(_image_row(b[:count], a[:count]) for b, a in zip(before, after, strict=True))
        head = f"<tr><th>{escape(title)}</th><th>base</th><th>personalised, same noise</th></tr>"
        parts.append(f"<table class='images'><thead>{head}</thead><tbody>{rows}</tbody></table>")
    return "".join(parts)


def _image_row(before: Sequence[Drawing], after: Sequence[Drawing]) -> str:
    cells = ("".join(_thumbnail(image.path, f"{image.prompt}, {image.number}") for image in side) for side in (before, after))
    return f"<tr><td>{escape(before[0].prompt)}</td>" + "".join(f"<td><div class='strip'>{c}</div></td>" for c in cells) + "</tr>"


def _thumbnail(path: Path, title: str) -> str:
    image = open_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(title)}" title="{escape(title)}">'


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}: personalised against base</title>
<style>{style}</style>
</head>
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
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1.05rem; margin-top: 1.6rem; }
code { font-size: .92em; } small, .note { color: var(--soft); font-size: .87rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin-top: 1.2rem; }
figure { margin: 0; } figcaption { font-size: .87rem; font-weight: 600; margin-bottom: .4rem; }
svg { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 12px; } svg .small { fill: var(--soft); font-size: 11px; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .fill { fill: var(--mark); } svg .line { stroke: var(--ink); }
svg .grid { stroke: var(--line); } svg .curve { fill: none; stroke: var(--mark); stroke-width: 2; }
.images { margin-top: 1rem; width: 100%; } .images td:first-child { width: 13rem; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; } .strip img { width: 88px; height: 88px; object-fit: cover; }
"""

NOTES = """<h2>How this was measured</h2>
<ul class="note">
<li>Scores are raw cosines of normalised embeddings, averaged over all pairs; the unique token is not in CLIP-T’s text; pairs
of a photo with itself do not count. DINO sees images resized to 256/224 of the model’s size, cropped in the centre.</li>
<li>Diversity is 1 − the mean cosine between images of one prompt. It is not LPIPS, and its numbers are not comparable to it.</li>
<li>Output drift is measured on fixed probes: chains of the base’s own denoising steps on the unrelated prompts, one sample in
each bin of timesteps. The standard error is that over chains.</li>
<li>The Lipschitz slope is taken on the straight way from the base to the personalised weights: equal bars mean that predictions
change in proportion to the weights.</li>
<li>Path-KL sums w<sub>t</sub> ‖Δε‖² over the steps of the base’s chains, guided as the images are; a last step without noise is
left out. It bounds the divergence for stochastic (DDPM) samplers. For deterministic ones the same-noise difference of images
bounds the squared Wasserstein distance.</li>
<li>An image of base and personalised pipeline at the same place starts from the same noise.</li>
</ul>"""
