"""How fast a folder of images is read for training, by how many processes read ahead.

    python -m paretoprune.experiments.benchmarks.reading --readers 0,1,2,4,8

JPEGs of noise of 500 x 375 pixels, about what ImageNet has, are read with the training
augmentation at 224 x 224, while nothing else computes. The counts take turns, and medians are
kept; `times_faster` is against reading in this process, in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torchvision.transforms.v2.functional import to_pil_image

from paretoprune.experiments.benchmarks.device import described
from paretoprune.experiments.benchmarks.rows import RESULTS, append
from paretoprune.experiments.data.datasets import image_folder
from paretoprune.experiments.data.sources import DatasetSource
from paretoprune.experiments.data.splits import TrainingBatches, training_batch_size_for

_SMOOTH = 8  # pixels along which the noise is constant, so that files have the size of photographs


def main() -> None:
    """Runs the benchmark with the arguments of this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readers", default="0,1,2", help="processes; 0 reads in this one")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "reading.csv")
    options = parser.parse_args()
    counts = list(dict.fromkeys((0, *map(int, options.readers.split(",")))))
    torch.set_num_threads(1)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        source = image_folder(Path(folder), "train")
        for _ in range(options.repeats):
            for count in counts:
                seconds[count].append(epoch_seconds(source, count))
    rates = {count: options.images / median(taken) for count, taken in seconds.items()}
    append(
        options.out,
        [
            {
                "readers": count,
                "images": options.images,
                "repeats": options.repeats,
                "images_per_second": round(rate, 1),
                "times_faster": round(rate / rates[0], 2),
                **described(on_cpu=True),
            }
            for count, rate in rates.items()
        ],
    )


def write_images(folder: Path, count: int) -> None:
    """Writes a folder of images as `imagefolder:DIR` takes it, all of one class."""
    for split in ("train", "val"):
        (folder / split / "noise").mkdir(parents=True)
    for number in range(count):
        torch.manual_seed(number)
        coarse = torch.randint(256, (3, -(-375 // _SMOOTH), -(-500 // _SMOOTH)), dtype=torch.uint8)
        fine = coarse.repeat_interleave(_SMOOTH, 1).repeat_interleave(_SMOOTH, 2)[:, :375, :500]
        to_pil_image(fine).save(folder / "train" / "noise" / f"{number}.jpg")


def epoch_seconds(source: DatasetSource, readers: int) -> float:
    """Returns the wall time of reading every image once, augmented, in batches."""
    read = replace(source, workers=readers)
    size = training_batch_size_for(read)
    batches = TrainingBatches(read, torch.arange(len(read)), size, seed=0)
    start = time.perf_counter()
    for _ in batches.epoch(0):
        pass
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
