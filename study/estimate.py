"""What training will cost on this CPU, from one step of each strategy.

    python -m study.estimate --epochs 50
    python -m study.estimate --strategies fc+layer4 --image-size 112

Takes train.py's flags too. Says nothing where there is a GPU: there it is minutes.
"""

from argparse import Namespace

import torch

import freeze
import train
from data import Images
from plumbing import cache, datasets, flags, machine
from plumbing.command import Parser, command, whole_number
from plumbing.convolution import faster
from plumbing.scoring import predict
from study.benchmark import STRATEGIES, seconds

LONG = 3600  # seconds from which it is said what is quicker


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES[1:]),
        help="default: fc+layer4 fc+layer3+layer4")
    add("--times", type=whole_number(1), default=1, help="how often each is trained (default: 1)")
    # fmt: on
    own, rest = parser.parse_known_args(argv)
    args = flags.parse(__doc__, train.RECIPE, [*rest, "--unfreeze", "layer3", "layer4"])
    args.strategies, args.times = own.strategies, own.times
    return args


def cost(strategy: str, both: tuple[Images, Images], args: Namespace) -> tuple[float, float]:
    """Seconds to fill the cache, and of an epoch with its test."""
    device = torch.device("cpu")
    model = freeze.build(args.model, len(both[0].classes))
    faster(model)
    unfrozen = [stage for stage in freeze.STAGES if stage in strategy.split("+")]
    args = Namespace(**vars(args) | {"unfreeze": unfrozen})
    tail, inputs, tested = train.freeze_and_split(model, *both, args, device)
    train.set_mode(model, args)
    shares, _ = cache.choose(args.cache, [inputs, tested], device, args.out / "features")
    anew, test_anew = shares.get("off", [0, 0])  # computed in every epoch, not once

    some = torch.arange(inputs.chunk) % len(inputs)
    one = seconds(lambda: inputs.compute(some), device) / len(some)
    batch = torch.arange(args.batch_size) % len(inputs)
    x, y = inputs(batch), both[0].labels[batch]
    optimizer = train.OPTIMIZER(freeze.param_groups(model, args.rates))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    learns = tail, optimizer, scaler, machine.autocast(device, args.precision)
    step = seconds(lambda: train.train_step(x, y, *learns), device) / len(x)
    test = seconds(lambda: predict(tail, [x], device, args.precision), device) / len(x)
    epoch = step * len(inputs) + test * len(tested) + one * (anew + test_anew)
    return one * (2 * (len(inputs) - anew) + len(tested) - test_anew), epoch


def duration(time: float) -> str:
    """Seconds, in a unit that leaves one to three digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if time >= 2 * size:
            return f"{time / size:.0f} {unit}"
    return f"{time:.0f} s"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = machine.pick_device(args.device)
    if device.type != "cpu":
        return
    args.precision = machine.pick_precision(args.precision, device)
    machine.tune(device)
    both = datasets.load_both(args)
    total = 0
    for strategy in args.strategies:
        fill, epoch = cost(strategy, both, args)
        whole = args.times * (fill + max(args.epochs) * epoch)
        total += whole
        print(f"estimate {strategy:<17}{duration(whole):>7}, an epoch {duration(epoch)}")
    print(f"         in all {duration(total)} on this CPU, {torch.get_num_threads()} threads")
    if total > LONG:
        print("         quicker: --train-size 5000, --image-size 112 (a quarter of the work),")
        print("         a GPU; and to see how it works: bash run_all.sh --demo")


if __name__ == "__main__":
    command(main, when_stopped="nothing was kept", when_full="lower --batch-size or --image-size")
