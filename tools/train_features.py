"""Train the network whose features Frechet distances are measured in, on CIFAR-10's classes, and write it as float16 safetensors.

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

from calibration.run.memory import peak_memory
from calibration.run.options import Progress
from edm_deploy.errors import InputError
from edm_deploy.storage.directories import check_replaceable, new_directory
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.evaluation.feature_network import BATCH, CLASSES, SIZE, WEIGHTS, FeatureNetwork
from edm_deploy_tools.images.dataset import load_pictures

PADDING = 4  # pixels that a training picture may be moved


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A training run; the defaults are those of the shipped network.

    Attributes:
        epochs: Walks through the training pictures.
        batch: Pictures a step.
        rate: Peak learning rate of SGD with momentum: up over the first fifth of the steps, then linearly down to 0.
        decay: Weight decay.
        smoothing: Of the labels.
        seed: Of everything random.
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


@dataclass(frozen=True)
class Labelled:
    """Pictures with their classes.

    Attributes:
        pictures: uint8 [N, 3, 32, 32].
        labels: int64 [N], 0 to 9.
    """

    pictures: Tensor
    labels: Tensor


def load_labelled(path: Path) -> Labelled:
    """All classes of a parquet file; ArtifactError as load_pictures."""
    classes = [load_pictures(path, size=SIZE, label=label) for label in range(CLASSES)]
    labels = torch.cat([torch.full((len(pictures),), label) for label, pictures in enumerate(classes)])
    return Labelled(torch.cat(classes), labels)


def train(data: Labelled, settings: Settings) -> FeatureNetwork:
    """A network as it is shipped: batch norms folded, weights rounded to float16 and held in float32."""
    torch.manual_seed(settings.seed)
    network = FeatureNetwork(normalized=True)
    if torch.backends.mkldnn.is_available():
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub knows no memory format
    steps = settings.epochs * (len(data.labels) // settings.batch)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.rate, momentum=0.9, nesterov=True, weight_decay=settings.decay)
    generator = torch.Generator().manual_seed(settings.seed)
    show, start, order = console.plain_progress(), time.monotonic(), torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < settings.batch:
            order = torch.randperm(len(data.labels), generator=generator)
        chosen, order = order[: settings.batch], order[settings.batch :]
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(5 * (step + 1) / steps, 1.25 * (1 - step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(augmented(data.pictures[chosen], generator).contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits.float(), data.labels[chosen], label_smoothing=settings.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate = (step + 1) / (time.monotonic() - start)
        left = (steps - step - 1) / rate
        memory = peak_memory(torch.device("cpu"))
        show(
            Progress(stage="train", step=step + 1, total=steps, loss=float(loss.detach()), rate=rate, eta_seconds=left, memory_bytes=memory)
        )
    return folded(network.eval())


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """float32 [B, 3, 32, 32] in [-1, 1]: each moved by up to 4 pixels, half of them mirrored."""
    padded = functional.pad(scaled(pictures), [PADDING] * 4, mode="reflect")
    moves = torch.randint(2 * PADDING + 1, (len(pictures), 2), generator=generator)
    moved = torch.stack([padded[index, :, y : y + SIZE, x : x + SIZE] for index, (y, x) in enumerate(moves.tolist())])
    mirrored = torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, moved.flip(-1), moved)


def scaled(pictures: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8."""
    return pictures.float() / 127.5 - 1


def folded(network: FeatureNetwork) -> FeatureNetwork:
    """The same function without batch norms, weights rounded to float16."""
    plain = FeatureNetwork()
    for name, child in network.named_children():
        fused = fuse_conv_bn_eval(child[0], child[1]) if isinstance(child, nn.Sequential) else child
        setattr(plain, name, fused)
    return plain.half().float().to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]  # as above


@torch.no_grad()
def accuracy(network: FeatureNetwork, data: Labelled) -> float:
    """Share of the pictures whose class is found."""
    found = torch.cat([network(scaled(pictures)).argmax(1) for pictures in data.pictures.split(BATCH)])
    return float((found == data.labels).double().mean())


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    data: Annotated[Path, typer.Argument(metavar="TRAIN", help="A parquet file with columns img and label: CIFAR-10's training pictures.")],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="The same of the test pictures.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    epochs: Annotated[int, typer.Option(help="Walks through the training pictures.")] = Settings.epochs,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train the feature network. Example: python -m edm_deploy_tools.train_features train.parquet test.parquet --out features-cifar10."""
    settings = Settings(epochs=epochs, seed=seed)
    check_replaceable(out, marker=WEIGHTS.name)
    train_data, test_data = load_labelled(data), load_labelled(test)
    start = time.monotonic()
    network = train(train_data, settings)
    console.say(f"test accuracy {100 * accuracy(network, test_data):.2f} % after {console.time_words(time.monotonic() - start)}")
    with new_directory(out, marker=WEIGHTS.name) as directory:
        save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, directory / WEIGHTS.name)
    console.wrote(out, "feature network, float16")


if __name__ == "__main__":
    sys.exit(run_app.run(app, "python -m edm_deploy_tools.train_features"))
