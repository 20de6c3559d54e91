"""transformers' callbacks for trackers, told less than transformers tells them, and going on with the run they had.

Each class overrides how a tracked run begins and ends; what happens at a log or a checkpoint is upstream's. A tracked
run that the caller had begun already is used and left open, as upstream does.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from ...recipe.machine import Tracker
from .environment import environment
from .told import OnlyWeights, ToldArguments

PROJECT = "qlora-neft"
End = Literal["done", "stopped", "failed"]


@dataclass(frozen=True)
class Tracked:
    """A run as its trackers know it.

    Attributes:
        name: The name of its folder.
        group: The name of what it belongs to, such as a sweep; None for a run of its own.
        folder: Where a tracker that writes files puts them.
        group_folder: Where one that keeps several runs in one place puts that: the sweep's folder, or the run's.
        told: What is said of the run.
        weights: The model that is trained.
        known: What `TrackerCallback.ids` returned in an earlier session, to go on with that run; empty for a new one.
        step: Step from which the session goes on, None from the beginning.
    """

    name: str
    group: str | None
    folder: Path
    group_folder: Path
    told: ToldArguments
    weights: OnlyWeights
    known: Mapping[str, str]
    step: int | None

    @property
    def args(self) -> TrainingArguments:
        """What upstream takes for the training arguments."""
        return cast("TrainingArguments", self.told)


class TrackerCallback(Protocol):
    """What the classes below have in common, besides being callbacks."""

    def begin(self, run: Tracked, state: TrainerState) -> str:
        """Begin a tracked run, or go on with an earlier session's; return where it is found, for the user."""
        ...

    def ids(self) -> dict[str, str]:
        """Return what a later session needs to go on with it."""
        ...

    def end(self, how: End) -> None:
        """End it, within a minute or so, whatever the network does."""
        ...


class TensorBoard(TensorBoardCallback):
    """Event files in ``tensorboard/`` in the run's folder, or in ``TENSORBOARD_LOGGING_DIR``."""

    _from: int | None = None

    def begin(self, run: Tracked, state: TrainerState) -> str:
        """Open a new event file; points of an earlier session that will be logged again are marked as replaced."""
        folder = Path(self.logging_dir or run.folder / "tensorboard")
        self.logging_dir = str(folder)
        if run.known or folder.is_dir():
            self._from = 0 if run.step is None else run.step + 1
        self.on_train_begin(run.args, state, cast("Any", None), model=run.weights)
        return f"tensorboard --logdir {folder}"

    def _init_summary_writer(self, args: Any) -> None:
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=self._from)

    def ids(self) -> dict[str, str]:
        """Return that there is one."""
        return {"begun": "yes"}

    def end(self, how: End) -> None:
        """Close the event file."""
        if self.tb_writer:
            self.tb_writer.close()
            self.tb_writer = None


class Trackio(TrackioCallback):
    """A run in trackio's own store (``TRACKIO_DIR``), or on the Space or server that its variables name."""

    _name = _project = ""

    def begin(self, run: Tracked, state: TrainerState) -> str:
        """Begin a run, or go on with the one of that name. trackio knows runs by name, so each gets its own."""
        trackio = self._trackio
        own = f"{run.name}-{secrets.token_hex(2)}"
        self._name = run.known.get("name", own)
        # TRACKIO_PROJECT is what earlier versions of transformers read; the group of a sweep is in its own project.
        default = os.environ.get("TRACKIO_PROJECT") or (f"{PROJECT}-{run.group}" if run.group else PROJECT)
        self._project = run.known.get("project", default)
        trackio.init(
            project=self._project,
            name=self._name,
            group=run.group,
            resume="allow",
            config=run.told.to_dict(),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        trackio.config["_Username"] = None  # trackio asks the Hub whose token this is, and notes the name
        self._space_id = trackio.context_vars.current_space_id.get()
        self._initialized = True
        here = "on its server" if os.environ.get("TRACKIO_SERVER_URL") else f"trackio show --project {self._project}"
        return f"{self._name}, {self._space_id or here}"

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        """Log under the optimizer's step, not as the next of trackio's own count, which upstream leaves it to."""
        from transformers.integrations.integration_utils import rewrite_logs

        self._trackio.log({**rewrite_logs(logs), "train/global_step": state.global_step}, step=state.global_step)

    def ids(self) -> dict[str, str]:
        """Return project and name."""
        return {"project": self._project, "name": self._name}

    def end(self, how: End) -> None:
        """Send what is left; trackio waits half a minute for it at most."""
        if self._initialized:
            self._initialized = False
            self._trackio.finish()


# What wandb would collect besides what it is told: name of machine and user, command line, git, console, packages,
# load. Each is left alone where its variable says otherwise.
WANDB_SETTINGS: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "save_code": False,
    "host": "",
    "username": "",
    "email": "",
    "program": "",
    "x_executable": "",
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "silent": True,  # this program says where the run is, in one line
    "init_timeout": 30.0,  # seconds; a run must not wait for a server
    "finish_timeout": 60.0,
}


class Wandb(WandbCallback):
    """A run in wandb: its files in ``wandb/`` in the run's folder, or below ``WANDB_DIR``."""

    _is_ours = False

    def begin(self, run: Tracked, state: TrainerState) -> str:
        """Begin a run, or go on with the one of that id."""
        wandb = self._wandb
        if wandb.run is None:
            self._is_ours = True
            own = {} if "WANDB_DIR" in os.environ else {"root_dir": str(run.folder)}
            wandb.init(
                project=run.known.get("project") or os.environ.get("WANDB_PROJECT", PROJECT),
                entity=run.known.get("entity") or None,
                name=os.environ.get("WANDB_NAME", run.name),
                group=os.environ.get("WANDB_RUN_GROUP", run.group),
                id=run.known.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
                resume="allow",
                settings=wandb.Settings(**own, **_unless_set(WANDB_SETTINGS, wandb.Settings.model_fields)),
            )
        self.setup(run.args, state, run.weights)
        if wandb.run.disabled:
            return "switched off by WANDB_MODE"
        here = f"wandb sync {Path(wandb.run.dir).parent}"
        return here if wandb.run.offline else wandb.run.url or here

    def ids(self) -> dict[str, str]:
        """Return the run's id and where it is."""
        run = self._wandb.run
        return {"id": run.id, "project": run.project or "", "entity": run.entity or ""}

    def end(self, how: End) -> None:
        """Finish a run that was begun here; one that stopped or failed is marked so."""
        if self._is_ours and self._wandb.run is not None:
            self._wandb.run.finish(exit_code={"done": 0, "stopped": 130, "failed": 1}[how])


def _unless_set(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that this version of wandb knows and no variable of the user's sets."""
    return {key: value for key, value in settings.items() if key in known and f"WANDB_{key.upper()}" not in os.environ}


class MLflow(MLflowCallback):
    """A run in MLflow: in ``mlflow/mlflow.db`` in the run's folder, or where ``MLFLOW_TRACKING_URI`` says."""

    _set_uri = _is_ours = False

    def begin(self, run: Tracked, state: TrainerState) -> str:
        """Begin a run, or go on with the one of that id."""
        mlflow = self._ml_flow
        if not mlflow.is_tracking_uri_set():
            place = (run.group_folder / "mlflow").absolute()
            place.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}")
            self._set_uri = True
        earlier = None
        if mlflow.active_run() is None:
            self._is_ours = True
            client = mlflow.MlflowClient()
            earlier = self._earlier(client, run.known.get("run_id") or os.environ.get("MLFLOW_RUN_ID"))
            mlflow.start_run(run_id=earlier or self._new_run(client, run), run_name=run.name)
        self._current = mlflow.active_run().info.run_id
        # Parameters cannot be changed, so a run that goes on keeps those it has.
        told = run.args if earlier is None else cast("TrainingArguments", ToldArguments(run.name))
        with environment({"MLFLOW_RUN_ID": None, "MLFLOW_NESTED_RUN": None}):  # setup() would begin a second run
            self.setup(told, state, run.weights)
        uri = mlflow.get_tracking_uri()
        return f"mlflow ui --backend-store-uri {uri}" if self._set_uri else f"{self._current}, on its server"

    def _earlier(self, client: Any, run_id: str | None) -> str | None:
        """Return the id of an earlier session's run, None if it is not in this store."""
        if run_id is not None:
            with suppress(self._ml_flow.exceptions.MlflowException):
                return client.get_run(run_id).info.run_id
        return None

    def _new_run(self, client: Any, run: Tracked) -> str:
        """Return the id of a new run, made by the client: `start_run` would add user, script and commit to it."""
        experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if experiment_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.group or PROJECT
            found = client.get_experiment_by_name(name)
            # Left to itself, MLflow would keep artifacts beside a store of its own in the current directory.
            artifacts = (run.group_folder / "mlflow" / "artifacts").absolute().as_uri() if self._set_uri else None
            experiment_id = found.experiment_id if found else client.create_experiment(name, artifacts)
        return client.create_run(experiment_id, run_name=run.name).info.run_id

    def ids(self) -> dict[str, str]:
        """Return the run's id."""
        return {"run_id": self._current}

    def end(self, how: End) -> None:
        """End a run that was begun here, and leave MLflow as it was before."""
        mlflow = self._ml_flow
        try:
            mlflow.flush_async_logging()
            if self._is_ours and mlflow.active_run() is not None:
                mlflow.end_run({"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[how])
        finally:
            self._auto_end_run = False
            if self._set_uri:
                mlflow.set_tracking_uri(None)


CALLBACKS: Mapping[Tracker, type[Any]] = {
    "trackio": Trackio,
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
}
