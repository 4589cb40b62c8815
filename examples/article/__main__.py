"""The article's training, on real speech: its DNN, then a CNN and an RNN, each with its Python loop and with fastclip.

    python -m examples.article

Every model is trained three times in lockstep, from the same weights and on the same batches:

    no clipping     torch.optim.SGD; a smaller learning rate can do instead of a clip, as the demo shows for the rnn
    Python loop     for p in model.parameters(): p.grad.data.clamp_(-0.01, 0.01), then torch.optim.SGD
    fastclip        fastclip.SGD(clip_value=0.01), which has to end at the very bits of the Python loop

    dnn   80-256-64, the article's: one frame of 80 log-mel features in, 64 classes out; cross-entropy, lr 0.01
    cnn   convolutions over time, CTC; lr 0.03, momentum 0.9: with the article's lr 0.01 alone it needs many more epochs
    rnn   a convolution and two bidirectional GRUs, CTC; lr and momentum as for the cnn

The article does not say what its 64 classes are. Here they are the targets that HuBERT starts from: k-means clusters of
cepstra and their differences over time, fitted to the speech to train on. They are no phones, and the accuracy can't be
compared with that of phones; a frame alone does not tell its class, which depends on four frames to each side too.

Data: strings of spoken digits, out of recordings in Debian packages (or a synthesiser). Tested on new strings of the
clips that were trained on, and on a voice that was not. With --data, your own wav files (16 bit PCM) and
transcripts.txt, whose lines read file.wav<TAB>text; with one folder per speaker, whole speakers are held out.

Ctrl-C writes a checkpoint, as does the end of each epoch; --resume goes on from it, to the same bits. The state_dict of
the trained model is torch.load(checkpoint)["arms"]["fastclip"]["model"].
"""

import itertools
import shlex
import sys
import time

import torch

from ..speech.data import digit_strings, own_recordings
from ..support import lockstep
from ..support.console import SpeechDataError, exit_code_of, progress
from ..support.options import add_device, add_seed_and_threads, count, make_folder, make_parser
from ..support.safe_files import interrupts_between_steps, load_checkpoint, save_checkpoint
from . import report
from .tasks import CLIP_VALUE, RECIPES, fingerprint, make_tasks

UNHEARD_STRINGS = 200


class Stopped(Exception):
    """Ctrl-C was pressed, and a checkpoint written."""


def batches_of_epochs(task, seed):
    """Batches without end; the same ones whenever the seed is."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from task.batches(generator)


def train(name, task, options):
    """Trains all arms of one model, from a checkpoint if options.resume finds one; returns the arms."""
    recipe, path = task.recipe, options.out / f"article_{name}.pt"
    settings = {"model": name, "seed": options.seed, "recipe": [*recipe[:3], CLIP_VALUE], "data": fingerprint(task)}
    torch.manual_seed(options.seed)
    arms = lockstep.make_arms(task.model().to(options.device), recipe.lr, recipe.momentum, CLIP_VALUE)
    steps = recipe.epochs * task.steps_per_epoch
    taken = resume(path, settings, arms, steps) if options.resume else 0

    def save():
        states = {arm.name: arm.state_dict() for arm in arms}
        save_checkpoint(path, {"settings": settings, "taken": taken, "arms": states})

    batches = itertools.islice(batches_of_epochs(task, options.seed), taken, steps)
    with interrupts_between_steps() as interrupted, progress(total=steps, initial=taken, desc=name, unit="step") as bar:
        for batch in batches:
            lockstep.step_all(arms, task.loss_of(batch), taken)
            taken += 1
            if taken % 10 == 0 or taken == steps:
                bar.set_postfix_str("losses " + "/".join(f"{arm.losses[-1]:.3g}" for arm in arms), refresh=False)
            bar.update()
            stop = interrupted()
            if stop or taken % task.steps_per_epoch == 0:
                save()
            if stop:
                raise Stopped(f"after step {taken} of {steps} of the {name}; {path} is its checkpoint")
    return arms


def resume(path, settings, arms, steps):
    """Loads the checkpoint into the arms. Returns the number of steps taken; 0 without a checkpoint."""
    if not path.exists():
        return 0
    saved = load_checkpoint(path)
    try:
        for name, value in settings.items():
            if saved["settings"][name] != value:
                raise SpeechDataError(f"{path}: its {name} is not this run's; without --resume it is replaced")
        if saved["taken"] > steps:
            raise SpeechDataError(f"{path}: has {saved['taken']} steps behind it, more than the {steps} of this run")
        for arm in arms:
            arm.load_state_dict(saved["arms"][arm.name])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SpeechDataError(f"{path}: not a checkpoint of this program ({error})") from None
    return saved["taken"]


def run(options):
    """Returns the exit code."""
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    if options.data:
        speech = own_recordings(options.data)
    else:
        speech = digit_strings(options.cache, options.seed, unheard_strings=UNHEARD_STRINGS)
    print(f"Data: {speech.caption}.")
    print(f"Strings or utterances: {len(speech.train)} to train on, {len(speech.test) + len(speech.unheard)} to test.")
    make_folder(options.out)
    names = list(RECIPES) if options.model == "all" else [options.model]
    if options.resume and not any((options.out / f"article_{name}.pt").exists() for name in names):
        raise SpeechDataError(f"--resume: {options.out} has no checkpoint article_{names[0]}.pt")
    recipes = {name: RECIPES[name]._replace(epochs=options.epochs or RECIPES[name].epochs) for name in names}

    tasks = make_tasks(recipes, speech, options.seed, options.device)
    arms_of = {name: train(name, task, options) for name, task in tasks.items()}
    rows = [row for name, task in tasks.items() for row in report.rows_of(name, task, arms_of[name])]
    tests = list(next(iter(tasks.values())).tests)
    differences = {name: lockstep.first_difference(arms[1], arms[2]) for name, arms in arms_of.items()}

    print("\n" + report.table(rows, tests))
    if "dnn" in tasks:
        chance = ", ".join(f"{tasks['dnn'].chance(test):.1f} % ({test})" for test in tests)
        print(f"Always saying the most common of the 64 classes: {chance}.")
    print("Clipping changes neither the number of parameters nor the arithmetic of forward and backward.")
    print("state: the optimizer's; extra: the most that clip and update held besides, in tensors.\n")
    settings = {"seed": options.seed, "clip_value": CLIP_VALUE, "threads": options.threads}
    settings |= {"device": lockstep.name_of(options.device)}
    settings |= {"recipes": {name: recipe._asdict() for name, recipe in recipes.items()}}
    settings |= {"identical_bits": {name: difference is None for name, difference in differences.items()}}
    command = shlex.join(["python", "-m", "examples.article", *options.arguments])
    files = report.save(options.out, rows, speech.caption, settings, command)
    picture = report.draw(options.out, arms_of, rows, tests, speech.caption)
    print(f"{', '.join(map(str, [*files, picture]))} ({time.perf_counter() - began:.0f} s in all)")
    if reason := lockstep.why_not_equal(options.device):
        print(reason)
        return 0
    for name, difference in differences.items():
        if difference is not None:
            print(f"error: {name}: the Python loop and fastclip differ: {difference}", file=sys.stderr)
    if any(differences.values()):
        return 1
    print("The Python loop and fastclip agree in every bit of parameters and momentum buffers, in every model.")
    return 0


def parse_arguments(arguments=None):
    parser = make_parser("examples.article", __doc__, out="article_output")
    add_seed_and_threads(parser)
    add_device(parser)
    epochs = ", ".join(f"{recipe.epochs} {name}" for name, recipe in RECIPES.items())
    parser.add_argument("--model", choices=[*RECIPES, "all"], default="all", help="default: %(default)s")
    parser.add_argument("--epochs", type=count, metavar="N", help=f"of each model (default: {epochs})")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        return exit_code_of(run, options, "Stopped. Checkpoints of earlier epochs, if any, are kept; see --resume.")
    except Stopped as stopped:
        more = options.arguments if options.resume else [*options.arguments, "--resume"]
        print(f"\nStopped {stopped}. To go on: python -m examples.article {shlex.join(more)}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
