"""State that resumes a run without re-sampling, re-noising or re-spending: trained parameters, optimiser state and where the run stands, sealed.

    FOLDER/state        one file: safetensors under AES-256-GCM, the run's name authenticated with it

No seed is in it (PITFALLS 40): sampling and noise come from the run key by step number, and that key lives in `keys.py` and is destroyed when the run closes. Noise that later
steps take back is in it, sealed once more under that same key (`course.py`).
Parameters after a noised step are the mechanism's output, but Adam's state of a *non-private* control is not, so every checkpoint is sealed alike.

Guarantees: a checkpoint is the state before or after a step, never between (written beside, synced, renamed); one of another run, plan or base model does not
open; what `restore` puts back is bit for bit what `save` took.

Several ranks (`train/parallel.py`): rank 0 writes the file, all read it, whole also where weights are sharded; nothing in it depends on their number, so a run goes on with another number of ranks: the same
draws, sums that differ by rounding.

Lineage is told of each state around the moment at which it takes its place (`Checkpoints.placing`): no state lies there that has no name.

Erasure (`CheckpointStore`): the state of a run that was killed is a function of the subject's documents whose noise the run key can still take away. Every such state
is destroyed, whoever asks: an unfinished run that goes on repeats its steps with the same draws, to the same bits. So is the state of a killed public track, which no noise hides.

Does not cover: checkpoints larger than memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from discreet.corpus import SnapshotStore
from discreet.errors import DigestMismatch
from discreet.keys import Key, Keyring
from discreet.model import trained_parameters
from discreet.record import Digest, SubjectId
from discreet.store import storage_full, sync_folder
from discreet.train.parallel import gathered, split_like

PURPOSE = "checkpoint"
"""Name of the key that seals the state of runs."""

PRIVATE, PUBLIC = "private", "public"
"""The tracks of a run: each keeps its state in a folder of its own."""

Placing = Callable[[Digest | None], AbstractContextManager[None]]
"""Entered with the digest of a state before it takes its place (None: before the state goes), left when that is done."""

_FILE = "state"
_PARTIAL = ".state-"
_HEADER = "discreet"
_COURSE = "course"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where a run keeps its state, and under which key.

    Attributes:
        folder: one run's own folder.
        key: seals the state (`keyring.purpose("checkpoint")`), not the run key.
        run: name of the run, authenticated with the state.
        placing: who writes down which states lie there; it may be called again for the same state.
    """

    folder: Path
    key: Key
    run: str
    placing: Placing = lambda _: nullcontext()

    @staticmethod
    def of(runs: Path, run: str, keyring: Keyring, *, track: str = PRIVATE, placing: Placing = lambda _: nullcontext()) -> Checkpoints:
        """Returns the place of a track's state below the folder of all runs."""
        return Checkpoints(folder=runs / run / track, key=keyring.purpose(PURPOSE), run=run, placing=placing)

    @property
    def _context(self) -> bytes:
        return b"checkpoint/" + self.run.encode()

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        curve: tuple[tuple[int, float], ...],
        subject: Mapping[str, str],
        course: bytes = b"",
        writes: bool = True,
    ) -> None:
        """Writes the state after `step`, in place of the one before.

        Args:
            step: steps taken, >= 0.
            curve: (step, public held-out loss) so far.
            subject: digests of what is trained (plan, base model, snapshot): `restore` asks for the same.
            course: what a private run carries beside, sealed under its run key (`course.Course.sealed`).

            writes: whether this rank writes; the others lend their shards, where weights are sharded.

        Raises:
            StorageFull: when the disk is full; the state before stays.
        """
        state = _state(model, optimizer)
        if not writes:
            return
        header = json.dumps({"step": step, "curve": curve, "subject": dict(sorted(subject.items()))})
        carried = {_COURSE: torch.frombuffer(bytearray(course), dtype=torch.uint8)} if course else {}
        content = safetensors.torch.save(state | carried, metadata={_HEADER: header})
        _write(self.folder / _FILE, self.key.seal(content, context=self._context), self.placing)

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, subject: Mapping[str, str]
    ) -> tuple[int, tuple[tuple[int, float], ...]] | None:
        """Puts a saved state back; returns its step and curve, or None when there is none.

        Raises:
            SealBroken: when the file was changed, cut short, or belongs to another run or key.
            DigestMismatch: when it is the state of another plan, base model or snapshot.
        """
        if not (self.folder / _FILE).exists():
            return None
        content, header = self._read()
        differing = sorted(name for name in header["subject"].keys() | subject.keys() if header["subject"].get(name) != subject.get(name))
        if differing:
            raise DigestMismatch(
                "a checkpoint of this plan, base model and snapshot", value=f"another {', '.join(differing)}", remedy="Start a new run."
            )
        tensors = safetensors.torch.load(content)
        tensors.pop(_COURSE, None)
        _restore(model, optimizer, tensors)
        return int(header["step"]), tuple((int(step), float(loss)) for step, loss in header["curve"])

    def course(self) -> bytes:
        """Returns the sealed course of the saved state, empty where nothing was carried or saved.

        Raises:
            SealBroken: as `restore`.
        """
        if not (self.folder / _FILE).exists():
            return b""
        held = safetensors.torch.load(self._read()[0]).get(_COURSE)
        return b"" if held is None else held.numpy().tobytes()

    def destroy(self) -> None:
        """Deletes the state, and what a killed write left of one. Idempotent."""
        with self.placing(None):
            for path in self._files():
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [path for path in (self.folder / _FILE, *self.folder.glob(f"{_PARTIAL}*")) if path.exists()]

    def _read(self) -> tuple[bytes, dict[str, Any]]:
        content = self.key.open((self.folder / _FILE).read_bytes(), context=self._context)
        header: dict[str, Any] = json.loads(_metadata(content)[_HEADER])
        return content, header


@final
class CheckpointStore:
    """What the states of unfinished runs, of both tracks, hold of a subject, for `governance.erasure`."""

    name = "checkpoints"

    def __init__(self, runs: Path, *, states: Callable[[str, str], Checkpoints], snapshots: SnapshotStore) -> None:
        """Binds the store to a project.

        Args:
            runs: folder of all runs, one folder each.
            states: (run, track) -> where its state is kept.
            snapshots: says which corpora hold a subject; a state names its corpus.
        """
        self._runs = runs
        self._states = states
        self._snapshots = snapshots

    def holds(self, subject: SubjectId) -> list[Digest]:
        """Returns the roots of the snapshots that hold the subject and that a state was computed from."""
        trained_on = {each._read()[1]["subject"].get("snapshot") for each in self._all() if (each.folder / _FILE).exists()}
        return [root for root in self._snapshots.holds(subject) if root in trained_on]

    def purge(self, subject: SubjectId) -> None:  # noqa: ARG002  # the states of all runs go, so that a request does not tell who was in
        """Destroys the state of every unfinished run, the same for a known and an unknown subject. Idempotent."""
        for each in self._all():
            each.destroy()

    def absence(self, subject: SubjectId) -> bool:  # noqa: ARG002 - see `purge`
        """Looks at the folders again and returns whether no state is left in any of them."""
        return not any(each._files() for each in self._all())

    def _all(self) -> list[Checkpoints]:
        folders = sorted(path for track in (PRIVATE, PUBLIC) for path in self._runs.glob(f"*/{track}"))
        return [self._states(path.parent.name, path.name) for path in folders]


def _metadata(content: bytes) -> dict[str, str]:
    """The header of safetensors bytes: 8 bytes of length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters as `parameter/NAME`, optimiser state as `optimizer/KEY/NAME`; every value of torch's own optimisers is a tensor or None."""
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"parameter/{name}"] = gathered(parameter.detach()).contiguous().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer/{key}/{name}"] = gathered(torch.as_tensor(value).detach()).contiguous().clone()
    return tensors


def _like(parameter: Tensor, tensor: Tensor, key: str) -> Tensor:
    """Puts a state of the optimiser where its parameter lies; its count of steps stays on the CPU, where torch's optimisers read it."""
    return tensor if key == "step" else split_like(tensor.to(parameter.device), parameter)


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = trained_parameters(model)
    states: dict[nn.Parameter, dict[str, Any]] = {}
    if {f"parameter/{name}" for name in parameters} != {name for name in tensors if name.startswith("parameter/")}:
        raise DigestMismatch("a checkpoint with the parameters that this run trains")
    for path, tensor in tensors.items():
        kind, _, rest = path.partition("/")
        if kind == "parameter":
            with torch.no_grad():
                parameters[rest].copy_(split_like(tensor, parameters[rest]))
        else:
            key, _, name = rest.partition("/")
            states.setdefault(parameters[name], {})[key] = _like(parameters[name], tensor, key)
    for parameter, state in states.items():
        optimizer.state[parameter] = state


def _write(path: Path, content: bytes, placing: Placing) -> None:
    """Writes a file beside its place, syncs it and renames it over the old one."""
    digest = Digest("sha256:" + hashlib.sha256(content).hexdigest())
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with placing(digest):
                Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise storage_full() from None
        raise
