"""The tasks of the article's models: how each model is made, fed and scored."""

import hashlib
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..speech.batches import BATCH, batches_of_like_length, ctc_loss, error_rate, extract
from ..speech.models import CTC_MODELS, DNN
from .frame_labels import FrameLabels

MELS, CLASSES, CLIP_VALUE = 80, 64, 0.01


class Recipe(NamedTuple):
    lr: float
    momentum: float
    batch: int
    epochs: int


class FrameTask:
    """The class of each frame by cross-entropy, from that frame alone; scored in percent of frames."""

    score_name = "accuracy %"

    def __init__(self, recipe, speech, train, tests, seed):
        self.recipe = recipe
        labels = FrameLabels([features.cpu() for features, *_ in train], CLASSES, seed)

        def frames(examples):
            features = [features for features, *_ in examples]
            classes = torch.cat([labels(utterance.cpu()) for utterance in features])
            return torch.cat(features), classes.to(features[0].device)

        self.features, self.labels = frames(train)
        self.tests = {name: frames(examples) for name, examples in tests.items()}
        self.train_set = (self.features, self.labels)
        self.steps_per_epoch = math.ceil(len(self.labels) / recipe.batch)

    def model(self):
        return DNN(MELS, classes=CLASSES)

    def batches(self, generator):
        return torch.randperm(len(self.labels), generator=generator).split(self.recipe.batch)

    def loss_of(self, batch):
        features, labels = self.features[batch], self.labels[batch]
        return lambda model: F.cross_entropy(model(features), labels)

    @torch.no_grad()
    def score(self, model, name):
        features, labels = self.tests[name]
        return 100 * (model(features).argmax(1) == labels).float().mean().item()

    def chance(self, name):
        """Returns the score of always answering the most common class."""
        labels = self.tests[name][1]
        return 100 * torch.bincount(labels).max().item() / len(labels)


class TextTask:
    """The text of each utterance by CTC; scored by the word error rate."""

    score_name = "WER %"

    def __init__(self, architecture, recipe, speech, train, tests, seed):
        self.architecture, self.recipe, self.speech = architecture, recipe, speech
        self.train, self.tests = train, tests
        self.train_set = [tensor for features, target, _ in train for tensor in (features, target)]
        self.steps_per_epoch = math.ceil(len(train) / recipe.batch)

    def model(self):
        return CTC_MODELS[self.architecture](len(self.speech.symbols), MELS)

    def batches(self, generator):
        return batches_of_like_length(self.train, generator)

    def loss_of(self, batch):
        return ctc_loss([self.train[i] for i in batch])

    def score(self, model, name):
        return error_rate(model, self.tests[name], self.speech)


TASKS = {"dnn": FrameTask, "cnn": partial(TextTask, "cnn"), "rnn": partial(TextTask, "gru")}
RECIPES = {
    "dnn": Recipe(lr=0.01, momentum=0, batch=32, epochs=3),  # lr and momentum are the article's
    "cnn": Recipe(lr=0.03, momentum=0.9, batch=BATCH, epochs=6),
    "rnn": Recipe(lr=0.03, momentum=0.9, batch=BATCH, epochs=6),
}


def make_tasks(recipes, speech, seed, device="cpu"):
    """Returns a dict of tasks by name, on the same features of the same utterances."""
    train, test, unheard = extract(speech, MELS, per_utterance=True, device=device)
    tests = {"held out": test} if speech.kind == "own" else {"heard clips": test, "unheard voice": unheard}
    tests = {name: examples for name, examples in tests.items() if examples}
    return {name: TASKS[name](recipe, speech, train, tests, seed) for name, recipe in recipes.items()}


def fingerprint(task):
    """Returns a digest of the training data: a checkpoint fits no other."""
    digest = hashlib.sha256()
    for tensor in task.train_set:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
