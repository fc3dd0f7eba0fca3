"""Several processes that run the same program together, each with its own devices: how they connect, and how they agree.

`jax.distributed` connects the processes. Values and errors go through its key-value store and not through the devices, so
the host never waits for the device: an exchange takes 0.7 ms between two processes of one host. In a single process,
nothing is exchanged.
"""

import contextlib
import itertools
import json
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from liger_jax import errors
from liger_jax.errors import DataWarning, LigerWarning, UserError

CONNECT_SECONDS = 300  # that processes wait for each other at the start
ANSWER_SECONDS = 1800  # that a process waits in `exchange` for another one that is alive
ERROR_SECONDS = 300  # the same after an error of its own, before it ends alone
# A process whose heartbeats stop is dead. JAX then ends the others.
HEARTBEAT_SECONDS = 60
KEY = "liger_jax"

_rounds = itertools.count()  # all processes call `exchange` in the same order
_silent: set[int] = set()  # processes that did not answer: later exchanges do not wait for them again


def count() -> int:
    """Returns the number of processes. It does not initialize JAX's devices."""
    return distributed.global_state.num_processes


def index() -> int:
    """Returns the number of this process, from 0."""
    return distributed.global_state.process_id


def is_first() -> bool:
    """Returns whether this is process 0, which alone writes files and logs."""
    return index() == 0


# ---- agreement -------------------------------------------------------------------------------------------------------


def exchange(value: Any = None, error: Exception | None = None) -> list[Any]:
    """Returns the values of all processes, in their order. All processes must call it.

    Args:
        value: anything that JSON can represent.
        error: this process's error, if it failed.

    Raises:
        Exception: the error of the first process that failed, in all processes: its own there, and one of the same class of
            `liger_jax.errors` elsewhere. `is_agreed` tells such errors from others.
        UserError: a process does not answer.

    Example:
        >>> from liger_jax import processes
        >>> processes.exchange({"tokens": 7})  # in a single process
        [{'tokens': 7}]
    """
    if count() == 1:
        if error is not None:
            raise error
        return [value]
    client, number = _client(), next(_rounds)
    client.key_value_set(_key(number, index()), json.dumps({"value": value, "error": _describe(error)}))
    seconds = 0 if _silent else ERROR_SECONDS if error else ANSWER_SECONDS
    answers = [json.loads(_read(_key(number, process), seconds) or "null") for process in range(count())]
    if None in answers:
        _silent.update(process for process, answer in enumerate(answers) if answer is None)
        raise error or UserError(f"Processes {sorted(_silent)} do not answer; expected all processes to run")
    if number:  # every process that answers has read the previous round
        client.key_value_delete(_key(number - 1, index()))
    for process, answer in enumerate(answers):
        if answer["error"]:
            agreed = error if process == index() and error is not None else _rebuild(answer["error"], process)
            agreed.agreed = True  # type: ignore[attr-defined]
            raise agreed
    return [answer["value"] for answer in answers]


@contextlib.contextmanager
def agree(*, together: bool = True) -> Iterator[None]:
    """Runs a block that may fail in some of the processes. All processes must enter it; if one fails, all raise its error.

    Args:
        together: whether the processes act together, on arrays that they share. False runs the block without synchronizing.

    Example:
        >>> with processes.agree():  # doctest: +SKIP
        ...     if processes.is_first():
        ...         write_record(folder, record)
    """
    if count() == 1 or not together:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if is_agreed(caught):
            raise
        error = caught
    exchange(error=error)


def from_first(function: Callable[[], Any], *, together: bool = True) -> Any:
    """Returns the value of a function that process 0 alone calls. If it fails, all processes raise its error.

    Args:
        function: returns a value that JSON can represent.
        together: as for `agree`; with False, each process calls the function.
    """
    if count() == 1 or not together:
        return function()
    value, error = None, None
    if is_first():
        try:
            value = function()
        except Exception as caught:
            error = caught
    return exchange(value, error)[0]


def is_agreed(error: BaseException | None) -> bool:
    """Returns whether all processes have raised this error, or its cause, so that process 0 alone should print it."""
    while error is not None and not getattr(error, "agreed", False):
        error = error.__cause__
    return error is not None


def on_this_host() -> int:
    """Returns the number of processes on this host, which share its cores."""
    host = socket.gethostname()
    return exchange(host).count(host)


def _client() -> Any:
    return distributed.global_state.client


def _key(number: int, process: int) -> str:
    return f"{KEY}/{number}/{process}"


def _read(key: str, seconds: float) -> str | None:
    """Waits for a value of a process, and returns None if there is none. Signals are handled while it waits."""
    end = time.monotonic() + seconds
    while True:
        try:
            return _client().blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() > end:
            return None


def _describe(error: Exception | None) -> list[str] | None:
    """Returns the class and the message of an error; of a subclass elsewhere, the class in `liger_jax.errors`."""
    if error is None:
        return None
    known = (kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return [next(known, type(error)).__name__, str(error)]


def _rebuild(description: list[str], process: int) -> UserError:
    """Returns the error of another process. What is not a user's mistake is a bug, whose traceback that process prints."""
    name, message = description
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, UserError):
        return kind(f"process {process}: {message}")
    return UserError(f"process {process} failed: {name}: {message}")


# ---- connection ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(coordinator: str | None, processes: int | None, process: int | None) -> Iterator[None]:
    """Connects this process with the others, and lets them know if the block fails. Call it before JAX uses a device.

    In the block, process 0 alone prints the warnings that concern all processes.

    Args:
        coordinator: HOST:PORT of process 0; "auto": JAX finds the three values from SLURM, Open MPI or Kubernetes; None:
            this process runs alone, or is connected already.
        processes: number of processes.
        process: number of this process, from 0.

    Raises:
        UserError: a value is missing or out of range, or process 0 cannot be reached.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            raise UserError("coordinator is missing; expected --coordinator HOST:PORT with --processes and --process")
    else:
        _connect(coordinator, processes, process)
    with warnings.catch_warnings():
        if not is_first():
            warnings.simplefilter("ignore", LigerWarning)
            warnings.simplefilter("default", DataWarning)
        with agree():  # also waits for all to end: JAX's own wait, after that, is shorter
            yield


def _connect(coordinator: str, processes: int | None, process: int | None) -> None:
    options: dict[str, Any] = {}
    if coordinator != "auto":
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"coordinator is {coordinator!r}; expected HOST:PORT of process 0, or auto")
        if processes is None or processes < 1:
            raise UserError(f"processes is {processes}; expected the number of processes, at least 1")
        if process is None or not 0 <= process < processes:
            raise UserError(
                f"process is {process}; expected 0 to {processes - 1}, a number of its own for each process"
            )
        _wait_for(host, int(port), process)
        # the values are complete; JAX would otherwise choose one GPU per process inside a SLURM job
        options = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        options["cluster_detection_method"] = "deactivate"
    elif processes is not None or process is not None:
        raise UserError("coordinator is auto; expected neither --processes nor --process, which are then found as well")
    # JAX's own handler of SIGTERM would take the signal before training starts, and keep the process alive
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:  # JAX found no cluster
        raise UserError(
            "coordinator is auto, but there is no SLURM, Open MPI or Kubernetes job; expected --coordinator HOST:PORT "
            "with --processes and --process"
        ) from error


def _wait_for(host: str, port: int, process: int) -> None:
    """Waits until process 0 listens, which JAX would do as well, but end in an abort if it does not."""
    end, reason = time.monotonic() + CONNECT_SECONDS, ""
    while process > 0:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise UserError(f"process 0 at {host}:{port} cannot be reached ({reason}); expected it to be running")
        time.sleep(0.2)


# ---- arrays ----------------------------------------------------------------------------------------------------------


def spans(tree: Any) -> bool:
    """Returns whether arrays of a tree are split or copied over devices of several processes."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return any(isinstance(sharding, Sharding) and not sharding.is_fully_addressable for sharding in shardings)


def put(tree: Any, shardings: Any) -> Any:
    """Returns arrays on the devices of their shardings, as `jax.device_put` does.

    In several processes, each one puts its own part of the same arrays. `jax.device_put` would first compare the arrays of
    all processes, on the devices.

    Args:
        tree: an array, or a pytree of arrays.
        shardings: a sharding, or None for the default device; or a pytree of shardings like `tree`.
    """
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)

    def put_part(array: Any, sharding: Sharding) -> jax.Array:
        if isinstance(array, jax.Array):
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return jax.tree.map(put_part, tree, shardings)


def to_host(array: Any) -> np.ndarray:
    """Returns an array in host memory. If it is split over several processes, all of them must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        assert isinstance(array.sharding, NamedSharding)
        array = jax.jit(_same, out_shardings=NamedSharding(array.sharding.mesh, P()))(array)
    return np.asarray(array)


def _same(array: jax.Array) -> jax.Array:
    return array


def check_mesh(mesh: Mesh | None) -> None:
    """Raises UserError if there are several processes and the mesh does not have all their devices.

    A process without a device on the mesh would wait forever for the others.
    """
    if count() == 1:
        return
    axes = {} if mesh is None else {name: size for name, size in mesh.shape.items() if size > 1}
    devices = set() if mesh is None else set(mesh.devices.flat)
    if devices != set(jax.devices()):
        shape = " x ".join(f"{name} {size}" for name, size in axes.items()) or "of one device"
        raise UserError(
            f"The mesh {shape} has {len(devices) or 1} of {jax.device_count()} devices; expected all devices of the "
            f"{count()} processes"
        )
