"""How many threads the system starts."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger(__name__)


def count_threads(wanted: int) -> int:
    """How many threads can run at the same time, this one included, up to `wanted`: OpenMP ends the process when the
    system refuses one.
    """
    done = threading.Event()
    others = [threading.Thread(target=done.wait, daemon=True) for _ in range(wanted - 1)]
    started = 0
    try:
        for thread in others:
            thread.start()
            started += 1
    except RuntimeError:
        logger.info("the system starts no more than %d threads of %d", started + 1, wanted)
    finally:
        done.set()
        for thread in others[:started]:
            thread.join()
    return started + 1
