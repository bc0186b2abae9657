"""`--nproc N`: run the same command in N processes through torchrun's own launcher."""

import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SAVE_TIMEOUT_S = 300
"""How long the processes may save after a signal, before they are killed."""


def is_launched() -> bool:
    """Tell whether this process was started by torchrun."""
    return "WORLD_SIZE" in os.environ


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `minillm ARGUMENTS` in several processes on this machine; return the exit code.

    The first process that fails decides: its message is on stderr already.
    """
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
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
