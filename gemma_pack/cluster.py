"""The variants of a build on a Ray cluster: a task each, for a worker with the memory, and the GPU, that it takes.

What a task makes lies in the directory of the build, which all workers share; back come a few lines of JSON that say
how far it came. Ray gives a task whose worker is lost to another one, and there every stage goes on from what it finds,
layer by layer. Logins and keys stay where the build was started: it pushes, the workers do not.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import socket
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict

from gemma_pack import __version__
from gemma_pack.build_file import BuildFile  # noqa: TC001 - pydantic reads the annotation
from gemma_pack.console import Console, format_bytes
from gemma_pack.errors import GemmaPackError, InvalidUsageError, MachineError, OfflineError
from gemma_pack.matrix import Means, Wanted, finish_variant, quantize_group, wanted_variants
from gemma_pack.no_proxy import leave_out_ipv6_networks
from gemma_pack.outcome import VariantOutcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gemma_pack.console import Reporter

RETRIES: Final = 3
"""How often a variant whose worker was lost is run again."""
ADDRESS: Final = "RAY_ADDRESS"
ANSWER_SECONDS: Final = 10
_NAMES: Final = ("demo", "builtin", "embedded", "none")
"""Of a model, a text and bases: they mean no path, whatever lies there."""
VALIDATION_BYTES: Final = 2_000_000_000
"""Beside the weights of base and variant, both in bf16: libraries, logits and caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a worker must have free for a variant."""

    memory_bytes: int
    gpus: int

    def fits(self, node: dict[str, Any]) -> bool:
        """Say whether a node of the cluster has that much, busy or not."""
        has = node["Resources"]
        return bool(
            node["Alive"]
            and has.get("memory", 0) >= self.memory_bytes
            and has.get("GPU", 0) >= self.gpus
            and has.get("CPU", 0) >= 1
        )

    def __str__(self) -> str:
        return f"{format_bytes(self.memory_bytes)} of memory{' and a GPU' if self.gpus else ''}"


class _Order(BaseModel):
    """What a task is told."""

    model_config = ConfigDict(frozen=True)

    plan: BuildFile
    number: int
    """Of the variant, among those of the plan."""
    device: str
    offline: bool
    marker: Path
    version: str = __version__


class _Relay(io.TextIOBase):
    """What Ray prints, such as that a worker was lost, becomes warnings: stdout holds the result alone."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._begun = reporter, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if said := re.sub(r"\x1b\[[0-9;]*m", "", line).strip():
                self._reporter.warn(said)
        return len(text)


def build_on_cluster(
    plan: BuildFile, wanted: Sequence[Wanted], means: Means, reporter: Reporter
) -> Iterator[VariantOutcome]:
    """Yield each variant, packed or failed, as it is ready.

    Raises:
        InvalidUsageError: no cluster is named.
        OfflineError: the cluster cannot be reached.
        MachineError: Ray is missing, or the cluster cannot be joined from here.
    """
    with redirect_stdout(_Relay(reporter)), _joined_cluster() as ray, _marked(Path(plan.output)) as marker:
        nodes = ray.nodes()
        on_gpu = means.device == "cuda" or (means.device == "auto" and any(_gpus(node) for node in nodes))
        task = ray.remote(_build_remotely)
        order = _Order(
            plan=_with_absolute_paths(plan), number=0, device=means.device, offline=means.offline, marker=marker
        )
        waiting: dict[Any, Wanted] = {}
        for number, one in enumerate(wanted):
            try:
                demand = demand_of(plan, one, means, on_gpu=on_gpu)
                fitting = [node for node in nodes if demand.fits(node)]
                if not fitting:
                    raise MachineError(
                        f"no worker of the cluster has {demand}", hint="add a larger one, or use fewer --samples"
                    )
            except GemmaPackError as error:
                yield one.begun().failed("quantize", error)
                continue
            # without a GPU a variant keeps all cores of a node busy, so it gets those of the smallest that can do it
            cpus = 1 if demand.gpus else int(min(node["Resources"]["CPU"] for node in fitting))
            options = task.options(
                num_cpus=cpus, num_gpus=demand.gpus, memory=demand.memory_bytes, max_retries=RETRIES,
                scheduling_strategy="SPREAD", name=one.directory.name,
            )  # fmt: skip
            reporter.status(f"{one.recipe.name} of {one.base.model} waits for a worker with {demand}")
            waiting[options.remote(order.model_copy(update={"number": number}).model_dump_json())] = one
        while waiting:
            [ready], _ = ray.wait(list(waiting), num_returns=1)
            outcome = _outcome(ray, ready, waiting.pop(ready))
            reporter.status(f"{outcome.recipe} of {outcome.model}: {outcome.word}, {len(waiting)} to come")
            yield outcome


def demand_of(plan: BuildFile, one: Wanted, means: Means, *, on_gpu: bool) -> Demand:
    """Return what a variant takes, from the headers of its base: quantizing or validating, whichever is more."""
    from gemma_pack.build import CalibrationChoice
    from gemma_pack.quantization.memory import peak_memory
    from gemma_pack.sources.outline import outline

    said = plan.calibration
    choice = CalibrationChoice(said.text, said.samples, said.sequence_length, said.seed)
    calibration = choice.applied_to(one.recipe.calibration) if one.recipe.calibration else None
    found = outline(one.base.model, revision=one.base.revision, offline=means.offline)
    quantizing = peak_memory(found.checkpoint, one.recipe, calibration)
    if on_gpu:
        return Demand(memory_bytes=max(quantizing.host_bytes, VALIDATION_BYTES), gpus=1)
    validating = 2 * found.checkpoint.size_bytes + VALIDATION_BYTES
    return Demand(memory_bytes=max(quantizing.without_gpu_bytes, validating), gpus=0)


@contextmanager
def _joined_cluster() -> Iterator[Any]:
    """Yield Ray's module, connected to the cluster that RAY_ADDRESS names."""
    address = os.environ.get(ADDRESS, "")
    if not address or address == "local":
        raise InvalidUsageError(
            f"{ADDRESS} names no cluster", hint=f"{ADDRESS}=HOST:6379, or auto for the one that this machine is part of"
        )
    _require_answer(address)
    try:
        import ray
    except ImportError as error:
        raise MachineError("Ray is not installed", hint="pip install 'gemma-pack[ray]'") from error
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MachineError(
            f"the Ray cluster at {address} cannot be joined: {reason}",
            hint=f"run this on a machine of the cluster; ray start --address={address} makes it one",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise OfflineError where nobody listens at `address`; Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():  # `auto`, or what only Ray can tell
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise OfflineError(
            f"the Ray cluster at {address} cannot be reached: {error}", hint=f"check {ADDRESS}, and ray status there"
        ) from error


@contextmanager
def _marked(output: Path) -> Iterator[Path]:
    """Leave a file in the directory of the build while it runs, by which a worker sees that it has the same one."""
    output.mkdir(parents=True, exist_ok=True)
    marker = output.resolve() / f".build-{secrets.token_hex(8)}"
    marker.touch()
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


def _with_absolute_paths(plan: BuildFile) -> BuildFile:
    """Return the plan as it reads from any working directory."""

    def absolute(name: str) -> str:
        return str(Path(name).resolve()) if name not in _NAMES and Path(name).exists() else name

    text = plan.calibration.text
    return plan.model_copy(
        update={
            "model": absolute(plan.model) if plan.model else None,
            "models": tuple(one.model_copy(update={"model": absolute(one.model)}) for one in plan.models),
            "recipes": tuple(absolute(name) if name.endswith((".yaml", ".yml")) else name for name in plan.recipes),
            "output": str(Path(plan.output).resolve()),
            "calibration": plan.calibration.model_copy(update={"text": absolute(text) if text else None}),
            "validation": plan.validation.model_copy(update={"text": absolute(plan.validation.text)}),
            "package": plan.package.model_copy(update={"base": absolute(plan.package.base)}),
        }
    )


def _build_remotely(order_json: str) -> str:
    """Make the variant on a worker, and say so in its log; return how far it came as JSON."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # both as the command line does, for the same reasons
    leave_out_ipv6_networks()
    order = _Order.model_validate_json(order_json)
    plan, here = order.plan, os.uname().nodename
    one = wanted_variants(plan)[order.number]
    if order.version != __version__:
        error = MachineError(
            f"the worker {here} has gemma-pack {__version__}, and {order.version} started the build",
            hint="install one version everywhere",
        )
        return one.begun().failed("quantize", error).model_dump_json()
    if not order.marker.is_file():
        error = MachineError(
            f"the worker {here} does not see {order.marker.parent}",
            hint="build into a directory that all workers share, with -o",
        )
        return one.begun().failed("quantize", error).model_dump_json()
    log = one.directory.with_name(f"{one.directory.name}.log")
    with log.open("a", encoding="utf-8", buffering=1) as stream:
        reporter = Console(stdout=stream, stderr=stream)
        reporter.status(f"── on {here}, process {os.getpid()}")
        means = Means(device=order.device, offline=order.offline)
        made = quantize_group(plan, [one], means, reporter)
        return finish_variant(plan, one, made[one.directory], means, reporter).model_dump_json()


def _outcome(ray: Any, ready: Any, one: Wanted) -> VariantOutcome:  # noqa: ANN401 - Ray's module and its handle
    """Return what a task that has ended brings back, under the names by which it was asked for."""
    try:
        outcome = VariantOutcome.model_validate_json(ray.get(ready))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        lost = MachineError(f"workers were lost {RETRIES + 1} times: {reason}", hint=f"see {one.directory}.log")
        return one.begun().failed("quantize", lost)
    images = tuple(
        image.model_copy(update={"layout": one.directory.with_name(image.layout.name)}) for image in outcome.images
    )
    return outcome.model_copy(update={"model": one.base.model, "directory": one.directory, "images": images})


def _gpus(node: dict[str, Any]) -> float:
    return float(node["Resources"].get("GPU", 0)) if node["Alive"] else 0.0
