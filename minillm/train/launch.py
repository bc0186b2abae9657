"""`--nproc N`: run the same command in N processes through torchrun's own launcher."""

import itertools
import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from minillm.errors import RunError

SAVE_TIMEOUT_S = 300
"""How long the processes may save after a signal, before they are killed."""


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `minillm ARGUMENTS` in several processes on this machine; return the exit code.

    The first process that fails decides: its message is on stderr already.

    Raises:
        RunError: A process was killed from outside, so it could not say anything.
    """
    logging.disable(logging.ERROR)  # torchrun's own talk about what we report below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_TIMEOUT_S)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="minillm",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        local_addr="localhost",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "minillm", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        raise RunError(
            f"process {rank} of {num_processes} was killed by signal {-failure.exitcode}",
            hint="`free -h` shows whether memory ran out; "
            f"`minillm {arguments[0]} --resume {_run_of(arguments)}` continues the run",
        ) from None
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _run_of(arguments: Sequence[str]) -> str:
    """Return the run folder that a command line names, or `latest`."""
    found = "latest"
    for flag, value in itertools.pairwise([*arguments, ""]):
        name, sign, joined = flag.partition("=")
        if name in ("--out", "--resume"):
            found = joined if sign else value
    return found
