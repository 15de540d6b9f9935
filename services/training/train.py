"""A run on Ray Train, what a job executes: `python -m services.training.train CONFIG.json`; see its --help.

What it prints for programs begins with `metrics.MARK`; the last such line has the run's end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segcore.errors import AlreadyExists, NotFound, SegcoreError
from services.follow import tell
from services.local_ray import prepare_ray, start_ray
from services.training.config import TrainConfig
from services.training.folders import export, latest, publish
from services.training.picture import draw

# Where Ray keeps its list of a run's checkpoints.
SNAPSHOT = "checkpoint_manager_snapshot.json"
Outcome = dict[str, Any]


def train_worker(settings: dict[str, Any]) -> Outcome:
    """What each of Ray's workers runs; the first one's result is the run's."""
    import ray.train
    import ray.train.torch
    import torch

    from services.training.parallel import Workers
    from services.training.worker import Run

    config = TrainConfig.model_validate_json(settings["config"])
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(config.workers.threads or max(1, int(config.workers.cpus)))
    try:
        run = Run(config, Workers(), ray.train.torch.get_device(), _Reporter())
        return {"step": run.train().step, "metrics": run.metrics}
    except SegcoreError as error:
        # It would fail again: the run ends, where an exception would make Ray go on from the last checkpoint.
        return {"error": error}


class _Reporter:
    """Hands checkpoints to Ray, which has them appear in a thread of its own: bringing them to the disk takes time."""

    def __init__(self) -> None:
        self._idle = threading.Event()
        self._idle.set()

    def __call__(self, metrics: dict[str, float], folder: Path | None, name: str) -> None:
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        self._idle.wait()  # so that what isn't on the disk yet is one checkpoint at most
        if folder is not None:
            self._idle.clear()
        ray.train.report(
            metrics,
            checkpoint=None if folder is None else Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=self._publish,
        )

    def _publish(self, checkpoint: Any, name: str) -> Any:
        from ray.train import Checkpoint

        try:
            return Checkpoint.from_directory(publish(Path(checkpoint.path)))
        finally:
            self._idle.set()


def fit(config: TrainConfig, *, loop: Callable[[dict[str, Any]], Outcome] = train_worker) -> Outcome:
    """Run to the end on the Ray that is connected; goes on from the newest checkpoint in the run's folder.

    The best checkpoint, or the last one if there is no evaluation, is exported. Returns the last step and metrics.
    Raises SegcoreError, and Ray's TrainingFailedError once workers have failed too often.
    """
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    forget_damaged_list(config.folder)
    workers, scored = config.workers, config.evaluation is not None
    trainer = TorchTrainer(
        loop,
        train_loop_config={"config": config.to_json()},
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if workers.gpus else "gloo"),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(config.storage),
            failure_config=FailureConfig(max_failures=workers.failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.checkpoints.keep,
                checkpoint_score_attribute="eval_loss" if scored else None,
                checkpoint_score_order="min",
            ),
        ),
    )
    result = trainer.fit()
    outcome: Outcome = result.return_value
    if "error" in outcome:
        raise outcome["error"]
    checkpoint = result.get_best_checkpoint("eval_loss", "min") if scored else None
    return outcome | exported(config, Path(checkpoint.path) if checkpoint is not None else latest(config.folder))


def exported(config: TrainConfig, best: Path | None) -> Outcome:
    """Export a run's best checkpoint, if it has one, and draw its curve; what is told of it."""
    if best is None:
        return {}
    target = config.folder / "export"
    shutil.rmtree(target, ignore_errors=True)
    export(best, target)
    return {"checkpoint": best.name, "export": str(target), "picture": str(draw(config.folder))}


def forget_damaged_list(run: Path) -> None:
    """Put Ray's list of a run's checkpoints aside if a full disk cut it short, or checkpoints were deleted by hand.

    Ray would refuse the run; without the list it goes on, from the newest checkpoint that is there.
    """
    file = run / SNAPSHOT
    if not file.exists():
        return
    try:
        listed = json.loads(file.read_text())["checkpoint_results"]
        intact = all((run / result["checkpoint_dir_name"]).is_dir() for result in listed)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        file.rename(file.with_suffix(".damaged"))


def check_start(config: TrainConfig, *, resume: bool) -> None:
    """Raise AlreadyExists if a new run's folder has checkpoints, NotFound if there is nothing to resume."""
    there = latest(config.folder)
    if resume and there is None:
        raise NotFound(f"{config.folder} has no checkpoint to go on from; start the run without `resume`")
    if not resume and there is not None:
        raise AlreadyExists(f"{config.folder} stands at {there.name}: resume the run, or give it another name")


def main() -> int:
    """Returns the exit status: 0, or 1 for a run that failed."""
    parser = argparse.ArgumentParser(prog="python -m services.training.train")
    parser.add_argument("config", type=Path, metavar="JSON")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true")
    begin.add_argument("--retry", action="store_true", help="resume if there is a checkpoint, else start")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="on a Ray of its own")
    where.add_argument("--no-ray", action="store_true", help="by one worker, in this process")
    options = parser.parse_args()
    config = TrainConfig.model_validate_json(options.config.read_text())
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    try:
        check_start(config, resume=options.resume or (options.retry and latest(config.folder) is not None))
        if options.no_ray:
            from services.training.alone import fit_alone

            tell(done=True, **fit_alone(config))
        else:
            _connect(config, local=options.local)
            _stop_in_order()
            tell(done=True, **fit(config))
    except SegcoreError as error:
        tell(error=error.message)
        return 1
    except Exception as error:  # Ray's own, of a run whose workers failed too often
        tell(error=f"{type(error).__name__}: {error}")
        raise
    return 0


def _connect(config: TrainConfig, *, local: bool) -> None:
    if local:
        prepare_ray()
    import ray
    import torch  # noqa: F401  # before Ray has threads: imported later, its MKL has been seen to end the process

    if not local:
        ray.init(logging_level="WARNING")
        return
    start_ray(config.workers.most * config.workers.cpus, log_to_driver=True)


def _stop_in_order() -> None:
    """Take the SIGTERM of a job that is stopped for an interrupt, the one signal by which Ray Train gives back what an
    elastic run has reserved: otherwise nobody else gets that for three minutes, the run that is resumed neither."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


if __name__ == "__main__":
    sys.exit(main())
