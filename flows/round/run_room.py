"""The room that a run needs on its nodes and on the disk of the home folder, checked before devices are taken."""

import shutil
from pathlib import Path

from flows.round.run_model import RoundUnfit
from yuan.config import ModelConfig
from yuan.node_memory import MainMemoryEstimate, estimate_main_memory
from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.pool import Pool
from yuan.recipe import Recipe
from yuan.run_estimate import estimate_growing_bytes

LOCAL_STORE_FOLDER = "s3"  # of the object store that `cotrain up` starts, below the home folder


def check_room(home: Path, recipe: Recipe, model: ModelConfig, pool: Pool, plan: PipelinePlan) -> MainMemoryEstimate:
    """Check that a prepared run fits the main memory of its nodes and the disk of the home folder.

    Raises:
        RoundUnfit: if it does not.
    """
    main_memory = estimate_main_memory(plan, model, pool)
    if main_memory.problem is not None:
        raise RoundUnfit(main_memory.problem)
    has_local_store = (home / LOCAL_STORE_FOLDER).is_dir()
    needed = estimate_growing_bytes(recipe, model, has_local_store=has_local_store)
    free = shutil.disk_usage(home).free
    if needed > free:
        raise RoundUnfit(
            f"the run needs {needed / GIB:,.1f} GiB of disk for its checkpoints and the exported weights"
            f"{', also in the object store there' if has_local_store else ''}, and {home} "
            f"has {free / GIB:,.1f} free; free space (`cotrain cleanup --dry-run` lists what may go), or move the home "
            "folder"
        )
    return main_memory
