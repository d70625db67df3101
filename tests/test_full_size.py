"""A UNet of Stable Diffusion 1.5's size, trained whole by the script on a machine with 24 GB and no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.published import PARAMETERS, make_unet
from diffusers import StableDiffusionPipeline
from support.runs import PARITY, ROOT, flags
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

MEASURE = """
import json, re, resource, sys
from pathlib import Path
from accelerate import Accelerator
import train_dreambooth_lipreg as script
from diffusers_lipreg import LipschitzDriftLoss

def anonymous_mb():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

def take_snapshot(args, base, models, name, take=script.take_snapshot):
    before = anonymous_mb()
    snapshot = take(args, base, models, name)
    loss = LipschitzDriftLoss(snapshot, 1.0, args.lipreg_reduction)
    loss.measure(models[name])  # one pass of the penalty, and the teacher's norm, count as well
    found["drift at the start"] = loss.logs["drift"]
    found["teacher_mb"] = anonymous_mb() - before
    return snapshot

found = {}
script.take_snapshot = take_snapshot
Accelerator.log = lambda self, values, step, **_: found.update({str(step): values})
script.main(script.parse_args(sys.argv[1:]))
found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print(json.dumps(found))
"""


def save_pipeline(folder: Path) -> None:
    """A whole UNet of random weights in float16, beside a small VAE and a small text encoder of the right width."""
    pipe = StableDiffusionPipeline.from_pretrained(PARITY / "pipeline", safety_checker=None)
    unet = make_unet("sd15").half().to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.02)
    assert sum(parameter.numel() for parameter in unet.parameters()) == PARAMETERS["sd15"]
    text = CLIPTextConfig.from_dict(
        pipe.text_encoder.config.to_dict()
        | {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 12}
    )
    pipe.register_modules(unet=unet, text_encoder=CLIPTextModel(text))
    pipe.save_pretrained(folder)


@pytest.mark.slow
def test_a_whole_unet_with_its_teacher_on_the_disk(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "base")
    ran = subprocess.run(
        [
            *(sys.executable, "-c", MEASURE, *flags(tmp_path / "out")),
            *("--pretrained_model_name_or_path", str(tmp_path / "base"), "--resolution", "256"),
            *("--learning_rate", "2e-6", "--lipreg_teacher_device", "disk"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(os.cpu_count())},
        capture_output=True,
        text=True,
        timeout=1800,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    print(json.dumps(found))
    assert found["drift at the start"] == 0 == found["1"]["drift"]
    assert found["2"]["drift"] > 0
    assert found["teacher_mb"] <= 300
    assert found["peak_gb"] <= 24
