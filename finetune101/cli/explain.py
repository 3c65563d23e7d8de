"""The verbs that show what a network does with images: explain and embed. Bodies import lazily."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from tqdm import tqdm

from finetune101.cli.images import end_of_images, say_which
from finetune101.cli.parse import Flag
from finetune101.errors import Refused, escaped

if TYPE_CHECKING:
    from finetune101.deploy.choose import Chosen
    from finetune101.deploy.neighbours import TrainingImages

USUAL_NEIGHBOURS = 5


def explain(
    inputs: tyro.conf.Positional[tuple[str, ...]],
    *,
    target: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    top_k: int = 1,
    neighbours: int | None = None,
    out: str = "explained",
    overwrite: Flag = False,
    data: str | None = None,
    runs: str = "runs",
) -> int:
    """Show where a network looks: a picture for each image, with the parts that speak for a class and the nearest
    training images.

    The exit code is 1 when an image could not be read.

    Args:
        inputs: Images, folders or globs, @FILE with a path per line, or - for paths from standard input; before them a
            run (folder or name), a best.safetensors, or released_finetune, released_random or released_probe. Without:
            released_finetune.
        target: A class to explain, instead of the most probable ones; give it again for more classes.
        top_k: How many of the most probable classes to explain.
        neighbours: How many of the nearest training images to show; by default 5 where the training images are at hand.
        out: Folder for the pictures.
        overwrite: Replace pictures that are there.
        data: Where the training images are, if not where the run found them.
        runs: Folder of all runs.
    """
    from finetune101.deploy.choose import choose
    from finetune101.deploy.explain import class_numbers, picture_names
    from finetune101.deploy.inputs import image_inputs
    from finetune101.deploy.network import Network
    from finetune101.files import atomic
    from finetune101.run import check_folder

    if top_k < 1 or (neighbours or 0) < 0:
        raise Refused("--top-k begins at 1 and --neighbours at 0; give a larger number")
    chosen = choose(inputs, runs)
    say_which(chosen)
    class_numbers(target, chosen.network.classes)
    check_folder(Path(out))
    images = image_inputs(chosen.inputs)
    pictures = picture_names(list(images.files), Path(out), overwrite=overwrite)
    network = Network(chosen.network)
    network.training = _training_images(chosen, data, neighbours)
    count = USUAL_NEIGHBOURS if neighbours is None else neighbours
    for file, picture in tqdm(pictures.items(), unit="img", leave=False, disable=None):
        try:
            explanation = network.explain(file, target, top_k, count)
        except Refused as error:
            images.failed.append((file, str(error)))
            continue
        with atomic(picture) as part:
            explanation.picture().save(part, "PNG")
        tqdm.write(f"{escaped(file)} -> {escaped(str(picture))}\n{explanation}", file=sys.stdout)
    return end_of_images(images)


def embed(
    inputs: tyro.conf.Positional[tuple[str, ...]],
    *,
    out: str = "features.npz",
    overwrite: Flag = False,
    batch_size: int = 64,
    runs: str = "runs",
) -> int:
    """Write what a network sees in images to a file: features, probabilities, paths and class names.

    The exit code is 1 when an image could not be read.

    Args:
        inputs: Images, folders or globs, @FILE with a path per line, or - for paths from standard input; before them a
            run (folder or name), a best.safetensors, an exported FILE.onnx, or released_finetune, released_random or
            released_probe. Without: released_finetune.
        out: File to write, .npz (NumPy) or .parquet (needs pyarrow).
        overwrite: Replace a file that is there.
        batch_size: Images per step.
        runs: Folder of all runs.
    """
    from finetune101.deploy.choose import choose
    from finetune101.deploy.embed import check_features_file, embed_files, write_embedded
    from finetune101.deploy.inputs import image_inputs
    from finetune101.deploy.kept import answering_network

    check_features_file(Path(out), overwrite=overwrite)
    chosen = choose(inputs, runs)
    say_which(chosen)
    images = image_inputs(chosen.inputs)
    table = embed_files(answering_network(chosen, len(images.files)), images, batch_size)
    write_embedded(table, Path(out))
    count, width = table.features.shape
    print(f"{escaped(out)}: {width} features and {len(table.classes)} probabilities of each of {count} images")
    return end_of_images(images)


def _training_images(chosen: Chosen, data: str | None, neighbours: int | None) -> TrainingImages | None:
    """The training images of the network; None where they are not wanted, or by default where they are not at hand."""
    from finetune101.deploy.neighbours import training_images

    if neighbours == 0:
        return None
    try:
        training = training_images(chosen.run or chosen.network.name, data)
    except Refused as error:
        if neighbours is not None or data is not None:
            raise
        print(f"Nearest training images are left out: {error}", file=sys.stderr)
        return None
    if len(training.paths) < training.total:
        print(f"The nearest training images are searched for among {training}", file=sys.stderr)
    return training
