"""lmms-eval's own models beside ours with nothing compressed: the same answers, document by document.

Both run from the embedded checkpoints, by lmms-eval's evaluator, in a process of their own (this file as a program),
because lmms-eval's models set things for a whole process and its tasks write into the working folder. Asked are all
mirrors that a family can answer, and images and clips of sizes that no mirror has.

What differs, and is not ours to follow: lmms-eval's `qwen2_5_vl` ends with an error at a clip of one frame, because it
asks for two of them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

LIMIT = 2  # documents of a mirror
PICTURES, CLIPS, SINGLE = "sized_images", "sized_clips", "single_frames"
# (width, height): long and narrow both ways, one token, no multiple of a token's side, above the most pixels.
SIZES = ((30, 900), (900, 30), (28, 28), (333, 217), (640, 480), (3000, 2000))
# (frames, width, height, frames a second): fewer frames than are shown, odd numbers, more, and above a frame's pixels.
SHOTS = (
    (2, 320, 240, 2),
    (3, 320, 240, 24),
    (9, 640, 360, 5),
    (31, 320, 240, 30),
    (200, 320, 240, 30),
    (40, 1920, 1080, 30),
)
ONE_FRAME = (1, 320, 240, 2)
# Left to themselves the checkpoints end most answers to such documents at once: equal, but for no reason to be trusted.
LEAST = 6  # tokens of an answer
Answers = dict[str, dict[str, str]]


def evaluate(model: str, arguments: str, base: str, tasks: Iterable[str], folders: list[str]) -> Answers:
    """Answers as the model gave them, by task and document, from lmms-eval's evaluator.

    Parameters
    ----------
    model: name of a model, with its `arguments`. base: whose prompts. folders: of task files.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    results = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(tasks),
        task_manager=TaskManager("ERROR", include_path=folders, include_defaults=False, model_name=base),
        batch_size=1,
        limit=None if set(tasks) <= {PICTURES, CLIPS, SINGLE} else LIMIT,
        bootstrap_iters=0,
        cli_args=SimpleNamespace(output_path=None, process_with_media=False),
    )
    return {task: {str(s["doc_id"]): s["resps"][0][0] for s in found} for task, found in results["samples"].items()}


def run_plan(plan: dict[str, Any]) -> dict[str, Answers | str]:
    """Answers by the name of a run, or the error that ended it.

    Parameters
    ----------
    plan: "folders" of task files, and "runs": name -> [model, arguments, base, tasks].
    """
    found: dict[str, Answers | str] = {}
    for name, (model, arguments, base, tasks) in plan["runs"].items():
        try:
            found[name] = evaluate(model, arguments, base, tasks, plan["folders"])
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def talkative(name: str, folder: Path) -> Path:
    """A copy of an embedded checkpoint that ends no answer before `LEAST` tokens."""
    from visionselector_eval.models.tiny import checkpoint

    made = folder / name
    shutil.copytree(checkpoint(name), made)
    settings = made / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "min_new_tokens": LEAST}))
    return made


def answers(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    (folder / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, __file__, "plan.json", "answers.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "answers.json").read_text())


def compared(found: dict[str, Any], kind: str) -> Answers:
    """Our answers of one set of tasks, which equal lmms-eval's."""
    stock, ours = found[f"stock {kind}"], found[f"ours {kind}"]
    assert isinstance(stock, dict), stock
    assert isinstance(ours, dict), ours
    differ = {
        (task, number): (said, ours[task].get(number))
        for task in stock
        for number, said in stock[task].items()
        if said != ours[task].get(number)
    }
    assert not differ, differ
    assert stock == ours
    return ours


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "name", "model"),
    [
        ("qwen2_5_vl", "tiny", "visionselector_qwen2_5_vl"),
        ("llava_hf", "tiny-llava", "visionselector_llava"),
    ],
)
def test_nothing_compressed_answers_as_lmms_evals_own_model(base, name, model, tmp_path):
    from visionselector_eval.tasks.tiny import MIRRORS, store

    clips = base == "qwen2_5_vl"
    for needed in ("decord", "qwen_vl_utils"):
        pytest.importorskip(needed, reason="lmms-eval's own models import it: install the dev extra")
    mirrors = [task for task, mirror in MIRRORS.items() if clips or mirror.media != "clip"]
    sized = tmp_path / "sized"
    sized.mkdir()
    write_sized(sized, clips)
    source = talkative(name, tmp_path)
    # The checkpoints' own dtype, which is what lmms-eval takes; ours is another on a CPU.
    ours = f"pretrained={source},device=cpu,dtype=bfloat16,method=full,protocol=lmms_eval"
    kinds = {"sized": [PICTURES, CLIPS] if clips else [PICTURES], "mirrors": mirrors}
    if clips:
        kinds["single"] = [SINGLE]
    runs = {}
    for kind, tasks in kinds.items():
        runs[f"stock {kind}"] = [base, f"pretrained={source},device=cpu,device_map=cpu", base, tasks]
        runs[f"ours {kind}"] = [model, ours, base, tasks]
    found = answers(tmp_path, {"folders": [str(store.write_bindings(mirrors)), str(sized)], "runs": runs})

    on_mirrors = compared(found, "mirrors")
    assert {task: len(of) for task, of in on_mirrors.items()} == dict.fromkeys(mirrors, LIMIT)
    on_sized = compared(found, "sized")
    assert len(on_sized[PICTURES]) == len(SIZES)
    said = [text for of in (*on_mirrors.values(), *on_sized.values()) for text in of.values()]
    assert all(said)
    assert len(set(said)) > len(said) / 2
    if clips:
        assert len(on_sized[CLIPS]) == len(SHOTS)
        assert isinstance(found["stock single"], str)  # an error
        assert found["ours single"][SINGLE]["0"]


def write_sized(folder: Path, with_clips: bool) -> None:
    """Task files and data of the sized documents: mirrors' images and clips, stretched, with the mirrors' questions.

    Parameters
    ----------
    folder: exists. with_clips: beside the images.
    """
    from visionselector_eval.tasks.tiny import generate
    from visionselector_eval.tasks.tiny.clips import write_clip

    tables: dict[str, list[dict[str, Any]]] = {PICTURES: []}
    documents = generate("tiny_textvqa_val", 7, len(SIZES))
    for number, (size, document) in enumerate(zip(SIZES, documents, strict=True)):
        png = io.BytesIO()
        document.image.resize(size, Image.Resampling.BICUBIC).save(png, "PNG", compress_level=1)
        image = {"bytes": png.getvalue(), "path": f"{number}.png"}
        tables[PICTURES].append({"question": document.row["question"], "answer": "x", "image": image})
    if with_clips:
        shots = (*SHOTS, ONE_FRAME)
        rows = []
        for number, (shot, document) in enumerate(zip(shots, generate("tiny_videomme", 7, len(shots)), strict=True)):
            frames, width, height, fps = shot
            drawn = [np.asarray(Image.fromarray(frame).resize((width, height))) for frame in document.frames]
            path = folder / f"clip_{number}.mp4"
            write_clip(path, np.stack([drawn[i * len(drawn) // frames] for i in range(frames)]), fps)
            question = "\n".join([document.row["question"], *document.row["options"]])
            rows.append({"question": question, "answer": "x", "clip": str(path)})
        tables |= {CLIPS: rows[:-1], SINGLE: rows[-1:]}
    for name, rows in tables.items():
        data = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), data)
        where = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "hf")}
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: parquet\ndataset_kwargs: {json.dumps(where)}\n"
            f"test_split: test\noutput_type: generate_until\n"
            f"doc_to_visual: !function sized.{'images' if name == PICTURES else 'clips'}\n"
            "doc_to_text: question\ndoc_to_target: answer\n"
            "generation_kwargs: {max_new_tokens: 16, temperature: 0, do_sample: false}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )
    (folder / "sized.py").write_text(
        "import io\n\nfrom PIL import Image\n\n\n"
        'def images(doc):\n    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]\n\n\n'
        'def clips(doc):\n    return [doc["clip"]]\n'
    )


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)  # the order of sums, and so the last bits, is the same for both
    from visionselector_eval.tasks import lmms

    lmms.lmms_eval()
    Path(sys.argv[2]).write_text(json.dumps(run_plan(json.loads(Path(sys.argv[1]).read_text()))))
