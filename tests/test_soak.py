"""A long run neither grows nor slows down."""

import os
import time
from pathlib import Path
from statistics import median

import psutil
import pytest
from accelerate import Accelerator
from support.runs import ROOT

UPDATES, SETTLED = 2000, 200
TESTBED = ROOT / "tests" / "testbed"


@pytest.mark.slow
def test_two_thousand_updates(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checkpoint, a validation and a probe every hundred; all have been seen when the first measurement counts."""
    process, seen = psutil.Process(), []

    def measure(accelerator: Accelerator, values: dict, step: int, **_: object) -> None:
        seen.append((process.memory_info().rss, len(os.listdir("/proc/self/fd")), time.process_time()))

    monkeypatch.setattr(Accelerator, "log", measure)
    train(
        tmp_path, "--pretrained_model_name_or_path", str(TESTBED / "pipeline"), "--instance_data_dir",
        str(TESTBED / "subjects" / "smiley"), "--max_train_steps", str(UPDATES), "--checkpointing_steps", "100",
        "--checkpoints_total_limit", "2", "--validation_prompt", "a circle", "--validation_steps", "100",
        "--num_validation_images", "1", "--learning_rate", "1e-5", "--probe_steps", "100",
    )  # fmt: skip
    memory, files, moments = zip(*seen, strict=True)
    assert len(seen) == UPDATES
    seconds = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    early, late = median(seconds[SETTLED : 2 * SETTLED]), median(seconds[-SETTLED:])
    print(f"resident MB {memory[SETTLED] / 1e6:.0f} -> {memory[-1] / 1e6:.0f} (most {max(memory) / 1e6:.0f}), "
          f"files {files[SETTLED]} -> {files[-1]}, CPU ms an update {early * 1e3:.1f} -> {late * 1e3:.1f}")  # fmt: skip
    assert max(memory[SETTLED:]) < 1.05 * memory[SETTLED]
    assert min(files[-SETTLED:]) <= files[SETTLED]  # TensorBoard's thread opens its file for a moment now and then
    assert late < 1.1 * early
