"""A sweep whose runs are trained in this process, and watched."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections import defaultdict
from pathlib import Path

from command_line import until

from qlora_neft import load_recipe
from qlora_neft.compare.folder import recipe_of
from qlora_neft.compare.plan import plan_sweep
from qlora_neft.compare.queue import Outcome
from qlora_neft.compare.sweep import sweep
from qlora_neft.errors import RunFailed, RunInterrupted
from qlora_neft.fused import ops
from qlora_neft.runner.run import run
from qlora_neft.trainer import QLoRANeftTrainer

WORDS = ("neftune.noise_alpha=0,15", "train.max_steps=8")


class Watched(QLoRANeftTrainer):
    """Notes LoRA's start, the tokens of every training pass, and which inputs dropout sets to zero."""

    start: dict = {}  # noqa: RUF012
    tokens, dropped = defaultdict(list), defaultdict(list)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        name = Path(self.args.output_dir).name
        self.start[name] = {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n}

        def note_tokens(module, inputs, output):
            if module.training:
                self.tokens[name].append(inputs[0].tolist())

        self.model.get_input_embeddings().register_forward_hook(note_tokens)

    def training_step(self, *args, **kwargs):
        name = Path(self.args.output_dir).name

        def note_zeros(operation, function, arguments, keywords):
            output = function(*arguments, **keywords)
            if operation == "dropped" and arguments[1].module == 0:  # of the first layer, in both passes
                self.dropped[name].append(hashlib.sha256((output == 0).numpy().tobytes()).hexdigest())
            return output

        ops.observer = note_zeros
        try:
            return super().training_step(*args, **kwargs)
        finally:
            ops.observer = None


class InThisProcess:
    """A `Runner` that calls `run`; ``broken`` runs fail, ``stop_in`` gets a signal."""

    def __init__(self, output_dir, broken=(), stop_in=None):
        self.output_dir, self.broken, self.stop_in = output_dir, broken, stop_in
        self.begun, self.stopped = [], []

    def train(self, name, tell):
        self.begun.append(name)
        if name in self.broken:
            return Outcome(name, 1, "failed: no luck")
        if name == self.stop_in:
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: self.stopped, self)
            return Outcome(name, 130, "interrupted")
        run(load_recipe(recipe_of(self.output_dir, name)), self.output_dir / name, quiet=True, trainer_class=Watched)
        return Outcome(name, 0)

    def poll(self):
        return None

    def stop(self, number):
        self.stopped.append(number)

    def end(self):
        pass


class Lines:
    """A `Display` that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def progress(self, name, line):
        pass


def swept_in(folder, *words, seeds=2, output_dir="sw", **runner):
    with contextlib.chdir(folder):
        plan = plan_sweep("mine.yaml", words or WORDS, seeds=seeds)
        display, who = Lines(), InThisProcess(Path(output_dir), **runner)
        try:
            return sweep(plan, Path(output_dir), who, display, command="THE COMMAND"), who, display.lines
        except (RunFailed, RunInterrupted) as error:
            return error, who, display.lines
