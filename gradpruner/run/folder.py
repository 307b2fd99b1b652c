"""The folder of one run: its settings, its stages, and what each stage was made from."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.distributed.agreement import agree, need_shared
from gradpruner.distributed.processes import first
from gradpruner.errors import InvalidArgument
from gradpruner.model.identity import Identity, differences
from gradpruner.storage.files import read_json, write_json
from gradpruner.storage.provenance import MADE_FROM, digest, is_made
from gradpruner.training.checkpoints import Checkpoints

SETTINGS, MODEL, CHECKPOINTS = "run.json", "model", "checkpoints"
# stages in their order, and the checkpoints of the last one
STAGES = ("dense.json", "probe", "auto.json", "plan.json", "cut", f"{CHECKPOINTS}/pruned", "model", "pruned.json")
BY_HAND = ("plan.json",)  # may be there before the run begins
SPEEDS = "speeds.json"
RESULTS = ("results.json", SPEEDS, "report.html", "layer_scores.png")  # made from all stages
OURS = (*(name for name in STAGES if name not in BY_HAND), "dense", CHECKPOINTS, *RESULTS)


class RunFolder:
    """A folder whose `run.json` holds exactly these settings; it is made if it does not exist.

    Several processes share the folder. The first one decides what it holds, and writes.

    Args:
        path: the folder.
        settings: what a resumed run must agree with, as JSON holds it.
        identity: the model behind the settings' source.
        save_steps: see `Checkpoints`.

    Raises:
        InvalidArgument: the folder holds a run with other settings, or stages of a run without its settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], identity: Identity, save_steps: int | None) -> None:
        self.path, self._save_steps = path, save_steps
        now = {**settings, MODEL: identity.to_dict()}
        agree("the job", now)
        first(lambda: self._take(now))
        need_shared(path)
        # max_lost may be raised as long as nothing was chosen by it
        self.settings = {"settings": digest({name: now[name] for name in now if name != "max_lost"})}

    def _take(self, now: Mapping[str, Any]) -> None:
        """Write the settings, or check that those in the folder are the same."""
        path = self.path
        before = recorded(path, SETTINGS)
        if before is not None:
            changed = sorted(name for name in now if before.get(name) != now[name])
            if changed == ["max_lost"] and not (path / "plan.json").exists():
                write_json(path / SETTINGS, now)  # nothing was chosen by the old bound, and no check depends on it
            elif changed and not self._begun:
                self.forget_results()
                write_json(path / SETTINGS, now)  # nothing is there that was made with the old settings
            elif changed:
                raise InvalidArgument(
                    f"folder {str(path)!r} holds a run with another {', '.join(named(changed, before, now))}; expected "
                    "a new folder, or the same settings, model and package versions to resume it"
                )
        else:
            there = [name for name in OURS if (path / name).exists()]
            if there:
                raise InvalidArgument(
                    f"folder {str(path)!r} holds {', '.join(there)} of a run, but not its {SETTINGS}; expected a new "
                    f"folder, or the {SETTINGS} that belongs to them"
                )
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / SETTINGS, now)

    @property
    def _begun(self) -> bool:
        """Whether the folder holds what a stage has made, or is making."""
        return any((self.path / name).exists() for name in OURS if name not in RESULTS)

    def forget_results(self) -> None:
        """Delete what is made from all stages, because one of them is made again."""
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)

    def is_made(self, stage: str, made_from: Mapping[str, str]) -> bool:
        """Return whether a stage is finished.

        Args:
            stage: its file or folder.
            made_from: digests of what it must have been made from.

        Raises:
            InvalidArgument: it was made from something else.
        """
        return first(lambda: is_made(self.path / stage, made_from, stale=self.after(stage)))

    def after(self, stage: str) -> list[Path]:
        """Return what is made from the result of a stage. Nothing is made from the dense run."""
        return [] if stage == STAGES[0] else [self.path / name for name in STAGES[STAGES.index(stage) + 1 :]]

    def checkpoints(self, name: str, made_from: Mapping[str, str]) -> Checkpoints:
        """Return where a stage keeps its checkpoints.

        Args:
            name: the stage.
            made_from: digests of what it is made from.
        """
        return Checkpoints(self.path / CHECKPOINTS / name, self._save_steps, made_from)

    def result(self, name: str, made_from: Mapping[str, str], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a stage that trains. Do its work if it is not finished.

        Args:
            name: the stage. Its result is the file `NAME.json`.
            made_from: digests of what it is made from.
            work: trains, and returns the result.
        """
        file = f"{name}.json"
        if not self.is_made(file, made_from):
            first(self.forget_results)
            done = {**work(), MADE_FROM: dict(made_from)}
            first(lambda: write_json(self.path / file, done))
            gc.collect()
        self.checkpoints(name, made_from).discard()

        def finished() -> dict[str, Any]:
            with contextlib.suppress(OSError):  # another stage has checkpoints, or none were made
                (self.path / CHECKPOINTS).rmdir()
            return {key: value for key, value in read_json(self.path / file, "results").items() if key != MADE_FROM}

        return first(finished)


def recorded(folder: Path, settings: str) -> dict[str, Any] | None:
    """Return the settings that a folder holds, or None if it holds none.

    Args:
        folder: the folder of a run or of a comparison.
        settings: name of the file of its settings.
    """
    return read_json(folder / settings, "settings") if (folder / settings).exists() else None


def known_model(before: Mapping[str, Any] | None, source: str) -> dict[str, Any] | None:
    """Return the identity that a folder has recorded for `source`, or None.

    Args:
        before: the settings that the folder has recorded, or None.
        source: the model that is asked for.
    """
    return before.get(MODEL) if before is not None and before.get("source") == source else None


def named(changed: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ.

    Of the model, each file and package version is named. Of a recipe or a preset, each field.

    Args:
        changed: names of the settings that differ.
        before: the settings that a folder has recorded.
        now: the settings that are asked for.
    """
    names: list[str] = []
    for name in changed:
        earlier = before.get(name, {})
        if name == MODEL:
            names += differences(earlier, now[name])
        elif isinstance(now[name], Mapping) and isinstance(earlier, Mapping):
            fields = [key for key in now[name] if earlier.get(key) != now[name][key]]
            names.append(f"{name} ({', '.join(fields)})")
        else:
            names.append(name)
    return names
