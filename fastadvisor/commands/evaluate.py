"""``fastadvisor evaluate``: test a finished run again."""

import os
from contextlib import closing
from dataclasses import asdict
from typing import Any

from fastadvisor.loading import build_test_loader
from fastadvisor.runtime import memory
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.precision import amp_dtype, pick_device
from fastadvisor.training.evaluation import accuracy
from fastadvisor.training.saved_run import SavedRun


def evaluate_run(
    run: str | os.PathLike[str], *, checkpoint: str = "model", data_root: str | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Test the classifier of a run folder on its data set's test images, with the logits adjusted as the run's method does.

    Args:
        run: the folder.
        checkpoint: ``model`` (the finished classifier), ``best`` or ``last``.
        data_root: where the data set lies now; None: where it lay.
        device: auto, cpu or cuda.

    Returns:
        The fields of :class:`Accuracy` (``per_class_top1`` by class name), and ``run``, ``checkpoint``, ``dataset``,
        ``method``, ``model``, ``test_size``, ``notes`` (sentences about what was passed over or decided).

    Raises:
        UserError: no such run or checkpoint, a checkpoint of another model, no data, or data of other classes.
    """
    saved = SavedRun.open(run, data_root=data_root)
    saved.weights(checkpoint)  # a checkpoint that is not there is found before the data set is read
    config, chosen, data = saved.config, pick_device(device), saved.data()
    test, size = build_test_loader(config, data, chosen)
    model = saved.tested_model(checkpoint, size)
    with memory.explain_out_of_memory(chosen), closing(test):
        result = accuracy(
            model.to(chosen),
            test,
            data,
            precision=Execution(chosen, amp_dtype(config.amp_dtype, chosen) if config.amp else None),
        )
    about = {"run": str(run), "checkpoint": checkpoint, "dataset": data.name, "method": config.method, "model": config.model}
    per_class = dict(zip(data.classes, result.per_class_top1, strict=True))
    return {**about, "test_size": len(test), **asdict(result), "per_class_top1": per_class, "notes": list(data.notes)}
