"""The whole idea in one file, to copy and change, with freeze.py, data.py and features.py alone.

    python example.py         # drawn pictures and random weights: nothing is downloaded

Nothing is saved, resumed or recorded here: every change takes effect. What to change where:

    your pictures     TRAIN = datasets.ImageFolder("pictures/train"), and TEST likewise
    CIFAR-10          TRAIN = datasets.CIFAR10("data", train=True, download=True), and TEST
    ImageNet weights  STATE = models.ResNet18_Weights.IMAGENET1K_V1.get_state_dict(), SIZE = 224
    what learns       UNFROZEN, and a rate for each in RATES
    the network       MODEL, one of freeze.MODELS; another one needs its stages in freeze.py
    all else          OPTIMIZER, EPOCHS, BATCH, and the loop
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision import datasets, models  # noqa: F401  # for the lines above

import data
import features
import freeze


def draw(count: int, seed: int) -> list[tuple[Image.Image, int]]:
    """Bright triangles, squares and discs, as a data set of torchvision's gives its pictures."""
    random, pairs = np.random.default_rng(seed), []
    for number in range(count):
        ground, colour = random.integers([[0], [150]], [[100], [256]], (2, 3)).tolist()
        circle = random.integers([13, 13, 8], [19, 19, 13]).tolist()  # x, y and radius
        image, label = Image.new("RGB", (32, 32), tuple(ground)), number % 3
        ImageDraw.Draw(image).regular_polygon(circle, (3, 4, 24)[label], fill=tuple(colour))
        pairs.append((image, label))
    return pairs


TRAIN, TEST = draw(600, seed=0), draw(300, seed=1)
MODEL, STATE, SIZE = "resnet18", None, 64
UNFROZEN, RATES = ["layer4", "fc"], freeze.LEARNING_RATES
STAGES = freeze.stage_names(MODEL)  # in the order that they run
OPTIMIZER, EPOCHS, BATCH = torch.optim.Adam, 4, 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, uint8 [N, H, W, 3], in the size of the first picture or SIZE, whichever is smaller,
    and labels, int64 [N]."""
    width, height = pairs[0][0].size
    size = min(width, SIZE), min(height, SIZE)
    pixels = [np.array(image.convert("RGB").resize(size)) for image, _ in pairs]
    return torch.from_numpy(np.stack(pixels)), torch.tensor([label for _, label in pairs])


def main() -> list[tuple[float, float]]:
    (pixels, labels), (test_pixels, test_labels) = tensors(TRAIN), tensors(TEST)
    labels, test_labels, results = labels.to(DEVICE), test_labels.to(DEVICE), []

    # Everything but what learns is frozen, cut off, and computed once for each picture and flip.
    model = freeze.build(MODEL, len(labels.unique()), STATE).to(DEVICE)
    freeze.freeze(model, UNFROZEN)
    prefix, tail = freeze.split(model, next(name for name in STAGES if name in UNFROZEN))
    inputs = features.Features(prefix, pixels, SIZE, DEVICE, torch.float32, mirrored=True)
    test = features.Features(prefix, test_pixels, SIZE, DEVICE, torch.float32, mirrored=False)
    inputs.fill(DEVICE)
    test.fill(DEVICE)

    optimizer = OPTIMIZER(freeze.param_groups(model, RATES))
    for epoch in range(1, EPOCHS + 1):
        freeze.train_mode(tail)  # not tail.train()
        order, flips = data.epoch_order(len(inputs), seed=0, epoch=epoch)
        total = 0
        for x, y in zip(inputs.batches(BATCH, order, flips), labels[order.to(DEVICE)].split(BATCH)):
            loss = F.cross_entropy(tail(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(y)

        tail.eval()
        with torch.no_grad():
            answers = torch.cat([tail(x).argmax(1) for x in test.batches(BATCH)])
        accuracy = (answers == test_labels).float().mean().item()
        results.append((total / len(inputs), accuracy))
        print(f"epoch {epoch}: train loss {total / len(inputs):.4f}, test accuracy {accuracy:.2%}")

    # A picture: data.read_picture("cat.jpg", pixels.shape[1:3]) reads one of your own.
    x = data.transform(test_pixels[:1].to(DEVICE), SIZE)
    print("the first test picture is of class", model.eval()(x).argmax().item())
    return results


if __name__ == "__main__":
    main()
