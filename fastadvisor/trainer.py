"""A run: data, model, method and iteration put together, epochs, schedule, logging, checkpoints. No numerics here."""

import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastadvisor import reporting
from fastadvisor.config import Config, resolve
from fastadvisor.data import Batch, Source, TrainingData, build_loaders, load_source, prepare, stage
from fastadvisor.errors import UserError
from fastadvisor.evaluation import Accuracy, accuracy
from fastadvisor.metagrad import Engine, ForwardEngine, ValidatedEngine, build_engine, check_meta, meta_schedule
from fastadvisor.methods import METHODS, build_method, check_method
from fastadvisor.models import build_model, check_model
from fastadvisor.runtime import allocator, checkpoint, memory
from fastadvisor.runtime.environment import environment
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.logger import TensorBoard
from fastadvisor.runtime.precision import amp_dtype, check_kernels, pick_device, use_tf32
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.runtime.timer import StepTimer, median
from fastadvisor.schedule import PhaseEpochs, divide, learning_rate
from fastadvisor.step import Step


@dataclass
class TrainResult:
    """What a run leaves."""

    summary: dict[str, Any]
    """The content of ``summary.json``."""
    folder: Path
    model: nn.Module
    """The trained classifier, the plain torchvision (or timm, or our) module, in evaluation mode."""


def train(config: str | None = None, /, **settings: Any) -> TrainResult:
    """Train a classifier; every setting of :class:`fastadvisor.Config` is a keyword.

    Args:
        config: a recipe's name or a YAML file that the keywords win over.
        **settings: as ``method="mfrw-mes", noise="flip", noise_rate=0.4``.

    Raises:
        UserError: anything the caller can put right, before any work is lost.
    """
    return train_config(resolve(Config, config, **settings))


def train_config(config: Config, source: Source | None = None) -> TrainResult:
    """Train as ``config`` says; ``source`` spares reading the data set again."""
    check_method(config.method)
    check_model(config.model)
    check_meta(config, METHODS[config.method], amp=config.amp)
    device = pick_device(config.device)
    check_kernels(device)
    checkpoint.check_weights(config.weights)
    if config.keep_memory and device.type == "cpu":
        allocator.keep_freed_memory()
    begun = RunFolder.open_for_resume(config.output, config) if config.resume else None
    if begun is None:
        RunFolder.check_free(config.output)
    with memory.enough(device):
        source = stage(load_source(config) if source is None else source, config, device)
        with closing(Trainer(config, prepare(source, config, config.seed), device)) as trainer:
            if begun is None:
                return trainer.run(RunFolder.create(config.output, config, f"{config.dataset}-{config.method}"))
            if begun.last.is_file():  # else the run was cut off in its first epoch
                trainer.restore(begun.last)
            begun.keep_metrics(trainer.epoch)
            return trainer.run(begun)


class Trainer:
    """One run. Everything that :meth:`restore` must bring back lives in an attribute that :meth:`state` names."""

    def __init__(self, config: Config, data: TrainingData, device: torch.device) -> None:
        self.loaders = build_loaders(config, data, device)
        if config.iterations is not None:
            config = replace(config, epochs=max(1, round(config.iterations / len(self.loaders.train))))
        self.config, self.device = config, device
        use_tf32(config.tf32)
        self.execution = Execution(device, amp_dtype(config.amp_dtype, device) if config.amp else None)
        self.data = data = self.loaders.data
        torch.manual_seed(config.seed)
        shape = (self.loaders.size, self.loaders.size)
        self.model = build_model(config, len(data.classes), shape)
        if config.weights is not None:
            checkpoint.load_weights(self.model.model, config.weights)
        self.model.to(device)
        self.method = build_method(config, self.model.head.in_features, len(data.classes))
        if self.method.advisor is not None:
            self.method.advisor.to(device)
        schedule = meta_schedule(config, type(self.method))
        self.step = Step(
            self.model,
            self.method,
            torch.optim.SGD(
                [p for p in self.model.parameters() if p.requires_grad],
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            ),
            self._advisor_optimizer(),
            self._engine(shape),
            self.execution,
            virtual_with_optimizer=config.virtual_step == "optimizer",
            attached=config.advisor_inputs == "attached",
            interval=schedule.interval,
            behind=schedule.behind,
            lean=config.lean,
        )
        self.train_loader, self.meta_loader = self.loaders.train, self.loaders.meta
        self._check_batches_of_one(shape)
        if isinstance(self.step.engine, ValidatedEngine):
            self.step.engine.say = tqdm.write  # above the progress bar
        self.phases = divide(self.method.phases(), config.epochs)
        self.timer = StepTimer(device)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self._bad_reported = 0

    def _engine(self, shape: tuple[int, int]) -> Engine:
        if not self.method.learns:
            return ForwardEngine(self.execution)  # never asked
        return build_engine(self.config, self.model, shape, self.execution)

    def _advisor_optimizer(self) -> torch.optim.Optimizer | None:
        if self.method.advisor is None:
            return None
        lr, decay = self.config.advisor_lr, self.config.advisor_weight_decay
        return torch.optim.Adam(
            self.method.advisor.parameters(),
            lr=self.method.advisor_lr if lr is None else lr,
            weight_decay=self.method.advisor_weight_decay if decay is None else decay,
        )

    def _check_batches_of_one(self, shape: tuple[int, int]) -> None:
        """Find out before the first step, not in it, whether the model normalises over a single value."""
        ones = [
            flag
            for flag, loader in (("--batch-size", self.train_loader), ("--meta-batch-size", self.meta_loader))
            if loader.batch_size == 1
        ]
        if not ones:
            return
        self.model.train()
        try:
            with torch.no_grad(), self.model.frozen_statistics():
                self.model(torch.zeros(1, 3, *shape, device=self.device))
        except ValueError:
            raise UserError(
                f"{ones[0]} is 1, and the batch normalisation of {self.config.model} needs more than one image of "
                f"{shape[0]}×{shape[1]} pixels: raise it."
            ) from None

    def run(self, folder: RunFolder) -> TrainResult:
        """Train the epochs that are left and write the run folder."""
        config = self.config
        steps = len(self.train_loader)
        memory.reset_peak(self.device)
        # disable=None: no bar where the output is not a terminal; the line an epoch is printed there too.
        hidden = None if config.progress else True
        print(reporting.headline(config, self.data, self.device, folder.path))
        print(f"Images of {self.loaders.size} pixels by the {self.loaders.name} loader ({self.loaders.why}).")
        self.report_bad_images(folder)
        with (
            closing(TensorBoard(folder.path if config.tensorboard else None, purge_step=self.epoch + 1)) as board,
            tqdm(total=config.epochs * steps, initial=self.epoch * steps, unit="step", disable=hidden) as bar,
        ):
            while self.epoch < config.epochs:
                try:
                    record = self._train_epoch(bar)
                finally:  # too many bad images end the epoch, and the list of them is what the user needs
                    self.report_bad_images(folder)
                self.epoch += 1
                self.history.append(record)
                folder.append_metrics(record)
                board.scalars(self.epoch, {key: value for key, value in record.items() if isinstance(value, float)})
                self._save(folder)
                bar.write(reporting.epoch_line(record, config.epochs))
        summary = self.summary()
        folder.write_summary(summary)
        checkpoint.write(folder.model, self.model.model.state_dict())
        print(f"Finished: {reporting.results(summary)}. Everything is in {folder.path}.")
        return TrainResult(summary, folder.path, self.model.model.eval())

    def report_bad_images(self, folder: RunFolder) -> None:
        """List the images that could not be read in the run folder, and say so once more when there are new ones."""
        count = self.loaders.bad_count()
        if count > self._bad_reported:
            folder.write_bad_images(self.loaders.bad_table())
            tqdm.write(f"{count:,} images cannot be read and are left out; {folder.bad_images} lists them.")
            self._bad_reported = count

    def _train_epoch(self, bar: "tqdm[Any]") -> dict[str, Any]:
        steps = len(self.train_loader)
        current = next(phase for phase in self.phases if phase.start <= self.epoch < phase.end)
        self.model.train()
        losses, meta_losses = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.timer.start()
        began, images, meta_steps, waited = time.perf_counter(), 0, 0, self._waited()
        for index in range(steps):
            self.set_lr(current, index)
            train, meta = self._batches(current)
            images += len(train.labels)
            result = self.step(train, meta)
            losses += result.loss
            if result.meta_loss is not None:
                meta_losses += result.meta_loss
                meta_steps += 1
            self.timer.mark()
            self._show_check(bar)
            bar.update()
        times = self.timer.collect()
        seconds = time.perf_counter() - began
        loss = float(losses) / steps
        finite = bool(torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()]).all())
        if not (finite and math.isfinite(loss)):  # the last step's damage shows in the weights only
            raise UserError(
                f"Training diverged in epoch {self.epoch + 1} (loss {loss:.3g}, weights {'' if finite else 'not '}finite); "
                "lower --lr or --advisor-lr."
            )
        return {
            "epoch": self.epoch + 1,
            "loss": loss,
            "meta_loss": float(meta_losses) / meta_steps if meta_steps else None,
            **self._validation(),
            "lr": self.step.optimizer.param_groups[0]["lr"],
            **{f"test_{key}": value for key, value in asdict(self.test()).items()},
            "images_per_second": images / seconds,
            "waiting_share": (self._waited() - waited) / seconds,
            "bad_images": self.loaders.bad_count(),
            "step_ms_median": step_ms(times, self.step.interval),
            "seconds": seconds,
        }

    def _waited(self) -> float:
        """Seconds so far in which there was no batch to train on."""
        return self.train_loader.waited + self.meta_loader.waited

    def _validation(self) -> dict[str, Any]:
        engine = self.step.engine
        if not isinstance(engine, ValidatedEngine):
            return {}
        return {**engine.collect(), "meta_fallback": engine.falling_back}

    def _show_check(self, bar: "tqdm[Any]") -> None:
        """Put the last comparison with the exact meta-gradient beside the progress bar."""
        engine = self.step.engine
        if isinstance(engine, ValidatedEngine) and engine.checks:
            last = engine.checks[-1]
            state = ", exact for now" if engine.falling_back else ""
            bar.set_postfix_str(f"cosine to exact {last.cosine:.3f}, norm ratio {last.norm_ratio:.2f}{state}", refresh=False)

    def _batches(self, current: PhaseEpochs) -> tuple[Batch, Batch | None]:
        train = (self.train_loader if current.phase.source == "train" else self.meta_loader).next_batch()
        return train, self.meta_loader.next_batch() if self.step.meta_is_due else None

    def set_lr(self, current: PhaseEpochs, index: int) -> None:
        """Set the learning rate of the ``index``-th step of this epoch."""
        steps = len(self.train_loader)
        step, total = (self.epoch - current.start) * steps + index, (current.end - current.start) * steps
        self.step.optimizer.param_groups[0]["lr"] = current.phase.lr_factor * learning_rate(self.config, step, total)

    def test(self) -> Accuracy:
        """Return the accuracy on the test set as of now."""
        return accuracy(self.model, self.loaders.test, self.data, precision=self.execution)

    def close(self) -> None:
        """End the loaders' threads and processes."""
        self.loaders.close()

    def state(self) -> dict[str, Any]:
        """Return everything needed to continue exactly: tensors and plain values only."""
        method, advisor = self.method.advisor, self.step.advisor_optimizer
        return {
            "epoch": self.epoch,
            "history": self.history,
            "classes": self.data.classes,
            "model": self.model.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "advisor": None if method is None else method.state_dict(),
            "advisor_optimizer": None if advisor is None else advisor.state_dict(),
            "iteration": self.step.iteration,
            "engine": self.step.engine.state_dict(),
            "train_loader": self.train_loader.state_dict(),
            "meta_loader": self.meta_loader.state_dict(),
            "random": checkpoint.random_states(),
        }

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``.

        Raises:
            UserError: damaged, or of another model, method or data set.
        """
        state = checkpoint.load(path)
        if state["classes"] != self.data.classes:
            raise UserError(f"{path} was trained on other classes than the data set has now; restore the data, or start anew.")
        checkpoint.load_model_state(self.model.model, state["model"], path)
        if (state["advisor"] is None) != (self.method.advisor is None):
            raise UserError(f"{path} is a checkpoint of another method; use the --method it was trained with.")
        self.step.optimizer.load_state_dict(state["optimizer"])
        if self.method.advisor is not None and self.step.advisor_optimizer is not None:
            checkpoint.load_model_state(self.method.advisor, state["advisor"], path)
            self.step.advisor_optimizer.load_state_dict(state["advisor_optimizer"])
        self.step.iteration = state["iteration"]
        self.step.engine.load_state_dict(state["engine"])
        self.train_loader.load_state_dict(state["train_loader"])
        self.meta_loader.load_state_dict(state["meta_loader"])
        self.epoch, self.history = state["epoch"], state["history"]
        checkpoint.restore_random_states(state["random"])

    def _save(self, folder: RunFolder) -> None:
        state = self.state()
        checkpoint.save(folder.last, state)
        if self.history[-1]["test_top1"] >= max(record["test_top1"] for record in self.history):
            checkpoint.save(folder.best, state)

    def meta_gradient(self) -> str | None:
        """Say how the meta-gradient is computed; None where the method needs none."""
        if not self.method.learns:
            return None
        when = "" if self.step.interval == 1 else f"; every {self.step.interval} iterations"
        return self.step.engine.describe() + when + ("; the advisor one step behind" if self.step.behind else "")

    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds, all of it measured."""
        return {
            **reporting.summary(self.config, self.data, self.history),
            "meta_gradient": self.meta_gradient(),
            "loader": self.loaders.name,
            "image_size": self.loaders.size,
            "bad_images": self.loaders.bad_count(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "peak_memory_mb": memory.peak_mb(self.device),
            "versions": environment(),
            "device": str(self.device),
        }


def step_ms(times: list[float], interval: int) -> float | None:
    """Return the median over groups of ``interval`` steps of a step's mean time: a meta step is in each of them."""
    groups = [times[start : start + interval] for start in range(0, len(times), interval)]
    return median([sum(group) / len(group) for group in groups if len(group) == interval] or times)
