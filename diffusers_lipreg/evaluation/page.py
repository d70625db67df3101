"""report.html: one file with tables, bars and thumbnails, which needs neither the network nor scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ..dreambooth.images import open_image
from .generation import ImageSpec
from .report import PAPER_COLUMNS, SIDES, Rows, drift_rows, paper_rows, score_rows, subject_rows, with_error
from .results import Images
from .scores import short_name

THUMBNAIL = 144  # pixels
Bars = Sequence[tuple[str, float | None, float | None]]  # name, value, standard error


def html(report: Mapping[str, Any], photos: Mapping[str, Sequence[Path]], images: Mapping[str, Images]) -> str:
    """Return the page. `photos` and `images` are those of each subject, by its name."""
    several = "mean" in report
    name = f"{len(report['subjects'])} subjects" if several else next(iter(report["subjects"].values()))["subject"]
    interval = "Means over subjects, with 95 % bootstrap intervals over subjects. " if several else ""
    sections = [
        f"<h1>{escape(name)}: personalized against base</h1>",
        _setup(report),
        f"<h2>Scores</h2>{_table(['', *SIDES.values()], score_rows(report))}<p class='note'>{interval}{SCORES_NOTE}</p>",
    ]
    if several:
        columns = ["", *report["mean"]["personalized"], "output drift, %"]
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


def _bars(title: str, rows: Bars) -> str:
    """Return a figure with a bar from zero for each row."""
    top = max((value or 0.0 for _, value, _ in rows), default=0.0) or 1.0
    lines = [
        f"<tr><td>{escape(name)}</td><td class='bars'><div class='bar' style='width: {100 * (value or 0) / top:.1f}%'>"
        f"</div></td><td>{with_error(value, error)}</td></tr>"
        for name, value, error in rows
    ]
    return f"<figure><figcaption>{escape(title)}</figcaption><table>{''.join(lines)}</table></figure>"


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
    figures = []
    for part, change in drift["parameters"].items():
        rows: Bars = [(block, values["drift_relative"], None) for block, values in change["by_block"].items()]
        figures.append(_bars(f"Weights of {part}: relative drift by block", rows))
    bins = drift["output"]["by_timestep"]
    rows = [(f"t = {b['timestep']:g}", b["output_drift_percent"], b["output_drift_percent_se"]) for b in bins]
    figures.append(_bars("Output drift by timestep, % ± standard error", rows))
    rows = [(f"{point['fraction']:g} of the drift", point["slope"], None) for point in drift["slopes"]]
    figures.append(_bars("Lipschitz slope ‖Δε‖ / ‖Δθ‖ between base and personalized", rows))
    drifted = _table(["", "", ""], drift_rows(subject))
    return f"<h3>What drifted</h3>{drifted}<div class='plots'>{''.join(figures)}</div>"


def _images(subject: Mapping[str, Any], photos: Sequence[Path], images: Images, first: int | None) -> str:
    """Return the photos, then base and personalized side by side: all images of each prompt, or the `first` ones."""
    strip = "".join(_thumbnail(path, path.name) for path in photos)
    base, personalized = images.base, images.personalized
    sets = [
        (f"Prompts with {subject['subject']}", base.subject, personalized.subject, first),
        (f"The class alone: {subject['class_noun']}", base.of_class, personalized.of_class, first or 4),
        ("Unrelated prompts", base.unrelated, personalized.unrelated, first),
    ]
    parts = [f"<h3>Images</h3><p class='note'>Photos of the subject:</p><div class='strip'>{strip}</div>"]
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
figure td { font-size: 12px; padding: .1rem .6rem .1rem 0; border: 0; } .bars { width: 240px; }
.bar { background: var(--mark); height: 14px; }
.images { margin-top: 1rem; width: 100%; } .images td:first-child { width: 13rem; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; } .strip img { width: 88px; height: 88px; object-fit: cover; }
"""

SCORES_NOTE = """DINO and CLIP-I compare images with photos of the subject, CLIP-T compares them with the prompt. A copy
of a photo has the highest DINO and CLIP-I, so read them together with drift and diversity. The authors of DreamBooth call
differences of about 0.1 in DINO and 0.05 in CLIP-T visible."""

PAPER_NOTE = "As published. Encoders and protocol may differ from those here, so small differences mean nothing."

NOTES = """<h2>How this was measured</h2>
<ul class="note">
<li>Scores are cosines of embeddings, averaged over all pairs. The text of CLIP-T lacks the unique token. A photo is not
compared with itself. DINO sees images resized to 256/224 of the model’s size and cropped in the center.</li>
<li>Diversity is 1 − the mean cosine between images of one prompt. It is not LPIPS, and not comparable to it.</li>
<li>Output drift is measured on the base’s own denoising steps for the unrelated prompts, at one step in each bin of
timesteps. Its standard error is over prompts.</li>
<li>The Lipschitz slope is measured on the straight line from the base to the personalized weights. Equal bars mean that
predictions change in proportion to the weights.</li>
<li>Path-KL sums w<sub>t</sub> ‖Δε‖² over the base’s denoising steps, with the guidance of the images and without a last
step that adds no noise. It bounds the divergence of stochastic (DDPM) samplers. For deterministic samplers, the difference
of images from the same noise bounds the squared Wasserstein distance.</li>
</ul>"""
