"""A run: data, model, method and iteration put together, epochs, schedule, logging, checkpoints. No numerics here."""

import logging
import random
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fastadvisor.config import Config
from fastadvisor.datasets import TrainingData
from fastadvisor.errors import Interrupted, UserError
from fastadvisor.iterations import StepResult
from fastadvisor.loading import Batch, EvaluationLoader, Loader, build_loaders
from fastadvisor.loading.samplers import SAMPLERS
from fastadvisor.metagrad import ValidatedEngine
from fastadvisor.methods import DataFacts, Method, build_method
from fastadvisor.methods.base import Adjusted
from fastadvisor.methods.collapse import Collapse
from fastadvisor.models import build_model
from fastadvisor.models.sync_batch_norm import separate, synchronise
from fastadvisor.runtime import checkpoint, memory
from fastadvisor.runtime.cuda_graph import Graphed
from fastadvisor.runtime.environment import environment
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.interruption import Action, Interruption, SaveClock
from fastadvisor.runtime.logger import TensorBoard
from fastadvisor.runtime.precision import amp_dtype, memory_format, use_tf32
from fastadvisor.runtime.ranks import ALONE, Ranks
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.runtime.state import Fixed, Module, Part, RandomStates, Value, load_parts, save_parts
from fastadvisor.runtime.timer import StepTimer
from fastadvisor.training import messages, replay_record
from fastadvisor.training.assembly import build_step, check_batches_of_one
from fastadvisor.training.epoch import Progress, check_finite, epoch_record
from fastadvisor.training.evaluation import Accuracy, accuracy
from fastadvisor.training.observers import Lines, Metrics, Observer, ProgressBar, Scalars
from fastadvisor.training.schedule import StageEpochs, Timetable
from fastadvisor.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

RANK_STRIDE = 2**33
"""Between the seeds of two ranks: beyond any seed of a run."""


@dataclass
class TrainResult:
    """What a run leaves."""

    summary: dict[str, Any]
    """The content of ``summary.json``."""
    folder: Path
    model: nn.Module
    """The trained classifier, the plain torchvision (or timm, or our) module, in evaluation mode."""


class Trainer:
    """One run. Everything that :meth:`restore` must bring back is named in :meth:`parts` or :meth:`own_parts`."""

    def __init__(self, config: Config, data: TrainingData, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.loaders = build_loaders(config, data, device, ranks.rank, ranks.count)
        if config.iterations is not None:
            config = replace(config, epochs=max(1, round(config.iterations / len(self.loaders.train))))
        self.config, self.device, self.ranks = config, device, ranks
        use_tf32(config.tf32)
        self.execution = Execution(device, amp_dtype(config.amp_dtype, device) if config.amp else None, ranks)
        self.data = data = self.loaders.data
        seed_everything(config.seed)
        shape = (self.loaders.size, self.loaders.size)
        self.model = build_model(config, len(data.classes), shape)
        if config.weights is not None:
            checkpoint.load_weights(self.model.model, config.weights)
        self.memory_format = memory_format(config.memory_format, device, amp=config.amp)
        self.model.to(device).to(memory_format=self.memory_format)
        if config.sync_bn and ranks.count > 1:
            synchronise(self.model.model, ranks)
        self.facts = DataFacts(len(data.classes), len(data.labels), data.label_counts())
        self.method = build_method(config, self.model.head.in_features, self.facts).to(device)
        self.method.batch_mean = lambda values: ranks.total(values.mean()) / ranks.count
        ranks.broadcast_module(self.method)
        ranks.broadcast_module(self.model)
        self.step = build_step(config, self.model, self.method, self.execution, shape)
        records = config.cuda_graph == "on" or (config.cuda_graph == "auto" and device.type == "cuda")
        self.take = self._recorded() if records else None
        self.average = None if config.ema_decay is None else WeightAverage(self.model.model, config.ema_decay)
        self.train_loader, self.meta_loader = self.loaders.train, self.loaders.meta
        check_batches_of_one(config, self.model, self.loaders, ranks)
        if isinstance(self.step.engine, ValidatedEngine):
            self.step.engine.say = logger.warning
        self.timetable = Timetable(config, self.method.stages(), config.epochs, len(self.train_loader))
        self.stages = self.timetable.stages
        self._entered: StageEpochs | None = None
        self.timer = StepTimer(device)
        self.epoch = 0
        self.progress = Progress(device)
        self.history: list[dict[str, Any]] = []
        self.collapse = Collapse()
        self.observers: list[Observer] = []
        """Are told of every iteration and epoch; :meth:`run` adds those of the run folder and the terminal."""
        self.recorder = replay_record.Recorder()
        self.interruption = Interruption()
        self.clock = SaveClock(self.interruption, config.save_minutes, config.save_every, ranks)
        self.folder: RunFolder | None = None
        self._bad_reported = 0
        if ranks.count > 1:  # beside what all draw alike, each draws for its own images
            self.execution.common.split_off()
            seed_everything(config.seed + RANK_STRIDE * (ranks.rank + 1))

    def _recorded(self) -> Graphed[StepResult]:
        """Return what records iterations and replays them.

        Raises:
            UserError: this run's cannot be recorded, and --cuda-graph is on.
        """
        graphed: Graphed[StepResult] = Graphed(self.step, self.device, logger.warning)
        if self.config.cuda_graph == "on" and graphed.reason is not None:
            raise UserError(f"--cuda-graph on: iterations cannot be recorded, because {graphed.reason}; take auto.")
        return graphed

    def iterate(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take an iteration, by a CUDA graph where there is one."""
        return self.step(train, meta) if self.take is None else self.take(train, meta)

    def run(self, folder: RunFolder) -> TrainResult:
        """Train the epochs that are left and write the run folder.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run is saved.
            UserError: the training went wrong in a way that the user can do something about.
        """
        config, first = self.config, self.ranks.first
        self.folder = folder
        steps = len(self.train_loader)
        memory.reset_peak(self.device)
        # disable=None: no bar where the output is not a terminal; the line an epoch is printed there too.
        hidden = None if config.progress and first else True
        events = folder.path if config.tensorboard and first else None
        logger.info(messages.headline(config, self.data, self.device, folder.path, self.ranks.count))
        logger.info(f"Images of {self.loaders.size} pixels by the {self.loaders.name} loader ({self.loaders.why}).")
        self.report_bad_images()
        with (
            self.interruption.watched(self.ranks),
            closing(TensorBoard(events, purge_step=self.epoch + 1)) as board,
            tqdm(total=config.epochs * steps, initial=self.steps_taken, unit="step", disable=hidden) as bar,
        ):
            files: list[Observer] = [Metrics(folder), Scalars(board)] if first else []
            self.observers[:0] = [*files, ProgressBar(bar, self.step.engine), Lines(config.epochs, self.collapse)]
            while self.epoch < config.epochs:
                record = self._train_epoch()
                self.epoch += 1
                self.history.append(record)
                for observer in self.observers:
                    observer.epoch(record)
                self._save(best=True)
            self.clock.settle()
        return self._finish(folder)

    @property
    def steps_taken(self) -> int:
        """Iterations since the beginning of the run."""
        return self.epoch * len(self.train_loader) + self.progress.step

    def _finish(self, folder: RunFolder) -> TrainResult:
        summary = self.summary()
        model = self.tested_model()
        separate(model)
        if self.ranks.first:
            folder.write_summary(summary)
            checkpoint.write(folder.model, model.state_dict())
        logger.info(messages.finished(summary, folder.path))
        return TrainResult(summary, folder.path, model.eval())

    def report_bad_images(self) -> None:
        """List the images that could not be read in the run folder, and say so once more when there are new ones."""
        found = self.ranks.gather([part.reasons for part in self.loaders.bad])
        for reasons in found[1:]:
            for part, others in zip(self.loaders.bad, reasons, strict=True):
                part.add(others)
        count = self.loaders.bad_count()
        if self.folder is not None and self.ranks.first and count > self._bad_reported:
            self.folder.write_bad_images(self.loaders.bad_table())
            logger.warning(f"{count:,} images cannot be read and are left out; {self.folder.bad_images} lists them.")
            self._bad_reported = count

    def _train_epoch(self) -> dict[str, Any]:
        try:
            return self._iterations()
        except UserError:  # too many bad images end the epoch, and the list of them is what the user needs
            if self.ranks.count == 1:
                self.report_bad_images()
            raise

    def _iterations(self) -> dict[str, Any]:
        progress, steps = self.progress, len(self.train_loader)
        current = self.timetable.at(self.epoch)
        self._enter(current)
        self.method.begin_epoch(self.timetable.clock(self.epoch))
        if self.take is not None and type(self.method).begin_epoch is not Method.begin_epoch:
            self.take.reset()  # numbers that the method keeps on the host are constants of the graphs before
        self.model.train()
        self.timer.start()
        began, waited = time.perf_counter() - progress.seconds, self._waited() - progress.waited
        for index in range(progress.step, steps):
            self.set_lr(current, index)
            train, meta = self.batches(current)
            result = self._watched_step(train, meta)
            progress.add(result, len(train.labels))
            if self.average is not None:
                self.average.update(self.model.model)
            self.timer.mark()
            for observer in self.observers:
                observer.step(result, train)
            wish = self.clock.decide(self.step.iteration)
            if wish is Action.STOP or (wish is Action.SAVE and index + 1 < steps):
                progress.seconds, progress.waited = time.perf_counter() - began, self._waited() - waited
                progress.saturated = self.collapse.look(self.step.advice)
                self._save()
                if wish is Action.STOP:
                    raise self._interrupted()
        self._settle()
        times = self.timer.collect()
        progress.seconds, progress.waited = time.perf_counter() - began, self._waited() - waited
        losses = progress.means(self.ranks)
        check_finite(losses[0], self.model, self.epoch)
        advice = progress.saturated if self.step.advice is None else self.collapse.look(self.step.advice)
        tests = {"test": self.test(self.loaders.test)}
        if self.loaders.val is not None:
            tests["val"] = self.test(self.loaders.val)
        self.report_bad_images()
        self.progress = Progress(self.device)  # of the next epoch
        record = epoch_record(self.epoch, losses, progress, self.step, tests, advice, times)
        speed = self.ranks.count * progress.images / progress.seconds
        return {**record, "images_per_second": speed, "bad_images": self.loaders.bad_count()}

    def _enter(self, current: StageEpochs) -> None:
        """Make of the run what the stage ``current`` asks for, at its start or where it is resumed."""
        if self._entered == current:
            return
        stage, before = current.stage, "shuffled" if self._entered is None else self._entered.stage.sampler
        begins = self.epoch == current.start and self.progress.step == 0
        if stage.sampler != before:
            loader = self.train_loader if stage.source == "train" else self.meta_loader
            loader.use(SAMPLERS[stage.sampler], anew=begins)
        self.model.train_head_alone(stage.trains == "head")
        if stage.reset_head and begins:
            with self.execution.common.drawing():
                self.model.head.reset_parameters()
            for parameter in self.model.head.parameters():
                self.step.optimizer.state.pop(parameter, None)
            if self.average is not None:
                self.average.updates = 0  # it begins anew with the next weights
        if self._entered is not None and self.take is not None:
            self.take.reset()  # its graphs are of the stage before
        self._entered = current

    def _watched_step(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take a step; where its numbers are not finite, save what is needed to take it again.

        Raises:
            UserError: they are not finite, and --nan-policy is stop.
        """
        if self.folder is None or self.config.nan_policy != "stop":
            return self.iterate(train, meta)
        self.recorder.begin(self, train, meta)
        with self.recorder.stopping(self):
            return self.iterate(train, meta)

    def _settle(self) -> None:
        """Find out whether all iterations so far were finite: before a test, and before anything is saved."""
        if self.step.watch is not None:
            with self.recorder.stopping(self):
                self.step.watch.settle()

    def _interrupted(self) -> Interrupted:
        number = self.interruption.signal
        assert self.folder is not None
        where = f"after iteration {self.step.iteration} (epoch {self.epoch + 1} of {self.config.epochs})"
        return Interrupted(
            f"Stopped{'' if number is None else f' by {number.name}'} {where}; everything so far is in {self.folder.last}. "
            f"To go on: {self.folder.resume_command()}",
            15 if number is None else int(number),
        )

    def _waited(self) -> float:
        """Seconds so far in which there was no batch to train on."""
        return self.train_loader.waited + self.meta_loader.waited

    def batches(self, current: StageEpochs) -> tuple[Batch, Batch | None]:
        """Return the next training batch and, where a meta step is due, the next meta batch."""
        train = self._next(self.train_loader if current.stage.source == "train" else self.meta_loader)
        return train, self._next(self.meta_loader) if self.step.meta_is_due else None

    def _next(self, loader: Loader) -> Batch:
        batch = loader.next_batch()
        return batch._replace(images=batch.images.contiguous(memory_format=self.memory_format))

    def set_lr(self, current: StageEpochs, index: int) -> None:
        """Set the learning rates of the ``index``-th step of this epoch."""
        rate = self.timetable.rate(current, self.epoch, index)
        for group in self.step.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def tested_model(self) -> nn.Module:
        """Return the classifier that is tested and left behind: the trained one, or the average of its weights."""
        return self.model.model if self.average is None else self.average.model

    def test(self, images: EvaluationLoader) -> Accuracy:
        """Return the accuracy on ``images`` as of now."""
        model = self.tested_model()
        self.ranks.broadcast_buffers(model)
        if type(self.method).adjust is not Method.adjust:
            model = Adjusted(model, self.method)
        return accuracy(model, self._awake(images), self.data, precision=self.execution, ranks=self.ranks)

    def _awake(self, images: EvaluationLoader) -> Iterator[Batch]:
        for batch in images:
            self.interruption.steps += 1  # it is not stuck
            yield batch

    def close(self) -> None:
        """End the loaders' threads and processes."""
        self.loaders.close()

    def parts(self) -> dict[str, Part]:
        """Return everything that a checkpoint holds by name, but for what each rank has of its own."""
        return {
            checkpoint.CLASSES: Fixed(
                self.data.classes, "was trained on other classes than the data set has now; restore the data, or start anew."
            ),
            "facts": Fixed(self.facts.to_plain()),
            "epoch": Value(self, "epoch", int),
            "progress": self.progress,
            "history": Value(self, "history", list),
            checkpoint.MODEL: Module(self.model.model),
            **({} if self.average is None else {checkpoint.AVERAGE: self.average}),
            "method": Module(self.method, "is a checkpoint of another method; use the --method it was trained with."),
            **self.step.parts(),
            "execution": self.execution,
        }

    def own_parts(self) -> dict[str, Part]:
        """Return what each rank has of its own."""
        return {"random": RandomStates(), "train_loader": self.train_loader, "meta_loader": self.meta_loader}

    def state(self) -> dict[str, Any]:
        """Return everything needed to continue exactly: tensors and plain values only. All ranks together; rank 0 gets it."""
        self.ranks.broadcast_buffers(self.model.model)
        return save_parts(self.parts(), self.own_parts(), self.ranks)

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``, in the middle of an epoch too.

        Raises:
            UserError: damaged, or of another model, method or data set.
        """
        state = checkpoint.load(path)
        with checkpoint.refuse_misfit(path):
            # Batches, and what all ranks draw alike, are the same for any number of ranks; what each draws alone begins anew.
            load_parts(state, path, self.parts(), self.own_parts(), self.ranks, drawn_alone=("random",))
        if self.take is not None:
            self.take.reset()  # its graphs have the addresses of what was there before

    def _save(self, *, best: bool = False) -> None:
        """Write ``last.pt``; with ``best`` also ``best.pt``, if the last epoch was the best one."""
        self._settle()
        state = self.state()
        if self.ranks.first and self.folder is not None:
            # The best first: were it second, a process killed between the two would go on without ever writing it.
            if best and messages.best_epoch(self.history) is self.history[-1]:
                checkpoint.save(self.folder.best, state)
            self.folder.save_last(state, self.config.keep, self.step.iteration)
        self.clock.saved()

    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds, all of it measured."""
        return {
            **messages.summary(self.config, self.data, self.history),
            "meta_gradient": messages.describe_meta_gradient(self.step),
            "cuda_graph": self.take is not None and self.take.reason is None,
            "loader": self.loaders.name,
            "image_size": self.loaders.size,
            "bad_images": self.loaders.bad_count(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "peak_memory_mb": memory.peak_mb(self.device),
            "versions": environment(),
            "device": str(self.device),
        }


def seed_everything(seed: int) -> None:
    """Seed torch's generators, and numpy's and Python's, which data sets and models of others may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
