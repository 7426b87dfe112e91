"""The table of contenders: what each one is called, how it is built, and how exact it has to be.

To add one, write a function ``Setting -> Iteration`` and give it a row in `CONTENDERS`; the check, the timing, the memory and
the tables follow from the row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol

import torch

from benchmarks.peers import Higher, Textbook, TorchOpt
from fastadvisor.config import MetaConfig, MethodConfig, ModelConfig, OptimizerConfig
from fastadvisor.iterations import Iteration as OurIteration
from fastadvisor.iterations import StepResult, build_iteration
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import Engine, ReferenceEngine, build_engine, meta_schedule
from fastadvisor.methods import METHODS, DataFacts, Method, build_method
from fastadvisor.models import SplitClassifier, build_model
from fastadvisor.runtime.cuda_graph import Graphed
from fastadvisor.runtime.execution import Execution
from fastadvisor.training.optimizers import build_optimizer
from fastadvisor.training.parameter_groups import parameter_groups

SIDE, CLASSES = 32, 10
CPU = torch.device("cpu")
METHOD = "mfrw-mes"
FACTS = DataFacts(CLASSES, 50_000, torch.full((CLASSES,), 5_000))
REPLAY_LIMIT = 1e-6
"""Largest relative distance of the weights after some iterations in float64, replayed and not."""
EXACT_LIMIT, PEER_LIMIT = 1e-10, 1e-8
"""Largest relative error of a meta-gradient in float64: of ours, and of what others compute."""


class Unavailable(Exception):
    """A contender cannot run here; the message is the reason, without the contender's name."""


class Iteration(Protocol):
    """One training iteration that leaves its meta-gradient in the ``grad`` of the advisor's parameters."""

    method: Method

    def __call__(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step."""
        ...


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    model: str
    device: torch.device
    amp: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def execution(self) -> Execution:
        """Return how passes are run."""
        return Execution(self.device, torch.bfloat16 if self.amp else None)


@dataclass(frozen=True)
class Contender:
    """A row of the table."""

    build: Callable[[Setting], Iteration]
    label: str
    limit: float | None = None
    """Largest relative error against double backward in float64; None: an approximation, whose cosine is shown instead."""
    needs: str | None = None
    """A package of the extra ``peers``."""
    iterations_per_cycle: int = 1
    """k where a meta step comes every k-th iteration only: k iterations are timed together and divided by k."""
    meta_share: float = 1.0
    """Part of the meta batch it takes."""
    advised: bool = True
    """False: no advisor, so nothing to check."""
    graphed: bool = False
    """Replayed as a CUDA graph; what is checked is that replays move the weights as the same iterations run eagerly do."""
    comparable: bool = True
    """False: another gradient by intention, which the reference says nothing about (the gradient-check suite does)."""


@dataclass
class Parts:
    """Model, method and optimizers, with weights that are the same for every contender."""

    model: SplitClassifier
    method: Method
    optimizer: torch.optim.Optimizer
    advisor_optimizer: torch.optim.Optimizer | None
    execution: Execution

    @classmethod
    def of(cls, setting: Setting, method_name: str = METHOD) -> "Parts":
        """Build them."""
        torch.manual_seed(0)
        model = build_model(ModelConfig(setting.model), CLASSES, (SIDE, SIDE)).to(setting.device, setting.dtype)
        model.to(memory_format=setting.memory_format)
        method = build_method(MethodConfig(method=method_name), model.head.in_features, FACTS)
        method.to(setting.device, setting.dtype)
        advisor_optimizer = None
        if method.advisor is not None:
            fused = setting.device.type == "cuda" or None  # as a run takes it
            advisor_optimizer = torch.optim.Adam(method.advisor.parameters(), lr=method.advisor_lr, fused=fused)
        optimizer = build_optimizer(OptimizerConfig(), parameter_groups(model, 1.0, OptimizerConfig.lr))  # as a run takes it
        return cls(model, method, optimizer, advisor_optimizer, setting.execution())

    def step(self, engine: Engine | None, **settings: Any) -> OurIteration:
        """Return our iteration with ``engine``."""
        return build_iteration(
            self.model, self.method, self.optimizer, self.advisor_optimizer, engine, self.execution, **settings
        )

    def peer(self, kind: type[Textbook]) -> Textbook:
        """Return an iteration written in the way of ``kind``."""
        assert self.advisor_optimizer is not None
        return kind(self.model, self.method, self.optimizer, self.advisor_optimizer, self.execution)


def plain(setting: Setting) -> OurIteration:
    """Cross-entropy, no advisor."""
    parts = Parts.of(setting, "ce")
    return parts.step(None)


def textbook(setting: Setting) -> Textbook:
    """Three forward passes, double backward."""
    return Parts.of(setting).peer(Textbook)


def shared_double_backward(setting: Setting) -> OurIteration:
    """Our step with the reference engine."""
    parts = Parts.of(setting)
    return parts.step(ReferenceEngine(parts.execution))


def higher(setting: Setting) -> Textbook:
    """The virtual step by higher."""
    return Parts.of(setting).peer(Higher)


def torchopt(setting: Setting) -> Textbook:
    """The virtual step by torchopt."""
    return Parts.of(setting).peer(TorchOpt)


def ours(label: str, limit: float | None = None, meta_share: float = 1.0, **settings: Any) -> Contender:
    """Return the contender that ``fastadvisor train`` runs with these settings of ``MetaConfig``."""
    # Timed alone: what watching an approximation costs depends on how often it is asked for.
    config = MetaConfig(**{"validate_meta_every": 0, **settings})
    schedule = meta_schedule(config, METHODS[METHOD])

    def build(setting: Setting) -> OurIteration:
        parts = Parts.of(setting)
        return parts.step(
            build_engine(config, parts.model, (SIDE, SIDE), parts.execution),
            interval=schedule.interval,
            behind=schedule.behind,
            lean=config.lean,
            attached=config.advisor_inputs == "attached",
        )

    return Contender(build, label, limit, iterations_per_cycle=schedule.interval, meta_share=meta_share)


class Replayed:
    """Our iteration as ``fastadvisor train`` takes it on a GPU: recorded as a CUDA graph, then replayed."""

    def __init__(self, step: OurIteration, device: torch.device) -> None:
        self.step, self.method = step, step.method
        self.take: Graphed[StepResult] = Graphed(step, device)

    @property
    def meta_is_due(self) -> bool:
        """As of the step."""
        return self.step.meta_is_due

    def __call__(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step."""
        return self.take(train, meta)


def graphed(contender: Contender) -> Contender:
    """Return ``contender`` in a CUDA graph."""

    def build(setting: Setting) -> Replayed:
        if setting.device.type != "cuda":
            raise Unavailable("a CUDA graph needs a GPU")
        step = contender.build(setting)
        assert isinstance(step, OurIteration)
        return Replayed(step, setting.device)

    return replace(contender, build=build, label=f"{contender.label}, CUDA graph", limit=REPLAY_LIMIT, graphed=True)


BARE: dict[str, Any] = {
    "approx_meta": True,
    "meta_interval": 1,
    "virtual_gradient": "own",
    "approx_tangent": "forward",
    "approx_layers": "all",
}
"""--approx-meta with every knob turned off."""
TOP: dict[str, Any] = {"approx_meta": True, "approx_layers": "top", "approx_stages": 1}
"""The top stage, with the other knobs as ``--approx-meta`` sets them."""

CONTENDERS: dict[str, Contender] = {
    "plain": Contender(plain, "plain cross-entropy", advised=False),
    "double_backward": Contender(textbook, "double backward, textbook (three forwards)", PEER_LIMIT),
    "shared_double_backward": Contender(shared_double_backward, "double backward, one shared forward", EXACT_LIMIT),
    "higher": Contender(higher, "higher", PEER_LIMIT, needs="higher"),
    "torchopt": Contender(torchopt, "torchopt", PEER_LIMIT, needs="torchopt"),
    "exact": ours("exact (default)", EXACT_LIMIT),
    "lean": ours("exact, `--lean`", EXACT_LIMIT, lean=True),
    "attached": replace(ours("exact, `--advisor-inputs attached`", advisor_inputs="attached"), comparable=False),
    "approx": ours("`--approx-meta` (its default set)", approx_meta=True),
    "behind": ours("one step behind", EXACT_LIMIT, virtual_gradient="actual"),
    "interval2": ours("interval 2", EXACT_LIMIT, meta_interval=2),
    "interval2_behind": ours("interval 2, one step behind", EXACT_LIMIT, meta_interval=2, virtual_gradient="actual"),
    "half_meta": ours("half the meta batch", meta_share=0.5),
    "difference": ours("differences (under autocast: the tangent pass)", **{**BARE, "approx_tangent": "auto"}),
    "top1": ours("top stage", **{**BARE, "approx_layers": "top", "approx_stages": 1}),
    "top2": ours("top 2 stages", **{**BARE, "approx_layers": "top", "approx_stages": 2}),
    "random4": ours("random 4 layers", **{**BARE, "approx_layers": "random"}),
    "learned4": ours("learned 4 layers", **{**BARE, "approx_layers": "learned"}),
    "all_together": ours("differences, one step behind", approx_meta=True, approx_layers="all", meta_interval=1),
    "all_together3": ours("differences, one step behind, interval 3", approx_meta=True, approx_layers="all", meta_interval=3),
    "top1_together": ours("top stage, differences, one step behind", meta_interval=1, **TOP),
    "top1_together2": ours("top stage, differences, one step behind, interval 2", **TOP),
    "top1_together2_half": ours("the same with half the meta batch", meta_share=0.5, **TOP),
}
CONTENDERS |= {f"{name}_graph": graphed(CONTENDERS[name]) for name in ("plain", "exact", "approx")}
CORE = ("plain", "double_backward", "shared_double_backward", "higher", "torchopt", "exact", "lean", "approx")
CORE_ON_GPU = ("plain_graph", "exact_graph", "approx_graph")
"""What is measured unless ``--only`` names others, or ``--only all``."""
REFERENCE = "shared_double_backward"
"""Whose meta-gradient the others are held against."""


def iterate(contender: Contender, iteration: Iteration, train: Batch, meta: Batch) -> None:
    """Take one iteration, with the meta batch where a meta step is due."""
    due = contender.advised and getattr(iteration, "meta_is_due", True)  # others than our own take one every time
    if contender.meta_share < 1:
        meta = Batch(*(part[: round(contender.meta_share * len(part))] for part in meta))
    iteration(train, meta if due else None)


def require(contender: Contender) -> None:
    """Import what the contender needs.

    Raises:
        Unavailable: it is not installed, or does not import beside this torch.
    """
    if contender.needs is None:
        return
    try:
        import_module(contender.needs)
    except ModuleNotFoundError as error:
        # Also a dependency of the package that is missing: the extra brings that too.
        missing = "not installed" if error.name == contender.needs else f"{error.name} is not installed"
        raise Unavailable(f"{missing}; pip install 'fastadvisor[peers]'") from None
    except Exception as error:
        raise Unavailable(incompatible(error)) from None


def incompatible(error: Exception) -> str:
    """Return the reason of a library that fails beside this torch, on one line."""
    return f"does not work with torch {torch.__version__} ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"


def batches(
    size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Batch, Batch]:
    """Return a train and a meta batch of ``size`` random images (3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)

    def one() -> Batch:
        images = torch.randn(size, 3, SIDE, SIDE, generator=generator, dtype=dtype)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        images = images.to(device, memory_format=memory_format)
        return Batch(images, labels.to(device), torch.arange(size, device=device))

    return one(), one()


def chosen(only: str | None, device: torch.device = CPU) -> list[str]:
    """Return the names of ``--only``, in the table's order; plain always takes part, as ratios are over it.

    Raises:
        SystemExit: a name is not in the table.
    """
    if only == "all":
        return list(CONTENDERS)
    core = {*CORE, *(CORE_ON_GPU if device.type == "cuda" else ())}
    names = core if only is None else {name.strip() for name in only.split(",")} | {"plain"}
    unknown = sorted(names - set(CONTENDERS))
    if unknown:
        raise SystemExit(f"--only: there is no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}.")
    return [name for name in CONTENDERS if name in names]
