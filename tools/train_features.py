"""Train the feature network of the Frechet distance as a CIFAR-10 classifier, and write it as float16 safetensors.

Run it with `python -m edm_deploy_tools.train_features cifar10/train.parquet cifar10/test.parquet --out DIR`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edm_deploy.errors import InputError
from edm_deploy.numerics.seeds import check_seed
from edm_deploy.storage.output_directory import DirectoryKind, check_output, new_directory
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common import options as opt
from edm_deploy_tools.evaluation.feature_network import BATCH, CLASSES, SIZE, WEIGHTS, FeatureNetwork
from edm_deploy_tools.images.dataset import load_images

PADDING = 4  # largest random translation of a training image, in pixels


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a training run; the defaults are those of the shipped network.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per step.
        rate: Peak learning rate of SGD with momentum; linear warm-up over the first fifth of the steps, then linear decay to 0.
        decay: Weight decay.
        smoothing: Label smoothing.
        seed: Random seed.
    """

    epochs: int = 12
    batch: int = 128
    rate: float = 0.1
    decay: float = 5e-4
    smoothing: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        check_seed(self.seed)


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        images: uint8 [N, 3, 32, 32].
        labels: int64 [N], 0 to 9.
    """

    images: Tensor
    labels: Tensor


def load_labelled(path: Path) -> LabelledImages:
    """Load all classes of a parquet file; ArtifactError as load_images."""
    classes = [load_images(path, size=SIZE, label=label) for label in range(CLASSES)]
    labels = torch.cat([torch.full((len(images),), label) for label, images in enumerate(classes)])
    return LabelledImages(torch.cat(classes), labels)


def train(data: LabelledImages, settings: Settings) -> FeatureNetwork:
    """Train a network; batch norms are folded, and weights are rounded to float16 and stored in float32."""
    torch.manual_seed(settings.seed)
    network = FeatureNetwork(normalized=True)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # untyped in torch
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's type stubs
    steps = settings.epochs * (len(data.labels) // settings.batch)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.rate, momentum=0.9, nesterov=True, weight_decay=settings.decay)
    generator = torch.Generator().manual_seed(settings.seed)
    step_done, order = console.training_progress(steps), torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < settings.batch:
            order = torch.randperm(len(data.labels), generator=generator)
        chosen, order = order[: settings.batch], order[settings.batch :]
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(5 * (step + 1) / steps, 1.25 * (1 - step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(augmented(data.images[chosen], generator).contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits.float(), data.labels[chosen], label_smoothing=settings.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
        step_done(step + 1, float(loss.detach()))
    return folded(network.eval())


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly augmented images, float32 [B, 3, 32, 32] in [-1, 1]: translated by up to 4 pixels, half of them mirrored."""
    padded = functional.pad(scaled(images), [PADDING] * 4, mode="reflect")
    moves = torch.randint(2 * PADDING + 1, (len(images), 2), generator=generator)
    moved = torch.stack([padded[index, :, y : y + SIZE, x : x + SIZE] for index, (y, x) in enumerate(moves.tolist())])
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, moved.flip(-1), moved)


def scaled(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def folded(network: FeatureNetwork) -> FeatureNetwork:
    """An equivalent network with batch norms folded into the convolutions, weights rounded to float16."""
    plain = FeatureNetwork()
    for name, child in network.named_children():
        fused = child
        if isinstance(child, nn.Sequential):
            fused = fuse_conv_bn_eval(child[0], child[1])  # type: ignore[type-var, arg-type]  # a convolution and its batch norm
        setattr(plain, name, fused)
    rounded: FeatureNetwork = plain.half().float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as above
    return rounded.eval()


@torch.no_grad()
def accuracy(network: FeatureNetwork, data: LabelledImages) -> float:
    """Share of the images that are classified correctly, 0 to 1."""
    predicted = torch.cat([network(scaled(images)).argmax(1) for images in data.images.split(BATCH)])  # type: ignore[no-untyped-call]  # untyped in torch
    return float((predicted == data.labels).double().mean())


FEATURES = DirectoryKind("a feature network", WEIGHTS.name)
app = run_app.app_with()


@app.command()
def command(
    data: Annotated[Path, typer.Argument(metavar="TRAIN", help="Parquet file with columns img and label: training images of CIFAR-10.")],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="Parquet file of the test images.")],
    out: opt.Out,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = Settings.epochs,
    seed: Annotated[int, opt.seed_option("Random seed.")] = 0,
) -> None:
    """Train the feature network. Example: python -m edm_deploy_tools.train_features train.parquet test.parquet --out features-cifar10."""
    settings = Settings(epochs=epochs, seed=seed)
    check_output(out, kind=FEATURES, overwrite=False)
    train_data, test_data = load_labelled(data), load_labelled(test)
    start = time.monotonic()
    network = train(train_data, settings)
    console.say(f"Test accuracy {100 * accuracy(network, test_data):.2f} % after {console.time_words(time.monotonic() - start)}")
    with new_directory(out, kind=FEATURES, overwrite=False) as directory:
        save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, directory / WEIGHTS.name)
    console.wrote(out, "feature network, float16")


if __name__ == "__main__":
    sys.exit(run_app.run(app, "python -m edm_deploy_tools.train_features"))
